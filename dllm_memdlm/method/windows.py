"""A prompt as the inner loop reads it: whole (section 3.4), or window after window (ours), which has no longest text.

texts ─► the windows of each ─► one Trajectory a window, all rows side by side ─► ParametricMemory.write_all ─► φ
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..config import MemoryConfig
from . import noise
from .trajectory import Trajectory, build_trajectory


def window_count(length: int, window: int | None) -> int:
    """Count the windows of a text of `length` tokens; even an empty one has one."""
    return 1 if window is None else max(1, math.ceil(length / window))


def windows_of(texts: Sequence[Tensor], window: int | None) -> list[list[Tensor]]:
    """Cut texts into windows of at most `window` tokens: for each place in order, one of each text.

    A text's windows are equally long, but for one token: a short last one would be written on little. A text that has
    fewer than another is empty in the last places.
    """
    counts = [window_count(len(text), window) for text in texts]
    return [
        [text[len(text) * n // count : len(text) * (n + 1) // count] for text, count in zip(texts, counts, strict=True)]
        for n in range(max(counts))
    ]


def window_trajectory(
    rows: Sequence[Tensor], keys: Tensor, config: MemoryConfig, number: int = 0, right_shift_logits: bool = False
) -> Trajectory:
    """Noise one window of each text; the anchor is at `config.anchor_ratio`.

    Args:
        rows: tokens of the window of each text, int64 on the CPU; an empty one has no loss, and leaves φ as it is.
        keys: one noise key a text [B] int64, which its windows' own are made of; those of the first are the texts'.
        config: of the inner loop.
        number: of the window.
        right_shift_logits: whether a token is predicted from the place before it: then the first one is never masked.
    """
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad_sequence([row if len(row) else row.new_zeros(1) for row in rows], batch_first=True)
    own = torch.arange(ids.shape[1]) < lengths[:, None]
    maskable = own.clone()
    maskable[:, 0] &= not right_shift_logits
    if number:
        keys = noise.stream_keys(keys, noise.WINDOWS + number)
    trajectory = prompt_trajectory(ids, maskable, keys, config)
    if not own.all():
        trajectory.attention_mask = own
    return trajectory


def prompt_trajectory(prompt_ids: Tensor, maskable: Tensor, keys: Tensor, config: MemoryConfig) -> Trajectory:
    """Noise a prompt at inference (section 3.4), its anchor at `config.anchor_ratio`.

    prompt_ids [B, L]; maskable [B, L] is true on the prompt's own tokens and false on padding; keys [B].
    """
    level = torch.full((len(prompt_ids),), config.anchor_ratio, device=prompt_ids.device)
    return build_trajectory(prompt_ids, maskable, level, level, keys, config)
