"""Block diffusion with a confidence threshold and token editing (LLaDA2.1), every row at its own pace.

Attention is block-causal: a block sees the blocks before it and itself. So the keys and values of finished blocks
never change, and each step computes one block. The same tokens as dllm's `LLaDA21Sampler`, which takes one prompt at
a time and computes everything anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...backbones.cache import CanvasCache, block_causal
from ...compat.dllm_api import BaseSamplerConfig
from ...config import ConfigError, Count, Natural, Probability, knob
from .base import CanvasSampler, RowNoise, SamplerConfig, choice

#: Prompt tokens that one forward pass computes while filling the cache: bounds the memory that a long prompt takes.
PREFILL = 1024


@dataclass
class LLaDA21SamplerConfig(SamplerConfig):
    """Settings, with dllm's names and defaults; the last two are ours.

    The paper's decoding has no editing, and min(32, answer's tokens) steps a block: `editing_threshold=none` and
    `block_steps=32`, as recipes/eval says.
    """

    NAME = "llada21"

    block_size: Count = knob(32, "tokens that see each other; blocks are finished one after the other")
    top_p: Probability | None = knob(None, "sample among the likeliest tokens that hold this probability")
    top_k: Natural | None = knob(None, "sample among this many of the likeliest tokens")
    threshold: Probability = knob(
        0.95, "masks are committed above this confidence, and at least num_to_transfer of them"
    )
    editing_threshold: Probability | None = knob(
        0.9, "committed tokens give way to another one above this confidence; none never edits, as in the paper"
    )
    max_post_steps: Natural = knob(16, "steps of editing alone, once a block has no mask left")
    num_to_transfer: Count = knob(1, "the fewest masks that a step commits")
    eos_early_stop: bool = knob(False, "stop after the block in which the text ends")
    use_cache: bool = knob(True, "keep keys and values of finished blocks; the same tokens without")
    block_steps: Count | None = knob(
        None,
        "a block takes no more steps than these, nor than the answer has tokens: each commits at least its share of "
        "the block (the paper's are 32); none is no limit",
    )


@dataclass
class LLaDA2SamplerConfig(LLaDA21SamplerConfig):
    """LLaDA2.0's, as dllm decodes it: an even share of a block in every step, and no editing."""

    NAME = "llada2"

    editing_threshold: Probability | None = knob(None, "as of llada21; none never edits")
    block_steps: Count | None = knob(32, "as of llada21; dllm's steps_per_block")

    @classmethod
    def of(cls, config: BaseSamplerConfig | None, changes: dict[str, Any]) -> SamplerConfig:
        """As `SamplerConfig.of`; dllm's `steps_per_block` is `block_steps`, and its `minimal_topk` must be 1."""
        fewest = getattr(config, "minimal_topk", 1)
        if fewest != 1:
            raise ConfigError(f"sampler.minimal_topk={fewest!r}: expected 1; num_to_transfer commits more in a step")
        steps = getattr(config, "steps_per_block", None)
        return super().of(config, changes if steps is None else {"block_steps": steps, **changes})


