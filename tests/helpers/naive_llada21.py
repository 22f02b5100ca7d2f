"""LLaDA2.1's block diffusion with editing, written plainly: one row at a time, a whole forward pass a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from naive_samplers import Canvas, Draws, full_logits
from torch import Tensor, nn


def block_causal(length: int, size: int) -> Tensor:
    """Who sees whom: [length, length] bool."""
    return torch.tensor([[key // size <= query // size for key in range(length)] for query in range(length)])


def likeliest(logits: list[float], top_k: int | None, top_p: float | None) -> list[float]:
    """The logits, -inf but for the likeliest tokens."""
    order = sorted(range(len(logits)), key=lambda token: logits[token], reverse=True)[: top_k or None]
    total = sum(math.exp(logits[token]) for token in order)
    kept, share = [], 0.0
    for token in order:
        if share <= (top_p or math.inf):  # the one that crosses the limit stays
            kept.append(token)
        share += math.exp(logits[token]) / total
    return [logit if token in kept else -math.inf for token, logit in enumerate(logits)]


def block_diffusion(
    model: nn.Module, prompt: Canvas, settings: Any, mask: int, eos: int, draws: Draws, limit: int = 1000
) -> list[Canvas]:
    """LLaDA2.1's decoding of one prompt: the canvas before the first step and after each one, at most `limit` steps."""
    size, edits_above = settings.block_size, settings.editing_threshold or math.inf
    length = len(prompt) + settings.max_new_tokens if settings.max_new_tokens else settings.max_length
    blocks = math.ceil(length / size)
    canvas = prompt + [mask] * (blocks * size - len(prompt))
    history = [list(canvas)]
    for block in range(len(prompt) // size, blocks):
        start, end = block * size, (block + 1) * size
        visible = block_causal(end, size)
        edits_left = settings.max_post_steps if edits_above < math.inf else 0
        steps = min(settings.block_steps or 0, length - len(prompt))
        shares = [size // steps + (step < size % steps) for step in range(steps)]
        while True:
            masked = [i for i in range(max(start, len(prompt)), end) if canvas[i] == mask]
            if not masked:
                if edits_left == 0:
                    break
                edits_left -= 1
            found = predictions(full_logits(model, canvas[:end], visible)[start:], settings, draws)
            found = {start + i: pair for i, pair in enumerate(found)}
            commits = [i for i in masked if found[i][0] > settings.threshold]
            least = max(settings.num_to_transfer, shares.pop(0) if shares else 0)
            if len(commits) < least:
                commits = sorted(masked, key=lambda i: found[i][0], reverse=True)[:least]
            placed = [i for i in range(max(start, len(prompt)), end) if i not in masked]
            edits = [i for i in placed if found[i][1] != canvas[i] and found[i][0] > edits_above]
            for i in commits + edits:
                canvas[i] = found[i][1]
            history.append(list(canvas))
            assert len(history) <= limit, "no end"
            if not masked and not edits:
                break
        answer = canvas[len(prompt) : end]
        if settings.eos_early_stop and eos in answer and mask not in answer:
            break
    return history


def predictions(logits: Tensor, settings: Any, draws: Draws) -> list[tuple[float, int]]:
    """Confidence and token of every position. logits [M, V]."""
    if settings.temperature > 0:
        rows = [
            likeliest(row, settings.top_k, settings.top_p) for row in (logits.double() / settings.temperature).tolist()
        ]
        logits = torch.tensor(rows, dtype=logits.dtype)
    probabilities = logits.softmax(-1)
    tokens = draws.token(probabilities) if settings.temperature > 0 else probabilities.argmax(-1).tolist()
    return [(float(row[token]), token) for row, token in zip(probabilities, tokens, strict=True)]
