"""Low-confidence remasking (LLaDA, LLaDA-MoE): in every step the most confident tokens are committed.

The same tokens as dllm's `MDLMSampler`, from less work: logits only where a token may be committed, and the last layer
only there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...backbones.cache import CanvasCache
from ...compat.dllm_api import BaseSamplerConfig, BaseSamplerOutput
from ...config import check_types, knob, require
from ...method.losses import positions_of
from .base import CanvasSampler, RowNoise, new_tokens, settings_of


@dataclass
class MDLMSamplerConfig(BaseSamplerConfig):
    """Settings, with dllm's names and defaults; the last two are ours, and change the tokens."""

    max_new_tokens: int | None = knob(128, "of an answer")
    max_length: int | None = knob(None, "of prompt and answer together, where max_new_tokens is none")
    block_size: int | None = knob(128, "blocks are finished one after the other; none is one block")
    steps: int = knob(128, "of all blocks together")
    temperature: float = knob(0.0, "0 takes the likeliest token")
    remasking: Literal["low_confidence", "random"] = knob("low_confidence", "which tokens are committed last")
    stochastic_transfer: bool = knob(False, "draw how many tokens a step commits")
    cfg_scale: float = knob(0.0, "classifier-free guidance; costs a second forward pass")
    cfg_keep_tokens: list[int] | None = knob(None, "tokens of the prompt that guidance does not hide")
    suppress_tokens: list[int] | None = knob(None, "never chosen")
    begin_suppress_tokens: list[int] | None = knob(None, "of no confidence, so committed last")
    right_shift_logits: bool = knob(False, "logits at position i predict token i + 1")
    cache: Literal["none", "prefix", "dual"] = knob(
        "none",
        "keep keys and values of what stands before the current block (prefix), or of all but it (dual), from the "
        "block's first step on: an approximation, as with bidirectional attention they change in every step",
    )
    threshold: float | None = knob(None, "commit every token of more confidence, and at least one, whatever steps says")

    def __post_init__(self) -> None:
        check_types(self, "sampler")
        for name in ("temperature", "cfg_scale"):
            require("sampler", self, name, getattr(self, name) >= 0, "at least 0")
        require("sampler", self, "threshold", self.threshold is None or 0 <= self.threshold <= 1, "in [0, 1]")
        require("sampler", self, "block_size", self.block_size is None or self.block_size >= 1, "at least 1")
        require("sampler", self, "steps", self.steps >= 1, "at least 1")


class Block(NamedTuple):
    """The part of each row that is filled in now."""

    starts: list[int]
    ends: list[int]
    #: Where a token may be committed: dllm's `sample` also fills masks that blocks before this one have left.
    lowest: list[int]
    highest: list[int]


