"""Keys and values of a canvas: what a decoder that fills in tokens block by block need not compute again.

    cache = CanvasCache(layers=len(model.layers), length=canvas.shape[1])
    model(input_ids=window, position_ids=positions, attention_mask=mask, cache=cache)

Unlike a cache for left-to-right decoding, positions may be written again: the newest keys and values stand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class CanvasCache:
    """One (keys, values) pair of [B, H_kv, T, d] a layer, made on first use.

    A forward pass writes the positions it computes and attends to the first `visible` positions of the canvas; its
    attention mask says which of them each query may see.
    """

    def __init__(self, layers: int, length: int) -> None:
        self.length = length
        self.visible = length
        self.positions: Tensor  #: of the tokens under way [B, M] int64; the model sets them
        self.layers = [_LayerCache(self) for _ in range(layers)]


class _LayerCache:
    """The part of one layer, with the `update` that transformers' attention calls, and ours too."""

    def __init__(self, canvas: CanvasCache) -> None:
        self.canvas = canvas
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, H, M, d]; all that may be seen [B, H, visible, d].

        What else transformers' attention gives (the layer's number, cosines and sines) differs between releases.
        """
        keys, values = self.keys, self.values
        if keys is None or values is None:
            shape = (*key.shape[:2], self.canvas.length, key.shape[-1])
            keys, values = self.keys, self.values = key.new_zeros(shape), value.new_zeros(shape)
        index = self.canvas.positions[:, None, :, None].expand_as(key)
        keys.scatter_(2, index, key)
        values.scatter_(2, index, value)
        return keys[:, :, : self.canvas.visible], values[:, :, : self.canvas.visible]


def block_causal(positions: Tensor, keys: int, block_size: int) -> Tensor:
    """Who sees whom where blocks of the canvas are causal and tokens within one are not (LLaDA2.1's decoding).

    positions [B, M] of the queries → [B, 1, M, keys] bool.
    """
    blocks = torch.arange(keys, device=positions.device) // block_size
    return (blocks <= (positions // block_size)[..., None])[:, None]
