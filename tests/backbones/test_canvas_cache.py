"""A forward pass over a part of a canvas with the keys and values of the rest, against one over all of it."""

from __future__ import annotations

import pytest
import torch
from conftest import ALL_KINDS, tiny
from inputs import BATCH, LENGTH, tokens
from torch import Tensor

from dllm_memdlm.backbones.cache import CanvasCache
from dllm_memdlm.backbones.layers import take

EVERYWHERE = torch.arange(LENGTH)[None]
#: Of four tokens, at another place in each row; in the last one backwards.
WINDOW = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8], [11, 10, 9, 8]])


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)  # routers compute in float32
    assert expected.std() > 0.1


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_filling_and_reading_a_cache_change_nothing(kind, attention):
    """The window is at another place in each row: keys and values of the rest are those of the full forward."""
    model = tiny(kind, torch.float64, attention=attention).eval()
    expected = model(input_ids=tokens()).logits
    for positions in (None, WINDOW):
        cache = CanvasCache(len(model.layers), LENGTH)
        out = model(input_ids=tokens(), position_ids=EVERYWHERE, cache=cache, positions=positions).logits
        close(out, expected if positions is None else take(expected, positions))
    hidden = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    hidden[1, 7:] = False
    masked = CanvasCache(len(model.layers), LENGTH)
    out = model(input_ids=tokens(), position_ids=EVERYWHERE, attention_mask=hidden, cache=masked).logits
    close(out, model(input_ids=tokens(), attention_mask=hidden).logits)
    part = {"input_ids": tokens().gather(1, WINDOW), "position_ids": WINDOW, "cache": cache}
    close(model(**part).logits, take(expected, WINDOW))
    asked = torch.tensor([[3, 0], [1, 1], [2, 3]])  # places within the window
    close(model(**part, positions=asked).logits, take(expected, WINDOW.gather(1, asked)))
