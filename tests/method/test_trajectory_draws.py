"""How many tokens the states of a trajectory hide, and that they are drawn uniformly."""

from __future__ import annotations

import math

import pytest
import torch
from trajectories import (
    SCALES,
    build,
    make_batch,
    naive_hidden_counts,
    naive_pre_anchor_count,
    positions,
    subset,
)

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method import noise
from dllm_memdlm.method.trajectory import (
    build_trajectory,
    masked_ratio,
    pre_anchor_count,
    prompt_trajectory,
    reveal_counts,
    sample_anchor,
    smallest,
)

# --- counts ---


@pytest.mark.parametrize("scale", SCALES)
def test_pre_anchor_count_is_exact(scale):
    pairs = [(masked, total) for total in range(61) for masked in range(total + 1)]
    pairs += [(masked, 4096) for masked in range(0, 4097, 7)]
    length = 4096
    place = torch.arange(length)
    for start in range(0, len(pairs), 500):
        part = pairs[start : start + 500]
        masked, total = torch.tensor(part).T
        anchor, maskable = place < masked[:, None], place < total[:, None]
        expected = [naive_pre_anchor_count(m, n, scale) for m, n in part]
        assert pre_anchor_count(anchor, maskable, scale).tolist() == expected


def test_pre_anchor_is_the_anchor_at_scale_one():
    built = build(MemoryConfig(pre_anchor_scale=1.0))
    assert torch.equal(built.inner_masks[:, 0], built.anchor_mask)


@pytest.mark.parametrize("steps", range(1, 6))
def test_reveal_counts_are_equal_shares(steps):
    starts = [*range(60), 1000, 4095]
    counts = reveal_counts(torch.tensor(starts), steps)
    assert counts.tolist() == [naive_hidden_counts(start if steps > 1 else 0, steps) for start in starts]
    assert (counts[:, -1] == 0).all()
    if steps > 1:
        shares = counts[:, :-1] - counts[:, 1:]
        assert (shares.amax(1) - shares.amin(1) <= 1).all()


def test_reveal_counts_by_hand():
    assert reveal_counts(torch.tensor([7]), 4).tolist() == [[7, 4, 2, 0]]
    assert reveal_counts(torch.tensor([7]), 3).tolist() == [[7, 3, 0]]
    assert reveal_counts(torch.tensor([7]), 2).tolist() == [[7, 0]]


def test_smallest_against_sorting():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 5, (30, 12), generator=generator) / 4  # with ties, which go to the left
    among = torch.rand(30, 12, generator=generator) < 0.6
    counts = torch.randint(0, 13, (30, 3), generator=generator)
    marked = smallest(values, among, counts)
    for i in range(30):
        order = [j for _, j in sorted((values[i, j].item(), j) for j in positions(among[i]))]
        for k in range(3):
            assert positions(marked[i, k]) == set(order[: counts[i, k]])


def test_masked_ratio():
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    maskable = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    assert masked_ratio(mask, maskable).tolist() == [0.25, 1.0, 0.0]


def test_ratios_are_those_of_each_state_and_not_t():
    input_ids, maskable, t, keys = make_batch()
    built = build_trajectory(input_ids, maskable, t, t, keys, MemoryConfig(steps=3))
    for i in range(len(t)):
        total = int(maskable[i].sum())
        for k in range(3):
            ratio = int(built.inner_masks[i, k].sum()) / total if total else 0.0
            assert built.inner_ratios[i, k].item() == pytest.approx(ratio, abs=1e-7)
    assert (built.inner_ratios[:, -1] - t).abs().max() > 0.01
    alone = build_trajectory(input_ids, maskable, t, t, keys, MemoryConfig(strategy="anchor_only"))
    assert torch.equal(alone.inner_ratios[:, 0], t)


# --- randomness ---


def test_anchor_is_masked_with_the_probability_that_is_given():
    keys = noise.example_keys(0, 0, torch.arange(2000))
    maskable = torch.ones(2000, 50, dtype=torch.bool)
    for p in (0.1, 0.5, 0.9):
        anchor = sample_anchor(maskable, torch.full((2000,), p), keys)
        assert abs(anchor.double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / 1e5)
        per_position = anchor.double().mean(0)
        assert (per_position - p).abs().max() < 4.5 * math.sqrt(p * (1 - p) / 2000)


