"""Block diffusion with a confidence threshold and token editing (LLaDA2.1), every row at its own pace.

Attention is block-causal: a block sees the blocks before it and itself. So the keys and values of finished blocks
never change, and each step computes one block. The same tokens as dllm's `LLaDA21Sampler`, which takes one prompt at
a time and computes everything anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ...backbones.cache import CanvasCache, block_causal
from ...compat.dllm_api import BaseSamplerConfig
from ...config import check_types, knob, require
from .base import CanvasSampler, RowNoise, new_tokens, settings_of

#: Prompt tokens that one forward pass computes while filling the cache: bounds the memory that a long prompt takes.
PREFILL = 1024


@dataclass
class LLaDA21SamplerConfig(BaseSamplerConfig):
    """Settings, with dllm's names and defaults; the last two are ours.

    The paper's decoding has no editing, and min(32, answer's tokens) steps a block: `editing_threshold=none` and
    `block_steps=32`, as recipes/eval says.
    """

    max_new_tokens: int | None = knob(128, "of an answer")
    max_length: int | None = knob(None, "of prompt and answer together, where max_new_tokens is none")
    block_size: int = knob(32, "tokens that see each other; blocks are finished one after the other")
    temperature: float = knob(0.0, "0 takes the likeliest token")
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

    def __post_init__(self) -> None:
        check_types(self, "sampler")
        require("sampler", self, "temperature", self.temperature >= 0, "at least 0")
        for name in ("threshold", "editing_threshold", "top_p"):
            value = getattr(self, name)
            require("sampler", self, name, value is None or 0 <= value <= 1, "in [0, 1]")
        for name, least in (
            ("block_size", 1),
            ("num_to_transfer", 1),
            ("max_post_steps", 0),
            ("block_steps", 1),
            ("top_k", 0),
        ):
            value = getattr(self, name)
            require("sampler", self, name, value is None or value >= least, f"at least {least}")


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
    post_steps: int = 0  #: steps since that had no mask left
    steps: int = 0  #: in this block
    barred: bool = False  #: the mask token may not be chosen in this block any more
    stale: bool = False  #: ended by an edit: its keys and values are computed once more before the next block
    done: bool = False

    @property
    def idle(self) -> bool:
        return self.done or self.stale

    def note(self, step: Step, settings: LLaDA21SamplerConfig) -> bool:
        """Count a step; whether the block has ended with it."""
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
        """The fewest masks that the next step commits."""
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

    @torch.no_grad()
    def steps(
        self,
        inputs: Sequence[Tensor | list[int]],
        config: LLaDA21SamplerConfig | None = None,
        seeds: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Iterator[Tensor]:
        settings = settings_of(LLaDA21SamplerConfig, config, kwargs)
        size = settings.block_size
        prompts = self._prompts(inputs)
        rows = []
        for prompt in prompts:
            new = new_tokens(settings, len(prompt))
            most = None if settings.block_steps is None else min(settings.block_steps, new)
            blocks = -(-(len(prompt) + new) // size)
            rows.append(Row(prompt=len(prompt), blocks=blocks, block=len(prompt) // size, block_steps=most))
        canvas = self._canvas(prompts, size * max(row.blocks for row in rows))
        for line, row in zip(canvas, rows, strict=True):
            line[row.prompt : row.blocks * size] = self.tokenizer.mask_token_id
        noise = RowNoise(seeds, len(rows), canvas.device)
        yield canvas
        cache = None
        if settings.use_cache:
            cache = CanvasCache(self.layers, canvas.shape[1])
            self._prefill(canvas, cache, size * max(row.block for row in rows), size)
        while not all(row.done for row in rows):
            first = torch.tensor([row.block * size for row in rows], device=canvas.device)[:, None]
            window = first + torch.arange(size, device=canvas.device)
            logits = self._logits(canvas, window, cache, size, rows)
            if all(row.idle for row in rows):  # this pass was for the cache
                taken = [None] * len(rows)
            else:
                taken = self._step(canvas, window, logits, rows, settings, noise)
            for line, row, step in zip(canvas, rows, taken, strict=True):
                if row.stale:
                    row.next_block()
                elif not row.done and row.note(step, settings):
                    row.done = row.block + 1 == row.blocks or (settings.eos_early_stop and self._ends(line, row, size))
                    row.stale = not row.done and step.changed and settings.use_cache
                    if not row.idle:
                        row.next_block()
            if any(step is not None for step in taken):
                yield canvas

    def infill(self, inputs: Any, config: Any = None, **kwargs: Any) -> NoReturn:
        """LLaDA2.1 decodes from left to right, block by block; dllm has no infilling for it either.

        Raises:
            TypeError: always.
        """
        raise TypeError("LLaDA21Sampler cannot fill in; MDLMSampler.infill can, with full attention")

    def _prefill(self, canvas: Tensor, cache: CanvasCache, length: int, size: int) -> None:
        """Keys and values of the prompts' full blocks, a bounded number of tokens at a time."""
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
        """Logits of each row's block. window [B, size] → [B, size, V]."""
        last = max(row.block for row in rows)
        end = size * (1 + last)
        if cache is None:
            return self.model(input_ids=canvas[:, :end], attention_mask=size, positions=window).logits
        cache.visible = end
        mask = block_causal(window[:, :1], end, size)  # all of a block sees the same
        if all(row.done or row.block == last for row in rows):  # everything: attention has its fastest kernel
            mask = None
        return self.model(
            input_ids=canvas.gather(1, window), attention_mask=mask, position_ids=window, cache=cache
        ).logits

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
        tokens, probability = sample_tokens(logits, settings, noise, [row.idle for row in rows])
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

    def _ends(self, line: Tensor, row: Row, size: int) -> bool:
        text = line[row.prompt : (row.block + 1) * size]
        return bool((text != self.tokenizer.mask_token_id).all() and (text == self.tokenizer.eos_token_id).any())


def sample_tokens(
    logits: Tensor, settings: LLaDA21SamplerConfig, noise: RowNoise, idle: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """A token for each position and its probability: the likeliest one at temperature 0. [B, M, V] → two of [B, M].

    Rows that are idle draw nothing, as they would not if they were alone.
    """
    if settings.temperature > 0:
        logits = _keep_likeliest(logits / settings.temperature, settings.top_k, settings.top_p)
    probabilities = logits.softmax(-1)
    tokens = probabilities.argmax(-1) if settings.temperature == 0 else noise.choose(probabilities, idle)
    return tokens, probabilities.gather(-1, tokens[..., None])[..., 0]


def _keep_likeliest(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """-inf but for the `top_k` largest logits, and of these the first that hold `top_p` of the probability."""
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and 0 < top_p < 1:
        falling, order = logits.sort(descending=True)
        beyond = falling.softmax(-1).cumsum(-1) > top_p
        beyond = torch.cat([torch.zeros_like(beyond[..., :1]), beyond[..., :-1]], dim=-1)  # the one that crosses stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter_(-1, order, beyond), -torch.inf)
    return logits
