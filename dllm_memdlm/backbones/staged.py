"""One forward in two stages: the prefix (layers without fast weights) and the suffix (the rest, and the logits).

    prefix = model(stage="prefix", input_ids=x, boundary=n).hidden                  # [B, L, D]
    out = model(stage="suffix", hidden=prefix, boundary=n, positions=index)          # logits [B, M, V]

The inner loop needs the prefix once for each state and its gradient never, and logits only where there is a loss. Both
stages pass through the outermost module's `forward`, so that PEFT, DDP, ZeRO and FSDP see an ordinary call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import ModelOutput

from ..versions import cache_argument
from .cache import CanvasCache, block_causal
from .layers import BlockCausal, additive_mask, take
from .output import OutputLinear, token_nll


@dataclass
class StageOutput(ModelOutput):
    """What a stage returns. `hidden` is [B, L, D] after the prefix, and [B, M, D] after the suffix's final norm.

    `nll` [B, M], in nats, is of the tokens that were asked for.
    """

    hidden: Tensor | None = None
    logits: Tensor | None = None
    nll: Tensor | None = None


def unwrapped(model: nn.Module) -> nn.Module:
    """The language model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class StagedForward:
    """Mixed into a language model that has `model.layers`, `model.norm`, `model.rotary_emb` and an output layer.

    One that has them elsewhere says so: `layers_path`, `final_norm`, `position_embeddings`, `get_output_embeddings`;
    so does one with more before its layers (`embedded`) or after (`finished`), or whose layers differ (`contexts`).

    Attention is bidirectional. The layers take (hidden, attention_mask, position_ids, position_embeddings), and those
    of a class with `layers_take_queries` also `queries`, the positions whose output is wanted.
    """

    # Of the class that this is mixed into
    model: Any
    config: Any
    get_input_embeddings: Callable[[], Any]
    get_output_embeddings: Callable[[], Any]

    layers_take_queries = False
    right_shift_logits = False  #: by architecture: logits at position i predict token i + 1
    layers_path = "layers"  #: where the layers are, in `model`
    own_names: ClassVar[dict[str, str]] = {}  #: what `memory.target_modules` names, where it is called otherwise here

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.get_submodule(self.layers_path)

    @property
    def final_norm(self) -> nn.Module:
        return self.model.norm

    def position_embeddings(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position, each [1 or B, L, d]."""
        return self.model.rotary_emb(hidden, position_ids)

    def embedded(self, tokens: Tensor | None, embeddings: Tensor | None) -> Tensor:
        """What the first layer takes [B, L, D], of tokens [B, L] or of their embeddings [B, L, D]."""
        return self.get_input_embeddings()(tokens) if embeddings is None else embeddings

    def finished(self, hidden: Tensor) -> Tensor:
        """What the output layer takes, of what the last layer puts out. `final_norm` computes the end of it."""
        return self.final_norm(hidden)

    def contexts(
        self, hidden: Tensor, mask: Tensor | BlockCausal | None, position_ids: Tensor, cache: CanvasCache | None
    ) -> list[dict[str, Any]]:
        """The arguments of every layer beside the hidden states [B, L, D]."""
        own = {"position_ids": position_ids, "position_embeddings": self.position_embeddings(hidden, position_ids)}
        return [{"attention_mask": mask, **own}] * len(self.layers)

    @property
    def loss_type(self) -> None:
        """None: a label is of its own position. Of a causal model transformers 5 counts those from the second on."""

    @loss_type.setter
    def loss_type(self, value: str | None) -> None:  # transformers sets it by the name of the class
        pass

    @property
    def is_gradient_checkpointing(self) -> bool:
        """What PEFT (0.21) asks for, under a name that transformers 5 warns of."""
        return any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers)

    def enable_input_require_grads(self) -> None:
        """Leave the embeddings' output without a gradient, which only the reentrant kind of checkpointing needs.

        transformers 5 calls this for every checkpointed model: it would cost a backward pass of the first layer.
        """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | int | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        stage: Literal["full", "prefix", "suffix"] = "full",
        boundary: int = 0,
        hidden: Tensor | None = None,
        positions: Tensor | None = None,
        project: bool = True,
        tokens: Tensor | None = None,
        cache: CanvasCache | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | StageOutput:
        """Run one stage, or both.

        Args:
            input_ids: tokens [B, L] (full, prefix); `inputs_embeds` [B, L, D] may stand in.
            attention_mask: none (all positions see each other), [B, L] with 0 on hidden keys, or 4-D, boolean or
                additive, broadcastable to [B, heads, L, L] (with a cache [B, heads, L, visible]); or a number: blocks
                of so many positions are causal, and tokens within one see each other.
            position_ids: [1 or B, L]; counted from 0 by default.
            stage: which part to run. `full` returns logits [B, L, V] as any masked language model does.
            boundary: index of the first layer that belongs to the suffix.
            hidden: the prefix's output [B, L, D] (suffix).
            positions: index [B, M] of the positions whose output is wanted (suffix, full); all of them by default.
            project: whether to compute logits, or stop at the final norm (suffix, full).
            tokens: what is wanted at the positions [B, M]: their NLL, and no logits (suffix, full).
            cache: keys and values of the canvas that these tokens are a part of, at `position_ids` [B, L] (full).
        """
        if stage != "suffix":
            hidden = self.embedded(input_ids, inputs_embeds)
        assert hidden is not None, "the suffix takes hidden states"
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask = self._mask(attention_mask, hidden, cache is not None)
        contexts = self.contexts(hidden, mask, position_ids, cache)
        if cache is not None:
            cache.positions = position_ids
            name = cache_argument(type(self.layers[0]))
            contexts = [{**own, name: part} for own, part in zip(contexts, cache.layers, strict=True)]
        if stage == "prefix":
            for layer, own in zip(self.layers[:boundary], contexts, strict=False):
                hidden = layer(hidden, **own)
            return StageOutput(hidden=hidden)
        if positions is not None and self.layers_take_queries:
            contexts[-1] = {**contexts[-1], "queries": positions}
        first = boundary if stage == "suffix" else 0
        with nullcontext() if stage == "full" and positions is None else _not_checkpointed(self.layers):
            for layer, own in zip(self.layers[first:], contexts[first:], strict=True):
                hidden = layer(hidden, **own)
        if positions is not None and not self.layers_take_queries:
            hidden = take(hidden, positions)
        hidden, head = self.finished(hidden), self.get_output_embeddings()
        if tokens is not None:
            whole = isinstance(head, OutputLinear)  # and not under an adapter of its own
            nll = head(hidden, tokens) if whole else token_nll(head(hidden), tokens)
            return StageOutput(hidden=hidden, nll=nll)
        logits = head(hidden) if project else None
        return MaskedLMOutput(logits=logits) if stage == "full" else StageOutput(hidden=hidden, logits=logits)

    def _mask(self, attention_mask: Tensor | int | None, hidden: Tensor, cached: bool) -> Tensor | BlockCausal | None:
        if isinstance(attention_mask, int):
            if cached or attention_mask < 1:
                raise ValueError(f"attention_mask={attention_mask}: expected at least 1, and no cache; or a tensor")
            if self.layers_take_queries:  # which are ours, and attend in parts
                return BlockCausal(attention_mask, hidden)
            length = hidden.shape[1]
            attention_mask = block_causal(torch.arange(length, device=hidden.device)[None], length, attention_mask)
        return None if attention_mask is None else additive_mask(attention_mask, hidden.dtype)


@contextmanager
def _not_checkpointed(layers: nn.ModuleList) -> Iterator[None]:
    """Keep the activations of these layers: a recomputation would want fast weights that are gone by then."""
    checkpointed: list[Any] = [layer for layer in layers if getattr(layer, "gradient_checkpointing", False)]
    for layer in checkpointed:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in checkpointed:
            layer.gradient_checkpointing = True
