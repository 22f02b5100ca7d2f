"""Dream's decoding written plainly, to compare with: one prompt, full forwards, loops over positions.

Random numbers are drawn for the masked positions alone, as dllm and Dream's own code draw them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from naive_samplers import Canvas, Draws, full_logits, linear, reveal_counts
from torch import nn


class NaiveDream:
    """Fills in one canvas. Settings are those of `DreamSamplerConfig`."""

    def __init__(self, model: nn.Module, settings: Any, mask: int, draws: Draws) -> None:
        self.model, self.settings, self.mask, self.draws = model, settings, mask, draws

    def sample(self, prompt: Canvas, new: int) -> list[Canvas]:
        """The canvas before the first step and after each one."""
        return self.fill(prompt + [self.mask] * new, len(prompt))

    def infill(self, canvas: Canvas, longest: int) -> list[Canvas]:
        """The same for the masks of a canvas; how long a batch is does not matter."""
        return self.fill(canvas, 0)

    def fill(self, canvas: Canvas, first: int) -> list[Canvas]:
        settings, canvas = self.settings, list(canvas)
        history, shown = [list(canvas)], [i for i, token in enumerate(canvas) if token != self.mask]
        masked = [i for i in range(first, len(canvas)) if canvas[i] == self.mask]
        if settings.alg == "origin":
            times = [1 + (settings.eps - 1) * step / settings.steps for step in range(settings.steps + 1)]
            plan = [1 - times[step + 1] / times[step] for step in range(settings.steps - 1)] + [1.0]
        else:
            drawn = self.draws if settings.stochastic_transfer else None
            plan = reveal_counts(len(masked), settings.steps, linear, drawn)
        for share in plan:
            masked = [i for i in range(first, len(canvas)) if canvas[i] == self.mask]
            if settings.alg == "origin":
                uniform = torch.rand(len(masked), generator=self.draws.generator).tolist()
                masked = [i for i, u in zip(masked, uniform, strict=True) if u < share]
            found = self.propose(canvas, masked, shown) if masked else {}
            for i in masked if settings.alg == "origin" else self.surest(found, len(canvas), share):
                canvas[i] = found[i][1]
            history.append(list(canvas))
        return history

    def surest(self, found: dict[int, tuple[float, int]], length: int, count: int) -> list[int]:
        if not self.settings.alg_temp:
            return sorted(found, key=lambda i: found[i][0], reverse=True)[:count]
        confidence = torch.full((length,), -math.inf, dtype=torch.float64)
        for i, (value, _) in found.items():
            confidence[i] = value / self.settings.alg_temp
        return torch.multinomial(confidence.softmax(0), count, generator=self.draws.generator).tolist()

    def propose(self, canvas: Canvas, positions: list[int], shown: list[int]) -> dict[int, tuple[float, int]]:
        """Confidence and token of each position."""
        settings = self.settings
        logits = full_logits(self.model, canvas)
        if settings.cfg_scale > 0:
            hidden = [self.mask if i in shown else token for i, token in enumerate(canvas)]
            unguided = full_logits(self.model, hidden)
            logits = unguided + (settings.cfg_scale + 1) * (logits - unguided)
        rows = []
        for position in positions:
            row = logits[max(position - 1, 0) if settings.right_shift_logits else position].tolist()
            for token in settings.suppress_tokens or []:
                row[token] = -math.inf
            row = [value / (settings.temperature or 1) for value in row]
            rows.append(torch.tensor(kept(row, settings.top_p, settings.top_k), dtype=torch.float64).softmax(0))
        if settings.temperature > 0:
            tokens = self.draws.token(torch.stack(rows))
        else:
            tokens = [int(row.argmax()) for row in rows]
        return {i: (sure(settings.alg, row, t), t) for i, row, t in zip(positions, rows, tokens, strict=True)}


def sure(alg: str, probabilities: torch.Tensor, token: int) -> float:
    """How sure an algorithm is of a position."""
    if alg == "topk_margin":
        first, second = sorted(probabilities.tolist(), reverse=True)[:2]
        return first - second
    if alg == "entropy":
        return sum(p * math.log(p + 1e-10) for p in probabilities.tolist())
    return float(probabilities[token])


def kept(logits: list[float], top_p: float | None, top_k: int | None) -> list[float]:
    """The logits, -inf but for the likeliest tokens: first those that hold `top_p`, of which then `top_k`."""
    order = sorted(range(len(logits)), key=lambda token: logits[token], reverse=True)
    total, share, nucleus = sum(math.exp(logit) for logit in logits), 0.0, []
    for token in order:
        if top_p is None or top_p >= 1 or share <= top_p:  # the one that crosses the limit stays
            nucleus.append(token)
        share += math.exp(logits[token]) / total
    chosen = nucleus[: top_k or None]
    return [logit if token in chosen else -math.inf for token, logit in enumerate(logits)]