@pytest.mark.parametrize("strategy", ["anchor_consistent", "pre_anchor_only"])
def test_extra_tokens_are_drawn_uniformly(strategy):
    samples, length = 20_000, 12
    maskable = torch.arange(length).expand(samples, length) >= 2
    p = torch.full((samples,), 0.4)
    keys = noise.example_keys(1, 0, torch.arange(samples))
    built = build_trajectory(torch.zeros(samples, length).long(), maskable, p, p, keys, MemoryConfig(strategy=strategy))
    extra = built.inner_masks[:, 0] & ~built.anchor_mask
    anchors, totals = built.anchor_mask.sum(-1), maskable.sum(-1)
    for masked in (2, 4, 6):
        rows = anchors == masked
        free = (~built.anchor_mask & maskable)[rows].sum(0)[2:]
        share = naive_pre_anchor_count(masked, 10, 1.5) - masked
        expected = share / (int(totals[0]) - masked)
        frequency = extra[rows].sum(0)[2:] / free
        deviation = math.sqrt(expected * (1 - expected) / int(free.min()))
        assert rows.sum() > 1000
        assert (frequency - expected).abs().max() < 4.5 * deviation


def test_intermediate_reveals_are_drawn_uniformly():
    samples, length = 20_000, 8
    maskable = torch.ones(samples, length, dtype=torch.bool)
    p = torch.full((samples,), 0.5)
    keys = noise.example_keys(2, 0, torch.arange(samples))
    built = build_trajectory(
        torch.zeros(samples, length).long(), maskable, p, p, keys, MemoryConfig(steps=3, pre_anchor_scale=2.0)
    )
    rows = built.anchor_mask.sum(-1) == 4  # all masked first, then 4 extra tokens in two shares of two
    assert (built.inner_masks[rows].sum(-1) == torch.tensor([8, 6, 4, 0])).all()
    first = (built.inner_masks[:, 0] & ~built.inner_masks[:, 1])[rows].sum(0)
    frequency = first / (~built.anchor_mask[rows]).sum(0)
    assert (frequency - 0.5).abs().max() < 4.5 * math.sqrt(0.25 / (int(rows.sum()) / 2))


def test_inconsistent_ignores_the_anchor():
    samples, length = 4000, 25
    maskable = torch.ones(samples, length, dtype=torch.bool)
    keys = noise.example_keys(3, 0, torch.arange(samples))
    config = MemoryConfig(strategy="inconsistent", steps=2)
    p = torch.full((samples,), 0.5)
    built = build_trajectory(torch.zeros(samples, length).long(), maskable, p, p, keys, config)
    for k, level in ((0, 0.8), (1, 0.2)):
        state, anchor = built.inner_masks[:, k].double(), built.anchor_mask.double()
        assert abs(state.mean().item() - level) < 0.005
        joint = (state * anchor).mean().item()
        assert abs(joint - state.mean().item() * anchor.mean().item()) < 4.5 * 0.25 / math.sqrt(1e5)
    other = build_trajectory(torch.zeros(samples, length).long(), maskable, p * 1.5, p * 1.5, keys, config)
    assert torch.equal(other.inner_masks, built.inner_masks)


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_prompt_trajectory(ratio):
    samples, length = 2000, 60
    keys = noise.example_keys(4, 0, torch.arange(samples))
    prompt = torch.randint(10, 100, (samples, length), generator=torch.Generator().manual_seed(0))
    maskable = torch.arange(length) >= torch.arange(samples)[:, None] % 20  # left padding
    built = prompt_trajectory(prompt, maskable, keys, MemoryConfig(anchor_ratio=ratio))
    count = int(maskable.sum())
    assert abs(int(built.anchor_mask.sum()) / count - ratio) < 4 * math.sqrt(ratio * (1 - ratio) / count)
    assert torch.equal(built.noise_level, torch.full((samples,), ratio))
    assert subset(built.inner_masks, maskable[:, None])
    assert torch.equal(built.inner_masks[:, 1], built.anchor_mask)
    pre = torch.tensor(
        [
            naive_pre_anchor_count(int(a), int(m), 1.5)
            for a, m in zip(built.anchor_mask.sum(-1), maskable.sum(-1), strict=True)
        ]
    )
    assert torch.equal(built.inner_masks[:, 0].sum(-1), pre)
