"""Dream's decoding: in every step the surest tokens are committed, or by `origin` tokens at random positions.

The same tokens as dllm's `DreamSampler`; `origin`, which that one names and does not have, as Dream's published code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...config import Count, Natural, NotNegative, Probability, ShareBelowOne, knob, require
from ...method.losses import Positions, positions_of
from .base import SamplerConfig, choice
from .llada21 import keep_likeliest
from .mdlm import Block, Denoiser, MDLMSampler


@dataclass
class DreamSamplerConfig(SamplerConfig):
    """Settings, with dllm's names and defaults; the last one is ours."""

    NAME = "dream"
    block_size = threshold = cfg_keep_tokens = None  # no settings here: one block, and none of MDLM's approximations
    cache = "none"

    max_new_tokens: Count | None = knob(20, "of an answer")
    temperature: NotNegative = knob(1.0, "0 takes the likeliest token")
    steps: Count = knob(512, "of an answer")
    alg: Literal["origin", "maskgit_plus", "topk_margin", "entropy"] = knob(
        "origin", "which tokens a step commits: any; the likeliest; those far ahead of the next; those of least entropy"
    )
    alg_temp: NotNegative | None = knob(0.0, "draw the positions, by confidence over this; 0 and none take the surest")
    eps: ShareBelowOne = knob(1e-3, "time of the last step of `origin`")
    top_p: Probability | None = knob(1.0, "keep the likeliest tokens that hold this probability")
    top_k: Natural | None = knob(50, "keep this many of the likeliest tokens")
    stochastic_transfer: bool = knob(False, "draw how many tokens a step commits")
    right_shift_logits: bool = knob(True, "logits at position i predict token i + 1")
    cfg_scale: NotNegative = knob(0.0, "classifier-free guidance; costs a second forward pass")
    suppress_tokens: list[int] | None = knob(None, "never chosen")

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = not self.alg_temp or self.alg != "origin"
        require("sampler", self, "alg_temp", asked, "0 with alg=origin, which asks for no confidence")


#: How sure a proposal is: (probabilities [B, M, V], those of the proposed tokens [B, M]) → [B, M].
CONFIDENCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "origin": lambda probabilities, chosen: chosen,  # not asked for
    "maskgit_plus": lambda probabilities, chosen: chosen,
    "topk_margin": lambda probabilities, chosen: -probabilities.topk(2).values.diff(dim=-1)[..., 0],
    "entropy": lambda probabilities, chosen: (probabilities * (probabilities + 1e-10).log()).sum(-1),
}


class _DreamDenoiser(Denoiser):
    settings: DreamSamplerConfig

    def _plan(self, block: Block, steps: int) -> list[Any]:
        """Return the steps: of `origin` the probability with which each commits a masked position."""
        if self.settings.alg != "origin":
            return super()._plan(block, steps)
        times = torch.linspace(1, self.settings.eps, steps + 1).tolist()
        shares = [1 - self.scheduler.reverse_mask_prob(s=s, t=t) for t, s in itertools.pairwise(times)]
        return [*shares[:-1], 1.0]

    def _step(self, masked: Tensor, counts: Any) -> None:
        if self.settings.alg != "origin":
            super()._step(masked, counts)
            return
        positions = positions_of(masked)
        uniform = self.noise.of_valid(positions.index, positions.valid, _uniform)
        chosen = torch.zeros_like(masked).scatter_(1, positions.index, positions.valid & (uniform < counts))
        if chosen.any():
            _, tokens = self._propose(chosen)
            self.canvas[chosen] = tokens[chosen]

    def _surest(self, row: int, confidence: Tensor, count: int) -> Tensor:
        if self.settings.alg_temp:
            # Without replacement, each as probable as exp(confidence / alg_temp); as torch.multinomial draws, in logs.
            drawn = torch.empty_like(confidence).exponential_(generator=self.noise.generators[row])
            confidence = confidence / self.settings.alg_temp - drawn.log()
        return super()._surest(row, confidence, count)

    def _choose(self, logits: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        settings = self.settings
        if settings.temperature > 0:
            logits = logits / settings.temperature
        for top_k, top_p in ((None, settings.top_p), (settings.top_k, None)):  # in this order, as dllm
            logits = keep_likeliest(logits, top_k, top_p)
        probabilities = logits.softmax(-1)
        likeliest, found = probabilities.max(-1)
        if settings.temperature > 0:
            found = self.noise.of_valid(probabilities, positions.valid, choice)
            likeliest = probabilities.gather(-1, found[..., None])[..., 0]
        return CONFIDENCE[settings.alg](probabilities, likeliest), found


def _uniform(positions: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(len(positions), generator=generator, device=positions.device)


@dataclass
class DreamSampler(MDLMSampler):
    """dllm's `DreamSampler`, but for mask tokens in a prompt, which stay. See `CanvasSampler`."""

    CONFIG = DreamSamplerConfig
    DENOISER = _DreamDenoiser