class Rows:
    """How far each prompt of a batch is: a tensor [B, 1] for each fact."""

    def __init__(self, prompts: list[int], settings: LLaDA21SamplerConfig, device: torch.device) -> None:
        self.settings, size = settings, settings.block_size
        new = [settings.new_tokens(prompt) for prompt in prompts]
        self.prompt, new = torch.tensor([prompts, new], device=device)[..., None]  #: tokens
        self.last = (self.prompt + new - 1) // size  #: block of the canvas, prompt included
        self.block = self.prompt // size  #: the one that is filled in now
        self.most = None if settings.block_steps is None else new.clamp(max=settings.block_steps)  #: steps of a block
        self.steps = torch.zeros_like(new)  #: in this block
        self.post_steps = torch.zeros_like(new)  #: those among them since it had no mask left
        self.done = torch.zeros_like(new, dtype=torch.bool)
        self.barred = self.done.clone()  #: the mask token may not be chosen in this block any more
        self.stale = self.done.clone()  #: ended by an edit: keys and values are computed anew before the next block

    @property
    def idle(self) -> Tensor:
        return self.done | self.stale

    def quota(self) -> Tensor:
        """Return the fewest masks that the next step commits. [B, 1]."""
        size, fewest = self.settings.block_size, self.settings.num_to_transfer
        if self.most is None:
            return torch.full_like(self.block, fewest)
        return (size // self.most + (self.steps < size % self.most)).clamp(min=fewest)

    def note(self, masked: Tensor, left: Tensor, changed: Tensor, edited: Tensor, text_ends: Tensor) -> None:
        """Count a step of the rows that are not idle; where their blocks have ended with it, go to the next ones.

        Args, [B, 1] bool: whether a block had masks before the step, has some left, was changed, and was edited; and
        whether the text ends in it.
        """
        settings, active = self.settings, ~self.idle
        self.steps += active
        # Every step commits a mask. Where masks come back, or stay although nothing is left to chance, the model
        # chooses the mask token itself, and would do so forever.
        stuck = self.steps >= 2 * settings.block_size
        self.barred |= left & (stuck if settings.temperature > 0 else stuck | ~changed)
        settled = ~masked & ~edited
        self.post_steps += active & ~left & ~settled
        most = 0 if settings.editing_threshold is None else settings.max_post_steps
        ended = active & ~left & (settled | (self.post_steps > most))
        self.done |= ended & (text_ends | (self.block == self.last))
        again = ended & ~self.done & changed & settings.use_cache
        move = self.stale | (ended & ~self.done & ~again)
        self.stale = again
        self.block += move
        for state in (self.steps, self.post_steps, self.barred):
            state.masked_fill_(move, 0)


@dataclass
class LLaDA21Sampler(CanvasSampler):
    """dllm's `LLaDA21Sampler`, for any number of prompts of any lengths; mask tokens in a prompt stay.

    A model that keeps choosing the mask token itself keeps dllm's loop running forever; here it may not, in a block
    that it has got stuck in. See `CanvasSampler`.
    """

    CONFIG = LLaDA21SamplerConfig

    def infill(self, inputs: Any, config: Any = None, **kwargs: Any) -> NoReturn:
        """Raise TypeError: LLaDA2.1 decodes from left to right. dllm has no infilling for it either."""
        raise TypeError("LLaDA21Sampler cannot fill in; MDLMSampler.infill can, with full attention")

    @torch.no_grad()
    def _decode(self, prompts: list[Tensor], settings: LLaDA21SamplerConfig, noise: RowNoise) -> Iterator[Tensor]:
        size = settings.block_size
        rows = Rows([len(prompt) for prompt in prompts], settings, self.model.device)
        canvas = self._canvas(prompts, (size * (1 + rows.last))[:, 0].tolist())
        yield canvas
        cache = CanvasCache(self.layers, canvas.shape[1]) if settings.use_cache else None
        if cache is not None:
            self._prefill(canvas, cache, size * int(rows.block.max()), size)
        while True:
            last, quota = rows.block.max(), rows.quota()
            level = (rows.done | (rows.block == last)).all()
            facts = torch.stack([rows.done.all(), rows.idle.all(), level, last, quota.max()])
            done, for_cache_alone, level, last, most = facts.tolist()  # once a step, this waits for the device
            if done:
                return
            window = size * rows.block + torch.arange(size, device=canvas.device)
            logits = self._logits(canvas, window, cache, size, last, level)
            self._step(canvas, window, logits, rows, quota, most, noise)
            if not for_cache_alone:
                yield canvas

    def _prefill(self, canvas: Tensor, cache: CanvasCache, length: int, size: int) -> None:
        """Compute keys and values of the prompts' full blocks, a bounded number of tokens at a time."""
        chunk = max(1, PREFILL // size) * size
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            positions = torch.arange(start, end, device=canvas.device)[None]
            cache.visible = end
            self.model(
                input_ids=canvas[:, start:end],
                attention_mask=block_causal(positions, end, size),
                position_ids=positions,
                cache=cache,
                positions=torch.zeros_like(canvas[:, :1]),  # the last layer's output is not wanted
                project=False,
            )

    def _logits(
        self, canvas: Tensor, window: Tensor, cache: CanvasCache | None, size: int, last: int, level: int
    ) -> Tensor:
        """Return the logits of each row's block, all of them the `last` one if `level`. [B, size] → [B, size, V]."""
        end = size * (1 + last)
        if cache is None:
            return self.model(input_ids=canvas[:, :end], attention_mask=size, positions=window).logits
        cache.visible = end
        # All of a block sees the same; where that is everything, attention has its fastest kernel.
        mask = None if level else block_causal(window[:, :1], end, size)
        tokens = canvas.gather(1, window)
        return self.model(input_ids=tokens, attention_mask=mask, position_ids=window, cache=cache).logits

    def _step(
        self, canvas: Tensor, window: Tensor, logits: Tensor, rows: Rows, quota: Tensor, most: int, noise: RowNoise
    ) -> None:
        """Commit and edit tokens in each row's block; `most` is the largest quota."""
        settings, mask, idle = rows.settings, self.tokenizer.mask_token_id, rows.idle
        logits[..., mask] = logits[..., mask].masked_fill(rows.barred, -torch.inf)
        if settings.temperature > 0:
            logits = keep_likeliest(logits / settings.temperature, settings.top_k, settings.top_p)
        probabilities = logits.softmax(-1)
        if settings.temperature > 0:
            tokens = noise.of_valid(probabilities, ~idle.expand_as(window), choice)
        else:
            tokens = probabilities.argmax(-1)
        probability = probabilities.gather(-1, tokens[..., None])[..., 0]

        before, own = canvas.gather(1, window), window >= rows.prompt  # a mask token of the prompt is text, and stays
        masked = own & (before == mask)
        confidence = probability.masked_fill(~masked, -torch.inf)
        sure = masked & (confidence > settings.threshold)
        order = confidence.topk(min(most, settings.block_size)).indices
        ranked = torch.arange(order.shape[1], device=canvas.device) < quota
        surest = masked & torch.zeros_like(masked).scatter_(1, order, ranked)
        committed = torch.where(sure.sum(1, keepdim=True) >= quota, sure, surest)
        edits = torch.inf if settings.editing_threshold is None else settings.editing_threshold
        edited = own & ~masked & (probability > edits) & (tokens != before)
        after = tokens.where((committed | edited) & ~idle, before)
        canvas.scatter_(1, window, after)

        left = own & (after == mask)
        seen = [fact.any(1, keepdim=True) for fact in (masked, left, after != before, edited)]
        seen.append(self._text_ends(canvas, rows))
        rows.note(*seen)

    def _text_ends(self, canvas: Tensor, rows: Rows) -> Tensor:
        """Tell whether the text ends in a row's block, where generation is to stop then. [B, 1]."""
        if not rows.settings.eos_early_stop:
            return torch.zeros(len(canvas), 1, dtype=torch.bool, device=canvas.device)
        place, size = torch.arange(canvas.shape[1], device=canvas.device), rows.settings.block_size
        answer = canvas.masked_fill((place < rows.prompt) | (place >= size * (rows.block + 1)), -1)
        masked, ends = (
            (answer == token).any(1, keepdim=True)
            for token in (self.tokenizer.mask_token_id, self.tokenizer.eos_token_id)
        )
        return ends & ~masked


@dataclass
class LLaDA2Sampler(LLaDA21Sampler):
    """dllm's `LLaDA2Sampler`: LLaDA2.1's without editing."""

    CONFIG = LLaDA2SamplerConfig


def keep_likeliest(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Return -inf but for the `top_k` largest logits, and of these the first that hold `top_p` of the probability."""
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and 0 < top_p < 1:
        falling, order = logits.sort(descending=True)
        before = falling.softmax(-1).cumsum(-1).roll(1, -1)  # the probability of those that are likelier
        before[..., 0] = 0
        logits = logits.masked_fill(torch.zeros_like(before > top_p).scatter_(-1, order, before > top_p), -torch.inf)
    return logits
