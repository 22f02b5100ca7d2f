"""How many tokens the states of a trajectory hide, and that they are drawn uniformly."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from trajectories import SCALES, positions, subset

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method import noise
from dllm_memdlm.method.trajectory import (
    Trajectory,
    build_trajectory,
    masked_ratio,
    pre_anchor_count,
    prompt_trajectory,
    reveal_counts,
    sample_anchor,
    smallest,
)


def build(samples: int, length: int, level: float, config: MemoryConfig, seed: int) -> Trajectory:
    """A trajectory of samples all of whose tokens are maskable."""
    maskable, t = torch.ones(samples, length, dtype=torch.bool), torch.full((samples,), level)
    keys = noise.example_keys(seed, 0, torch.arange(samples))
    return build_trajectory(torch.zeros(samples, length).long(), maskable, t, t, keys, config)


# === counts ===


@pytest.mark.parametrize("scale", (1.0, *SCALES))
def test_pre_anchor_count_is_exact(scale):
    pairs = [(masked, total) for total in range(61) for masked in range(total + 1)]
    pairs += [(masked, 4096) for masked in range(0, 4097, 7)]
    place = torch.arange(4096)
    for start in range(0, len(pairs), 500):
        masked, total = torch.tensor(pairs[start : start + 500]).T
        count = pre_anchor_count(place < masked[:, None], place < total[:, None], scale).tolist()
        ratios = [Fraction(m, max(n, 1)) for m, n in pairs[start : start + 500]]
        starts = [min(1, max(Fraction(scale) * r, r)) for r in ratios]
        assert count == [math.floor(n * r) for n, r in zip(total.tolist(), starts, strict=True)]


def test_reveal_counts_are_equal_shares():
    assert reveal_counts(torch.tensor([7]), 4).tolist() == [[7, 4, 2, 0]]
    assert reveal_counts(torch.tensor([7]), 3).tolist() == [[7, 3, 0]]
    assert reveal_counts(torch.tensor([7]), 1).tolist() == [[0]]
    starts = torch.tensor([*range(60), 1000, 4095])
    for steps in range(2, 6):
        counts = reveal_counts(starts, steps)
        shares = counts[:, :-1] - counts[:, 1:]
        assert torch.equal(counts[:, 0], starts) and not counts[:, -1].any()
        assert (shares.amax(1) - shares.amin(1) <= 1).all() and (shares[:, :-1] >= shares[:, 1:]).all()


def test_smallest_against_sorting():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 5, (30, 12), generator=generator) / 4  # with ties, which go to the left
    among = torch.rand(30, 12, generator=generator) < 0.6
    counts = torch.randint(0, 13, (30, 3), generator=generator)
    marked = smallest(values, among, counts)
    for i in range(30):
        order = [j for _, j in sorted((values[i, j].item(), j) for j in positions(among[i]))]
        assert [positions(mask) for mask in marked[i]] == [set(order[:count]) for count in counts[i]]


def test_masked_ratio():
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    maskable = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    assert masked_ratio(mask, maskable).tolist() == [0.25, 1.0, 0.0]


# === randomness ===


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_anchor_is_masked_with_the_probability_that_is_given(p):
    keys = noise.example_keys(0, 0, torch.arange(2000))
    anchor = sample_anchor(torch.ones(2000, 50, dtype=torch.bool), torch.full((2000,), p), keys).double()
    assert abs(anchor.mean().item() - p) < 4 * math.sqrt(p * (1 - p) / 1e5)
    assert (anchor.mean(0) - p).abs().max() < 4.5 * math.sqrt(p * (1 - p) / 2000)


def test_reveals_are_drawn_uniformly():
    """Of 10 tokens with m in the anchor, each other one is hidden as often: first all extra ones, then half of them."""
    built = build(20_000, 10, 0.4, MemoryConfig(steps=3), seed=1)
    for masked, extra in ((2, 1), (4, 2), (6, 3)):
        rows = built.anchor_mask.sum(-1) == masked
        free = (~built.anchor_mask)[rows].sum(0)
        for state, share in ((0, extra), (1, extra // 2)):
            hidden = (built.inner_masks[:, state] & ~built.anchor_mask)[rows]
            assert (hidden.sum(-1) == share).all() and rows.sum() > 1000
            expected = share / (10 - masked)
            deviation = math.sqrt(expected * (1 - expected) / int(free.min()))
            assert (hidden.sum(0) / free - expected).abs().max() <= 4.5 * deviation


def test_inconsistent_ignores_the_anchor():
    config = MemoryConfig(strategy="inconsistent")
    built = build(4000, 25, 0.5, config, seed=3)
    anchor = built.anchor_mask.double()
    for k, level in ((0, 0.8), (1, 0.2)):
        state = built.inner_masks[:, k].double()
        assert abs(state.mean().item() - level) < 0.005
        joint = (state * anchor).mean() - state.mean() * anchor.mean()
        assert joint.abs() < 4.5 * 0.25 / math.sqrt(1e5)
    assert torch.equal(build(4000, 25, 0.75, config, seed=3).inner_masks, built.inner_masks)


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_prompt_trajectory(ratio):
    samples, length = 2000, 60
    maskable = torch.arange(length) >= torch.arange(samples)[:, None] % 20  # left padding
    keys = noise.example_keys(4, 0, torch.arange(samples))
    built = prompt_trajectory(torch.full((samples, length), 5), maskable, keys, MemoryConfig(anchor_ratio=ratio))
    count = int(maskable.sum())
    assert abs(int(built.anchor_mask.sum()) / count - ratio) < 4 * math.sqrt(ratio * (1 - ratio) / count)
    assert torch.equal(built.noise_level, torch.full((samples,), ratio))
    assert subset(built.inner_masks, maskable[:, None]) and torch.equal(built.inner_masks[:, 1], built.anchor_mask)
    expected = (built.anchor_mask.sum(-1) * 3 // 2).minimum(maskable.sum(-1))
    assert torch.equal(built.inner_masks[:, 0].sum(-1), expected)