@dataclass
class MDLMSampler(CanvasSampler):
    """dllm's `MDLMSampler`, but for mask tokens in a prompt, which stay. See `CanvasSampler`."""

    @torch.no_grad()
    def steps(
        self,
        inputs: Sequence[Tensor | list[int]],
        config: MDLMSamplerConfig | None = None,
        seeds: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Iterator[Tensor]:
        settings = settings_of(MDLMSamplerConfig, config, kwargs)
        prompts = self._with_bos(self._prompts(inputs), settings)
        lengths = [len(prompt) for prompt in prompts]
        new = new_tokens(settings, max(lengths))
        block_size = settings.block_size or new
        canvas = self._canvas(prompts, max(lengths) + new)
        for row, length in zip(canvas, lengths, strict=True):
            row[length : length + new] = self.tokenizer.mask_token_id
        approximate = settings.cache != "none" or settings.threshold is not None
        blocks = []
        for first in range(0, new, block_size):
            starts = [length + first for length in lengths]
            ends = [length + min(first + block_size, new) for length in lengths]
            lowest = starts if approximate else lengths  # a mask token of the prompt is text, and stays
            blocks.append(Block(starts, ends, lowest, [start + block_size for start in starts]))
        yield from self._denoise(canvas, [length + new for length in lengths], blocks, settings, seeds)

    @torch.no_grad()
    def infill(
        self,
        inputs: Sequence[Tensor | list[int]],
        config: MDLMSamplerConfig | None = None,
        seeds: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> BaseSamplerOutput | Tensor:
        """Fill in the mask tokens of the inputs where they stand; blocks are counted from the start of a row."""
        settings = settings_of(MDLMSamplerConfig, config, kwargs)
        require("sampler", settings, "cache", settings.cache == "none", "none when filling in")
        rows = self._with_bos(self._prompts(inputs), settings)
        lengths = [len(row) for row in rows]
        canvas = self._canvas(rows, max(lengths))
        block_size = settings.block_size or max(lengths)
        blocks = []
        for start in range(0, max(lengths), block_size):
            ends = [max(start, min(start + block_size, length)) for length in lengths]
            starts = [start] * len(rows)
            blocks.append(Block(starts, ends, starts, ends))
        return self._finished(self._denoise(canvas, lengths, blocks, settings, seeds), config, kwargs)

    def _with_bos(self, rows: list[Tensor], settings: MDLMSamplerConfig) -> list[Tensor]:
        if not settings.right_shift_logits:
            return rows
        return [row if len(row) else row.new_tensor([self.tokenizer.bos_token_id]) for row in rows]

    def _denoise(
        self,
        canvas: Tensor,
        lengths: list[int],
        blocks: list[Block],
        settings: MDLMSamplerConfig,
        seeds: Sequence[int] | None,
    ) -> Iterator[Tensor]:
        """Fill in the blocks, one after the other. canvas [B, T] is changed; its rows have `lengths` tokens."""
        noise = RowNoise(seeds, len(canvas), canvas.device)
        place = torch.arange(canvas.shape[1], device=canvas.device)
        ragged = len(set(lengths)) > 1
        keys = place < torch.tensor(lengths, device=canvas.device)[:, None] if ragged else None
        forward = _Forward(self, settings, canvas, keys)
        per_block = math.ceil(settings.steps / len(blocks))
        yield canvas
        for block in blocks:
            low, high = (torch.tensor(bound, device=canvas.device)[:, None] for bound in (block.lowest, block.highest))
            inside = (place >= low) & (place < high)
            forward.begin(block)
            for counts in self._plan(canvas, block, per_block, settings, noise):
                masked = (canvas == self.tokenizer.mask_token_id) & inside
                if counts is None:
                    if not masked.any():
                        break
                    confidence, tokens = self._propose(forward, masked, settings, noise)
                    best = torch.zeros_like(masked).scatter_(1, confidence.argmax(1, keepdim=True), True)
                    chosen = (best | (confidence > settings.threshold)) & masked
                    canvas[chosen] = tokens[chosen]
                else:
                    masked &= torch.tensor([[count > 0] for count in counts], device=canvas.device)
                    confidence, tokens = self._propose(forward, masked, settings, noise)
                    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
                        # As many entries as the row alone would have, so that ties fall as they do without a batch.
                        chosen = confidence[row, :length].topk(count).indices
                        canvas[row, chosen] = tokens[row, chosen]
                yield canvas

    def _plan(
        self, canvas: Tensor, block: Block, steps: int, settings: MDLMSamplerConfig, noise: RowNoise
    ) -> list[list[int] | None]:
        """For each step of a block the tokens that each row commits, or none where the threshold decides."""
        if settings.threshold is not None:
            return [None] * max(end - start for start, end in zip(block.starts, block.ends, strict=True))
        counts = self._transfer_counts(canvas, block, steps, settings, noise)
        return [list(step) for step in itertools.zip_longest(*counts, fillvalue=0)]

    def _transfer_counts(
        self, canvas: Tensor, block: Block, steps: int, settings: MDLMSamplerConfig, noise: RowNoise
    ) -> list[list[int]]:
        """The tokens that each row commits, step by step, steps without any left out."""
        counts = []
        for row, (start, end) in enumerate(zip(block.starts, block.ends, strict=True)):
            left = int((canvas[row, start:end] == self.tokenizer.mask_token_id).sum())
            counts.append([])
            for step in range(steps, 0, -1):
                if left == 0:
                    break
                reveal = 1 - self.scheduler.reverse_mask_prob(s=(step - 1) / steps, t=step / steps)
                count = noise.binomial(row, left, reveal) if settings.stochastic_transfer else round(left * reveal)
                count = min(count, left)
                left -= count
                if count:
                    counts[-1].append(count)
        return counts

    def _propose(
        self, forward: _Forward, masked: Tensor, settings: MDLMSamplerConfig, noise: RowNoise
    ) -> tuple[Tensor, Tensor]:
        """The confidence of the model's token at every masked position, -inf elsewhere, and that token. Both [B, T]."""
        positions = positions_of(masked)
        logits = forward(positions.logit_index(settings.right_shift_logits))
        if settings.threshold is not None:  # goes on until no mask is left
            logits[..., self.tokenizer.mask_token_id] = -torch.inf
        if settings.suppress_tokens:
            logits[..., settings.suppress_tokens] = -torch.inf
        shape = (*masked.shape, logits.shape[-1])
        if settings.temperature > 0:
            # Gumbel's trick, in float64 as in dllm: in less, small probabilities are cut off.
            uniform = noise.uniform(shape, positions, torch.float64)
            found = (logits.double().exp() / (-uniform.log()) ** settings.temperature).argmax(-1)
        else:
            found = logits.argmax(-1)
        if settings.begin_suppress_tokens:
            logits[..., settings.begin_suppress_tokens] = -torch.inf
        if settings.remasking == "low_confidence":
            sure = logits.softmax(-1).gather(-1, found[..., None])[..., 0]
        else:
            sure = noise.uniform(shape[:2], positions, torch.float32)
        sure = sure.masked_fill(~positions.valid, -torch.inf)
        confidence = sure.new_full(masked.shape, -torch.inf).scatter_(1, positions.index, sure)
        return confidence, torch.zeros_like(masked, dtype=torch.long).scatter_(1, positions.index, found)


class _Forward:
    """Logits of a canvas at chosen positions: guided if asked for, and from cached keys and values if allowed."""

    def __init__(self, sampler: MDLMSampler, settings: MDLMSamplerConfig, canvas: Tensor, keys: Tensor | None) -> None:
        self.sampler, self.settings, self.canvas, self.keys = sampler, settings, canvas, keys
        #: What guidance hides from its second pass: the prompt, but for the tokens to keep [B, T] bool
        self.given = (canvas != sampler.tokenizer.mask_token_id) & (True if keys is None else keys)
        if settings.cfg_keep_tokens:
            self.given &= ~torch.isin(canvas, torch.tensor(settings.cfg_keep_tokens, device=canvas.device))
        guided = settings.cfg_scale > 0
        self.caches = [CanvasCache(sampler.layers, canvas.shape[1]) for _ in range(1 + guided)]
        self.window: Tensor | None = None  #: positions [B, W] that are computed anew

    def begin(self, block: Block) -> None:
        """The next call computes the whole canvas; later ones, with a cache, the block or all from it on."""
        self.window = None
        self.block = block

    def __call__(self, positions: Tensor) -> Tensor:
        """Logits at `positions` [B, M] → [B, M, V]."""
        if self.settings.cfg_scale <= 0:
            logits = self._logits(self.canvas, positions, self.caches[0])
        else:
            without = self.canvas.masked_fill(self.given, self.sampler.tokenizer.mask_token_id)
            logits, unguided = (
                self._logits(tokens, positions, cache)
                for tokens, cache in zip((self.canvas, without), self.caches, strict=True)
            )
            logits = unguided + (self.settings.cfg_scale + 1) * (logits - unguided)
        if self.settings.cache != "none" and self.window is None:
            self.window = self._window()
        return logits

    def _logits(self, tokens: Tensor, positions: Tensor, cache: CanvasCache) -> Tensor:
        model = self.sampler.model
        if self.settings.cache == "none":
            return model(input_ids=tokens, attention_mask=self.keys, positions=positions).logits
        if self.window is None:
            everywhere = torch.arange(tokens.shape[1], device=tokens.device)[None]
            return model(
                input_ids=tokens, attention_mask=self.keys, position_ids=everywhere, positions=positions, cache=cache
            ).logits
        return model(
            input_ids=tokens.gather(1, self.window),
            attention_mask=self.keys,
            position_ids=self.window,
            positions=(positions - self.window[:, :1]).clamp(0, self.window.shape[1] - 1),
            cache=cache,
        ).logits

    def _window(self) -> Tensor:
        starts, ends = self.block.starts, self.block.ends
        if self.settings.cache == "prefix":
            ends = [start + self.canvas.shape[1] - max(starts) for start in starts]  # the end of each row's answer
        if self.settings.right_shift_logits:
            starts = [start - 1 for start in starts]
        first = torch.tensor(starts, device=self.canvas.device)[:, None]
        return first + torch.arange(ends[0] - starts[0], device=self.canvas.device)
