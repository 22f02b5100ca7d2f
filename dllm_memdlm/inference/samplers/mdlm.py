"""Low-confidence remasking (LLaDA, LLaDA-MoE): in every step the most confident tokens are committed.

The same tokens as dllm's `MDLMSampler`, from less work: logits only where a token may be committed, and the last layer
only there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...backbones.cache import CanvasCache
from ...compat.dllm_api import BaseSamplerOutput
from ...config import Count, NotNegative, Probability, knob, require
from ...method.losses import Positions, positions_of
from .base import CanvasSampler, Prompts, RowNoise, SamplerConfig, finished


@dataclass
class MDLMSamplerConfig(SamplerConfig):
    """Settings, with dllm's names and defaults; the last two are ours, and change the tokens."""

    NAME = "mdlm"

    block_size: Count | None = knob(128, "blocks are finished one after the other; none is one block")
    steps: Count = knob(128, "of all blocks together")
    remasking: Literal["low_confidence", "random"] = knob("low_confidence", "which tokens are committed last")
    stochastic_transfer: bool = knob(False, "draw how many tokens a step commits")
    cfg_scale: NotNegative = knob(0.0, "classifier-free guidance; costs a second forward pass")
    cfg_keep_tokens: list[int] | None = knob(None, "tokens of the prompt that guidance does not hide")
    suppress_tokens: list[int] | None = knob(None, "never chosen")
    begin_suppress_tokens: list[int] | None = knob(None, "of no confidence, so committed last")
    right_shift_logits: bool = knob(False, "logits at position i predict token i + 1")
    cache: Literal["none", "prefix", "dual"] = knob(
        "none",
        "keep keys and values of what stands before the current block (prefix), or of all but it (dual), from the "
        "block's first step on: an approximation, as with bidirectional attention they change in every step",
    )
    threshold: Probability | None = knob(
        None, "commit every token of more confidence, and at least one, whatever steps says"
    )


#: The part of each row that is filled in now: where it starts and ends.
Block = list[tuple[int, int]]


