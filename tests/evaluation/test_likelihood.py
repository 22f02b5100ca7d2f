"""The estimate of a likelihood: unbiased, exactly so where every mask can be listed, and the same in any batch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import MASK, tiny
from saved_models import random_prompts
from torch import nn

from dllm_memdlm.evaluation.likelihood import draw_masks, log_likelihoods, states


def frozen(kind: str) -> nn.Module:
    return tiny(kind, torch.float64).eval().requires_grad_(False)


def estimate(model: nn.Module, prompt: list[int], continuation: list[int], count: int, seed: int = 0, **kw) -> float:
    return sum(log_likelihoods(model, list(states(0, prompt, continuation, count, seed)), MASK, **kw))


def exact(model: nn.Module, prompt: list[int], continuation: list[int], shift: bool = False) -> float:
    """-E_n E_M [ L/n · Σ_{i in M} -log p(y_i | …) ] by brute force: one full forward for every subset M of n tokens.

    Where logits are shifted, those of a token are found at the one before it; the first token has only its own.
    """
    length, total, row = len(continuation), 0.0, torch.tensor(prompt + continuation)
    for mask in map(torch.tensor, list(itertools.product([False, True], repeat=length))[1:]):  # the first is empty
        hidden = torch.cat([torch.zeros(len(prompt), dtype=torch.bool), mask])
        with torch.no_grad():
            log_p = model(input_ids=row.masked_fill(hidden, MASK)[None]).logits[0].log_softmax(-1)
        score = sum(float(log_p[max(i - shift, 0), row[i]]) for i in hidden.nonzero()[:, 0].tolist())
        n = int(mask.sum())
        total += length / n * score / math.comb(length, n) / length
    return total


def test_the_numbers_of_masked_tokens_are_spread_evenly():
    masks, weights = draw_masks(7, 70, seed=3)
    shares = torch.zeros(8, dtype=torch.float64).index_add(0, masks.sum(-1), weights * masks.sum(-1) / 7)
    torch.testing.assert_close(shares[1:], torch.full((7,), 1 / 7, dtype=torch.float64))
    # fewer masks than tokens: each in a stretch of its own, whose start is drawn
    numbers = sorted(draw_masks(100, 10, seed=3)[0].sum(-1).tolist())
    assert all(10 * i < number <= 10 * i + 11 for i, number in enumerate(numbers))
    single = torch.tensor([int(draw_masks(4, 1, seed)[0].sum()) for seed in range(2000)])
    assert (torch.bincount(single, minlength=5)[1:] / 2000).tolist() == pytest.approx([0.25] * 4, abs=0.04)
    masks, weights = draw_masks(2, 1000, seed=0)  # those that are drawn again come once
    by_mask = dict(zip(map(tuple, masks.tolist()), weights.tolist(), strict=True))
    assert by_mask.keys() == {(False, True), (True, False), (True, True)} and len(masks) == 3
    assert by_mask[True, True] == pytest.approx(0.5)  # half of the masks, of weight L/n = 1
    assert by_mask[True, False] + by_mask[False, True] == pytest.approx(1.0)


@pytest.mark.parametrize(("length", "count"), [(1, 1), (1, 50), (5, 1), (3, 128), (40, 7), (300, 128)])
def test_masks_are_never_empty_and_go_by_the_seed(length, count):
    masks, weights = draw_masks(length, count, seed=1)
    assert masks.shape == (len(weights), length) and len(masks) <= count
    assert masks.dtype == torch.bool and weights.dtype == torch.float64
    assert masks.any(-1).all() and len(masks.unique(dim=0)) == len(masks)
    assert (weights * masks.sum(-1)).sum().item() == pytest.approx(length), "so a uniform model gets -L · log V"
    again, other = draw_masks(length, count, seed=1), draw_masks(length, count, seed=2)
    assert torch.equal(masks, again[0]) and torch.equal(weights, again[1])
    assert length <= 3 or not torch.equal(masks, other[0])


@pytest.mark.parametrize(
    ("kind", "shift", "prompt"),
    [("llama", False, []), ("llama", True, []), ("llama", True, [5, 9, 30]), ("llada2", False, [5, 9, 30])],
)
def test_many_masks_give_the_exact_value(kind, shift, prompt):
    model, continuation = frozen(kind), [7, 31, 12, 44]
    value = exact(model, prompt, continuation, shift)
    assert estimate(model, prompt, continuation, 200_000, right_shift_logits=shift) == pytest.approx(value, abs=0.01)
    others = [exact(model, [4, 4, *prompt], continuation, shift), exact(model, prompt, continuation, not shift)]
    assert all(abs(value - other) > 0.02 for other in others), "what is wrong should show"


@pytest.mark.parametrize("kind", ["llada_moe", "llama"])
def test_the_batch_does_not_matter(kind):
    model, ends = frozen(kind), random_prompts(3, 1, 12, 6, seed=1)
    pairs = enumerate(zip(random_prompts(4, 15, 1, 9), ends, strict=True))
    items = [state for number, pair in pairs for state in states(number, *pair, 6, seed=0)]
    alone = [log_likelihoods(model, [item], MASK)[0] for item in items]
    for size in (3, len(items)):
        batches = [items[i : i + size] for i in range(0, len(items), size)]
        together = [value for batch in batches for value in log_likelihoods(model, batch, MASK)]
        assert together == pytest.approx(alone, rel=1e-6)
    assert len({item.length for item in items}) > 2, "the test should see padding"
    assert list(states(0, [5, 6], [], 2, seed=0)) == []
