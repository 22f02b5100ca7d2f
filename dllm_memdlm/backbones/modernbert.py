"""ModernBERT, which dllm's BERT examples train: transformers' weights, in layers that a memory can be held in."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..versions import modernbert_layers
from .cache import CanvasCache
from .layers import DecoderLayer, additive_mask, attend, in_heads, lowered, remade
from .output import OutputLinear
from .staged import StagedForward


class ModernBertEncoderLayer(DecoderLayer):
    """A layer of the modules of transformers'."""

    norms = ("attn_norm", "mlp_norm")
    num_key_value_groups = 1

    @property
    def head_dim(self) -> int:
        return self.attn.head_dim

    def attended(self, x: Tensor, *context: Any) -> Tensor:
        """As `attend`. x [B, L, D] → [B, L, D]."""
        query, key, value = in_heads(self, *self.attn.Wqkv(x).chunk(3, dim=-1))
        return self.attn.out_drop(self.attn.Wo(attend(self, query, key, value, *context)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(lowered(x))


class ModernBertForMaskedLM(StagedForward, transformers.ModernBertForMaskedLM):
    """ModernBERT with its head. Most layers attend to the `local_attention` nearest positions, the others to all.

    Rotary positions turn by another base in either kind. See `StagedForward.forward`.

    Raises:
        ValueError: rotary positions are scaled.
    """

    # What the gate and the up projection are elsewhere is one layer here
    own_names = {"gate_proj": "Wi", "up_proj": "Wi", "down_proj": "mlp.Wo"}
    _no_split_modules = ["ModernBertEncoderLayer"]
    _supports_flash_attn = False  # which takes no mask of a window

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        take_layers(self)
        OutputLinear.put_into(self)

    @property
    def final_norm(self) -> nn.Module:
        return self.head.norm

    def finished(self, hidden: Tensor) -> Tensor:
        return self.head(self.model.final_norm(hidden))

    def embedded(self, tokens: Tensor | None, embeddings: Tensor | None) -> Tensor:
        given = super().embedded(tokens, embeddings)
        return self.model.embeddings.drop(self.model.embeddings.norm(given))

    def contexts(
        self, hidden: Tensor, mask: Any, position_ids: Tensor, cache: CanvasCache | None
    ) -> list[dict[str, Any]]:
        keys = torch.arange(hidden.shape[1] if cache is None else cache.visible, device=hidden.device)
        queries, reach = keys[None] if cache is None else position_ids, self.config.local_attention // 2
        near = mask
        if len(keys) > reach + 1:
            near = additive_mask(((queries[..., None] - keys).abs() <= reach)[:, None], hidden.dtype)
            near = near if mask is None else torch.minimum(near, mask)
        kinds = modernbert_layers(self.config)
        turns = {base: self._turns(base, hidden, position_ids) for _, base in kinds}
        return [
            {
                "attention_mask": near if local else mask,
                "position_ids": position_ids,
                "position_embeddings": turns[base],
            }
            for local, base in kinds
        ]

    def _turns(self, base: float, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position, each [1 or B, L, d], in float32 at least."""
        size: Any = self.layers[0].head_dim
        rates = 1.0 / base ** (torch.arange(0, size, 2, device=hidden.device).float() / size)
        angles = position_ids[..., None].float() * rates
        angles = torch.cat([angles, angles], dim=-1).to(torch.promote_types(hidden.dtype, torch.float32))
        return angles.cos(), angles.sin()


def take_layers(model: Any) -> None:
    """Put layers of ours in place of transformers', with the same modules: those take neither our masks nor a cache.

    Raises:
        ValueError: rotary positions are scaled.
    """
    modernbert_layers(model.config)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = remade(ModernBertEncoderLayer, layer, config=model.config)
