"""Block diffusion with a confidence threshold and token editing (LLaDA2.1), every row at its own pace.

Attention is block-causal: a block sees the blocks before it and itself. So the keys and values of finished blocks
never change, and each step computes one block. The same tokens as dllm's `LLaDA21Sampler`, which takes one prompt at
a time and computes everything anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ...backbones.cache import CanvasCache, block_causal
from ...config import knob
from .base import CanvasSampler, RowNoise, SamplerConfig

#: Prompt tokens that one forward pass computes while filling the cache: bounds the memory that a long prompt takes.
PREFILL = 1024


@dataclass
class LLaDA21SamplerConfig(SamplerConfig):
    """Settings, with dllm's names and defaults; the last two are ours.

    The paper's decoding has no editing, and min(32, answer's tokens) steps a block: `editing_threshold=none` and
    `block_steps=32`, as recipes/eval says.
    """

    NAME = "llada21"

    block_size: int = knob(32, "tokens that see each other; blocks are finished one after the other")
    top_p: float | None = knob(None, "sample among the likeliest tokens that hold this probability")
    top_k: int | None = knob(None, "sample among this many of the likeliest tokens")
    threshold: float = knob(0.95, "masks are committed above this confidence, and at least num_to_transfer of them")
    editing_threshold: float | None = knob(
        0.9, "committed tokens give way to another one above this confidence; none never edits, as in the paper"
    )
    max_post_steps: int = knob(16, "steps of editing alone, once a block has no mask left")
    num_to_transfer: int = knob(1, "the fewest masks that a step commits")
    eos_early_stop: bool = knob(False, "stop after the block in which the text ends")
    use_cache: bool = knob(True, "keep keys and values of finished blocks; the same tokens without")
    block_steps: int | None = knob(
        None,
        "a block takes no more steps than these, nor than the answer has tokens: each commits at least its share of "
        "the block (the paper's are 32); none is no limit",
    )


class Step(NamedTuple):
    """What a step did to the block of one row."""

    masks_before: int
    masks_after: int
    changed: bool
    edited: bool


@dataclass
class Row:
    """How far one prompt of the batch is."""

    prompt: int  #: tokens
    blocks: int  #: of its canvas, prompt included
    block: int  #: the one that is filled in now
    block_steps: int | None  #: the most that a block takes
    steps: int = 0  #: in this block
    post_steps: int = 0  #: those among them since it had no mask left
    barred: bool = False  #: the mask token may not be chosen in this block any more
    stale: bool = False  #: ended by an edit: its keys and values are computed once more before the next block
    done: bool = False

    @classmethod
    def of(cls, prompt: int, settings: LLaDA21SamplerConfig) -> Row:
        """Return the row of a prompt of so many tokens, before its first step."""
        new, size = settings.new_tokens(prompt), settings.block_size
        steps = None if settings.block_steps is None else min(settings.block_steps, new)
        return cls(prompt, -(-(prompt + new) // size), prompt // size, steps)

    @property
    def idle(self) -> bool:
        return self.done or self.stale

    def note(self, step: Step, settings: LLaDA21SamplerConfig) -> bool:
        """Count a step; return whether the block has ended with it."""
        self.steps += 1
        if step.masks_after:
            # Every step commits a mask. Where masks come back, or stay although nothing is left to chance, the model
            # chooses the mask token itself, and would do so forever.
            no_change = settings.temperature == 0 and not step.changed
            self.barred = self.barred or no_change or self.steps >= 2 * settings.block_size
            return False
        if not step.masks_before and not step.edited:
            return True
        self.post_steps += 1
        return settings.editing_threshold is None or self.post_steps > settings.max_post_steps

    def quota(self, settings: LLaDA21SamplerConfig) -> int:
        """Return the fewest masks that the next step commits."""
        if self.block_steps is None:
            return settings.num_to_transfer
        share, more = divmod(settings.block_size, self.block_steps)
        return max(settings.num_to_transfer, share + (self.steps < more))

    def next_block(self) -> None:
        self.block, self.post_steps, self.steps, self.barred, self.stale = self.block + 1, 0, 0, False, False


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
        rows = [Row.of(len(prompt), settings) for prompt in prompts]
        canvas = self._canvas(prompts, [row.blocks * size for row in rows])
        yield canvas
        cache = CanvasCache(self.layers, canvas.shape[1]) if settings.use_cache else None
        if cache is not None:
            self._prefill(canvas, cache, size * max(row.block for row in rows), size)
        while not all(row.done for row in rows):
            first = torch.tensor([row.block * size for row in rows], device=canvas.device)[:, None]
            window = first + torch.arange(size, device=canvas.device)
            logits = self._logits(canvas, window, cache, size, rows)
            for_cache_alone = all(row.idle for row in rows)
            steps = [None] * len(rows) if for_cache_alone else self._step(canvas, window, logits, rows, settings, noise)
            for line, row, step in zip(canvas, rows, steps, strict=True):
                if row.stale:
                    row.next_block()
                elif not row.done and row.note(step, settings):
                    ended = settings.eos_early_stop and self._ends(line[row.prompt : (row.block + 1) * size])
                    row.done = ended or row.block + 1 == row.blocks
                    row.stale = not row.done and step.changed and settings.use_cache
                    if not row.idle:
                        row.next_block()
            if not for_cache_alone:
                yield canvas

    def _prefill(self, canvas: Tensor, cache: CanvasCache, length: int, size: int) -> None:
        """Compute keys and values of the prompts' full blocks, a bounded number of tokens at a time."""
        chunk = max(1, PREFILL // size) * size
        nothing = torch.zeros(len(canvas), 1, dtype=torch.long, device=canvas.device)
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            positions = torch.arange(start, end, device=canvas.device)[None]
            cache.visible = end
            self.model(
                input_ids=canvas[:, start:end],
                attention_mask=block_causal(positions, end, size),
                position_ids=positions,
                cache=cache,
                positions=nothing,  # the last layer's output is not wanted
                project=False,
            )

    def _logits(self, canvas: Tensor, window: Tensor, cache: CanvasCache | None, size: int, rows: list[Row]) -> Tensor:
        """Return the logits of each row's block. window [B, size] → [B, size, V]."""
        last = max(row.block for row in rows)
        end = size * (1 + last)
        if cache is None:
            return self.model(input_ids=canvas[:, :end], attention_mask=size, positions=window).logits
        cache.visible = end
        mask = block_causal(window[:, :1], end, size)  # all of a block sees the same
        if all(row.done or row.block == last for row in rows):  # everything: attention has its fastest kernel
            mask = None
        tokens = canvas.gather(1, window)
        return self.model(input_ids=tokens, attention_mask=mask, position_ids=window, cache=cache).logits

    def _step(
        self,
        canvas: Tensor,
        window: Tensor,
        logits: Tensor,
        rows: list[Row],
        settings: LLaDA21SamplerConfig,
        noise: RowNoise,
    ) -> list[Step]:
        """Commit and edit tokens in each row's block."""
        mask_id = self.tokenizer.mask_token_id
        facts = [(row.prompt, row.idle, row.barred, row.quota(settings)) for row in rows]
        prompt, idle, barred, quota = torch.tensor(facts, device=canvas.device).T[:, :, None]
        logits[:, :, mask_id] = logits[:, :, mask_id].masked_fill(barred.bool(), -torch.inf)
        tokens, probability = self._choose(logits, rows, settings, noise)
        before = canvas.gather(1, window)
        own = window >= prompt  # a mask token of the prompt is text, and stays
        masked = (before == mask_id) & own

        confidence = probability.masked_fill(~masked, -torch.inf)
        sure = (confidence > settings.threshold) & masked
        order = confidence.topk(min(max(fact[-1] for fact in facts), settings.block_size)).indices
        rank = torch.arange(order.shape[1], device=canvas.device)
        best = torch.zeros_like(masked).scatter_(1, order, rank < quota) & masked
        committed = torch.where(sure.sum(1, keepdim=True) >= quota, sure, best)
        edits = torch.inf if settings.editing_threshold is None else settings.editing_threshold
        edited = ~masked & own & (probability > edits) & (tokens != before)
        after = torch.where((committed | edited) & ~idle.bool(), tokens, before)
        canvas.scatter_(1, window, after)
        seen = [masked.sum(1), ((after == mask_id) & own).sum(1), (after != before).any(1), edited.any(1)]
        return [Step(*row) for row in torch.stack(seen, dim=1).tolist()]

    def _choose(
        self, logits: Tensor, rows: list[Row], settings: LLaDA21SamplerConfig, noise: RowNoise
    ) -> tuple[Tensor, Tensor]:
        """Return a token for each position, the likeliest at temperature 0, and its probability. [B, M, V] → [B, M].

        Rows that are idle draw nothing, as they would not if they were alone.
        """
        if settings.temperature > 0:
            logits = keep_likeliest(logits / settings.temperature, settings.top_k, settings.top_p)
        probabilities = logits.softmax(-1)
        greedy = settings.temperature == 0
        tokens = probabilities.argmax(-1) if greedy else noise.choose(probabilities, [row.idle for row in rows])
        return tokens, probabilities.gather(-1, tokens[..., None])[..., 0]

    def _ends(self, answer: Tensor) -> bool:
        return bool((answer != self.tokenizer.mask_token_id).all() and (answer == self.tokenizer.eos_token_id).any())


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
