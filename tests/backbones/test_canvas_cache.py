"""A forward pass over a part of a canvas with the keys and values of the rest, against one over all of it."""

from __future__ import annotations

import pytest
import torch
from conftest import KINDS, tiny
from inputs import BATCH, LENGTH, tokens
from torch import Tensor, nn

from dllm_memdlm.backbones.cache import CanvasCache, block_causal
from dllm_memdlm.backbones.layers import take

SIZE = 3
EVERYWHERE = torch.arange(LENGTH)[None]
#: Of four tokens, at another place in each row; in the last one backwards.
WINDOW = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8], [11, 10, 9, 8]])


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)  # routers compute in float32
    assert expected.std() > 0.1


def wide(kind: str, attention: str = "sdpa") -> nn.Module:
    return tiny(kind, torch.float64, attention=attention).eval()


def before(block: int) -> Tensor:
    """Queries of the blocks before one see their own blocks and those before."""
    return block_causal(EVERYWHERE[:, : block * SIZE], block * SIZE, SIZE)


def test_block_causal_says_who_sees_whom():
    mask = block_causal(torch.tensor([[0, 1, 2, 3], [5, 4, 7, 2]]), 6, 2)
    assert mask.shape == (2, 1, 4, 6) and mask.dtype == torch.bool
    rows = [["110000", "110000", "111100", "111100"], ["111111", "111111", "111111", "111100"]]
    assert [["".join(str(int(x)) for x in query) for query in row[0]] for row in mask.tolist()] == rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_filling_and_reading_a_cache_change_nothing(kind, attention):
    """The window is at another place in each row: keys and values of the rest are those of the full forward."""
    model = wide(kind, attention)
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


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_written_again_stands(kind):
    """Written blocks see only what does not change: so after any number of rewrites the last one counts."""
    model, last = wide(kind), tokens()
    generator = torch.Generator().manual_seed(3)
    cache = CanvasCache(len(model.layers), LENGTH)
    for block in range(LENGTH // SIZE):
        window = EVERYWHERE[:, block * SIZE : (block + 1) * SIZE].expand(BATCH, -1)
        cache.visible = (block + 1) * SIZE
        draft = torch.randint(3, 48, (BATCH, SIZE), generator=generator)
        mask = block_causal(window, cache.visible, SIZE)
        written = [
            model(input_ids=part, position_ids=window, attention_mask=mask, cache=cache).logits
            for part in (draft, last.gather(1, window))
        ]
        whole = last[:, : cache.visible]
        expected = model(input_ids=whole, attention_mask=before(block + 1)).logits[:, -SIZE:]
        close(written[1], expected)
        assert not torch.allclose(written[0], expected, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_at_different_blocks(kind):
    """What lies behind a row's own block, or was never written, is not seen."""
    model, canvas = wide(kind), tokens()
    prefilled = canvas[:, : 2 * SIZE].clone()
    prefilled[:2, SIZE:] = 7  # what a prefill of the longest row writes into the others
    cache = CanvasCache(len(model.layers), LENGTH)
    cache.visible = 2 * SIZE
    where = {"position_ids": EVERYWHERE[:, : 2 * SIZE], "attention_mask": before(2), "cache": cache}
    model(input_ids=prefilled, positions=torch.zeros(BATCH, 1, dtype=torch.long), project=False, **where)
    blocks = torch.tensor([1, 1, 2])
    window = blocks[:, None] * SIZE + torch.arange(SIZE)
    cache.visible = 3 * SIZE
    mask = block_causal(window[:, :1], cache.visible, SIZE)  # all of a block sees the same
    out = model(input_ids=canvas.gather(1, window), position_ids=window, attention_mask=mask, cache=cache).logits
    for row, block in enumerate(blocks.tolist()):
        end = (block + 1) * SIZE
        expected = model(input_ids=canvas[row : row + 1, :end], attention_mask=before(block + 1)).logits
        close(out[row], expected[0, -SIZE:])