class Denoiser:
    """A batch under way: its canvas [B, T], which is changed, and whose rows end at `ends`."""

    def __init__(
        self, sampler: MDLMSampler, settings: MDLMSamplerConfig, noise: RowNoise, canvas: Tensor, ends: list[int]
    ) -> None:
        self.model, self.scheduler, self.mask = sampler.model, sampler.scheduler, sampler.tokenizer.mask_token_id
        self.settings, self.noise, self.canvas, self.ends = settings, noise, canvas, ends
        self.place = torch.arange(canvas.shape[1], device=canvas.device)
        ragged = len(set(ends)) > 1
        self.keys = self.place < torch.tensor(ends, device=canvas.device)[:, None] if ragged else None
        #: What guidance hides from its second pass: the prompt, but for the tokens to keep [B, T] bool
        self.given = (canvas != self.mask) & (True if self.keys is None else self.keys)
        if settings.cfg_keep_tokens:
            self.given &= ~torch.isin(canvas, torch.tensor(settings.cfg_keep_tokens, device=canvas.device))
        self.caches = [CanvasCache(sampler.layers, canvas.shape[1]) for _ in range(1 + (settings.cfg_scale > 0))]
        self.window: Tensor | None = None  #: positions [B, W] that are computed anew; none is all

    @torch.no_grad()
    def fill(self, first: list[int], alone: bool) -> Iterator[Tensor]:
        """Fill in each row from its `first` position on, block after block.

        Yields the canvas before the first step and after each one. Unless `alone`, a step may also fill masks that
        earlier blocks have left, as dllm's do.
        """
        yield self.canvas
        rows = list(zip(first, self.ends, strict=True))
        longest = max(end - start for start, end in rows)
        size = self.settings.block_size or longest
        blocks: list[Block] = [
            [(min(start + offset, end), min(start + offset + size, end)) for start, end in rows]
            for offset in range(0, longest, size)
        ]
        for block in blocks:
            open_to = [(start if alone else low, end) for low, (start, end) in zip(first, block, strict=True)]
            low, high = torch.tensor(open_to, device=self.canvas.device).T[..., None]
            self.window = None
            for counts in self._plan(block, math.ceil(self.settings.steps / len(blocks))):
                masked = (self.canvas == self.mask) & (self.place >= low) & (self.place < high)
                if counts is None and not masked.any():
                    break
                self._step(masked, counts)
                if self.settings.cache != "none" and self.window is None:
                    self.window = self._window_of(block)
                yield self.canvas

    def _plan(self, block: Block, steps: int) -> list[tuple[int, ...] | None]:
        """Return for each step of a block how many tokens each row commits; none where the threshold decides."""
        if self.settings.threshold is not None:
            return [None] * max(end - start for start, end in block)
        counts: list[list[int]] = []
        for row, (start, end) in enumerate(block):
            left = int((self.canvas[row, start:end] == self.mask).sum())
            counts.append([])
            for step in range(steps, 0, -1):
                if left == 0:
                    break
                reveal = 1 - self.scheduler.reverse_mask_prob(s=(step - 1) / steps, t=step / steps)
                drawn = self.settings.stochastic_transfer
                count = min(left, self._binomial(row, left, reveal) if drawn else round(left * reveal))
                left -= count
                counts[-1] += [count] * (count > 0)  # steps without any are left out
        return list(itertools.zip_longest(*counts, fillvalue=0))

    def _binomial(self, row: int, count: int, probability: float) -> int:
        """Draw how many of `count` events happen."""
        n, p = torch.tensor([count, probability], dtype=torch.float64, device=self.canvas.device)
        return int(torch.binomial(n, p, generator=self.noise.generators[row]))

    def _step(self, masked: Tensor, counts: tuple[int, ...] | None) -> None:
        """Commit tokens at masked positions [B, T]: so many in each row, or all that are sure enough, at least one."""
        if counts is not None:
            masked = masked & (torch.tensor(counts, device=masked.device)[:, None] > 0)
        confidence, tokens = self._propose(masked)
        if counts is None:
            assert self.settings.threshold is not None
            sure = (confidence > self.settings.threshold).sum(1)
            counts = tuple(sure.clamp(min=1).where(masked.any(1), 0).tolist())
        for row, (count, end) in enumerate(zip(counts, self.ends, strict=True)):
            # As many entries as the row alone would have, so that ties fall as they do without a batch.
            chosen = self._surest(row, confidence[row, :end], count)
            self.canvas[row, chosen] = tokens[row, chosen]

    def _surest(self, row: int, confidence: Tensor, count: int) -> Tensor:
        """Return the positions at which a row commits so many tokens; the confidence [T] is -inf where it cannot."""
        return confidence.topk(count).indices

    def _propose(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Return a confidence, -inf where nothing is masked, and the token that the model proposes. Both [B, T]."""
        settings, positions = self.settings, positions_of(masked)
        logits = self._logits(positions.logit_index(settings.right_shift_logits))
        if settings.threshold is not None:  # goes on until no mask is left
            logits[..., self.mask] = -torch.inf
        logits[..., settings.suppress_tokens or []] = -torch.inf
        sure, found = self._choose(logits, positions)
        sure = sure.masked_fill(~positions.valid, -torch.inf)
        confidence = sure.new_full(masked.shape, -torch.inf).scatter_(1, positions.index, sure)
        return confidence, torch.zeros_like(masked, dtype=torch.long).scatter_(1, positions.index, found)

    def _choose(self, logits: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Return how sure a token is, and the token, at each of the positions. logits [B, M, V] → [B, M] each."""
        settings, shape = self.settings, (*self.canvas.shape, logits.shape[-1])
        if settings.temperature > 0:
            # Gumbel's trick, in float64 as in dllm: in less, small probabilities are cut off.
            uniform = self.noise.uniform(shape, positions, torch.float64)
            found = (logits.double().exp() / (-uniform.log()) ** settings.temperature).argmax(-1)
        else:
            found = logits.argmax(-1)
        if settings.remasking == "random":
            return self.noise.uniform(shape[:2], positions, torch.float32), found
        logits[..., settings.begin_suppress_tokens or []] = -torch.inf
        return logits.softmax(-1).gather(-1, found[..., None])[..., 0], found

    def _logits(self, positions: Tensor) -> Tensor:
        """Return the logits at `positions` [B, M], guided if asked for. → [B, M, V]."""
        logits = self._forward(self.canvas, positions, self.caches[0])
        if self.settings.cfg_scale <= 0:
            return logits
        unguided = self._forward(self.canvas.masked_fill(self.given, self.mask), positions, self.caches[1])
        return unguided + (self.settings.cfg_scale + 1) * (logits - unguided)

    def _forward(self, tokens: Tensor, positions: Tensor, cache: CanvasCache) -> Tensor:
        if self.settings.cache == "none":
            return self.model(input_ids=tokens, attention_mask=self.keys, positions=positions).logits
        window = self.place.expand_as(tokens) if self.window is None else self.window
        return self.model(
            input_ids=tokens.gather(1, window),
            attention_mask=self.keys,
            position_ids=window,
            positions=(positions - window[:, :1]).clamp(0, window.shape[1] - 1),
            cache=cache,
        ).logits

    def _window_of(self, block: Block) -> Tensor:
        """Return what later steps of a block compute anew, with a cache: the block, or all from it on. [B, W]."""
        starts, ends = zip(*block, strict=True)
        width = ends[0] - starts[0] if self.settings.cache == "dual" else self.canvas.shape[1] - max(starts)
        shift = int(self.settings.right_shift_logits)
        place = torch.arange(-shift, width, device=self.canvas.device)
        return torch.tensor(starts, device=self.canvas.device)[:, None] + place


@dataclass
class MDLMSampler(CanvasSampler):
    """dllm's `MDLMSampler`, but for mask tokens in a prompt, which stay. See `CanvasSampler`."""

    CONFIG = MDLMSamplerConfig
    DENOISER: ClassVar[type[Denoiser]] = Denoiser

    def _decode(self, prompts: list[Tensor], settings: MDLMSamplerConfig, noise: RowNoise) -> Iterator[Tensor]:
        lengths = [len(prompt) for prompt in prompts]
        new = settings.new_tokens(max(lengths))
        ends = [length + new for length in lengths]
        approximate = settings.cache != "none" or settings.threshold is not None
        return self.DENOISER(self, settings, noise, self._canvas(prompts, ends), ends).fill(lengths, approximate)

    def infill(
        self, inputs: Prompts, config: Any = None, seeds: Sequence[int] | None = None, **kwargs: Any
    ) -> BaseSamplerOutput | Tensor:
        """Fill in the mask tokens of the inputs where they stand; blocks are counted from the start of a row."""
        rows, settings, noise = self._begin(inputs, config, seeds, kwargs)
        require("sampler", settings, "cache", settings.cache == "none", "none when filling in")
        ends = [len(row) for row in rows]
        denoiser = self.DENOISER(self, settings, noise, self._canvas(rows, ends), ends)
        return finished(denoiser.fill([0] * len(rows), alone=True), settings)
