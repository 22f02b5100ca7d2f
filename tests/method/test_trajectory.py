"""Trajectories against those made sample by sample, and the properties of section 3.2."""

from __future__ import annotations

import dataclasses
import math
import typing
from fractions import Fraction

import pytest
import torch
from trajectories import CONFIGS, SCALES, build, make_batch, naive_trajectory, name_of, positions, subset

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method.trajectory import (
    STRATEGIES,
    Trajectory,
    build_trajectory,
    pre_anchor_count,
    sample_anchor,
    smallest,
)


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_equals_one_made_sample_by_sample(config):
    input_ids, maskable, t, keys = make_batch(seed=1)
    built = build_trajectory(input_ids, maskable, t, t, keys, config)
    for i in range(len(input_ids)):
        anchor, states, ratios = naive_trajectory(positions(maskable[i]), 40, t[i].item(), keys[i].item(), config)
        assert positions(built.anchor_mask[i]) == anchor
        assert [positions(mask) for mask in built.inner_masks[i]] == states
        assert built.inner_ratios[i].tolist() == pytest.approx(ratios, abs=1e-7)
    assert built.steps == built.inner_ratios.shape[1] == built.inner_masks.shape[1] - 1
    assert built.inner_masks.dtype == built.anchor_mask.dtype == torch.bool
    assert built.inner_ratios.dtype == torch.float32
    assert built.input_ids is input_ids and built.noise_keys is keys and built.noise_level is t
    torch.testing.assert_close(built.noise_weight, 1 / (t + 1e-6))
    torch.testing.assert_close(built.inner_weights, 1 / (built.inner_ratios + 1e-6), rtol=1e-4, atol=0)
    all_masked = build_trajectory(input_ids, maskable, t, torch.ones_like(t), keys, config)
    assert torch.equal(all_masked.anchor_mask, maskable) and subset(all_masked.inner_masks, maskable[:, None])


def test_there_are_the_strategies_of_the_config():
    assert set(STRATEGIES) == set(typing.get_args(typing.get_type_hints(MemoryConfig)["strategy"]))


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


def test_smallest_against_sorting():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 5, (30, 12), generator=generator) / 4  # with ties, which go to the left
    among = torch.rand(30, 12, generator=generator) < 0.6
    counts = torch.randint(0, 13, (30, 3), generator=generator)
    marked = smallest(values, among, counts)
    for i in range(30):
        order = [j for _, j in sorted((values[i, j].item(), j) for j in positions(among[i]))]
        assert [positions(mask) for mask in marked[i]] == [set(order[:count]) for count in counts[i]]


@pytest.mark.parametrize("config", CONFIGS[::3], ids=name_of)
def test_padding_changes_nothing(config):
    input_ids, maskable, t, keys = make_batch(samples=6)
    whole, more = build_trajectory(input_ids, maskable, t, t, keys, config), torch.zeros(6, 13, dtype=torch.bool)
    long = build_trajectory(torch.cat([input_ids, more.long()], 1), torch.cat([maskable, more], 1), t, t, keys, config)
    assert torch.equal(long.anchor_mask[:, :40], whole.anchor_mask)
    assert torch.equal(long.inner_masks[..., :40], whole.inner_masks) and not long.inner_masks[..., 40:].any()
    assert torch.equal(long.inner_ratios, whole.inner_ratios)
    labelled = sample_anchor(torch.cat([maskable, ~more], 1), t, keys)  # padding that is a label, too
    assert torch.equal(labelled[:, :40], whole.anchor_mask)


def test_batch_round_trip():
    built = build(MemoryConfig(), samples=5)
    batch = built.to_batch()
    assert all(len(value) == 5 for value in batch.values())
    again = Trajectory.from_batch({**batch, "labels": built.input_ids, "attention_mask": None})
    assert again.loss_index == tuple(batch[f"loss_index_{state}"] for state in range(3))
    assert all("index" in name or getattr(again, name) is value for name, value in batch.items())
    longer = torch.cat([built.input_ids[:, :1], built.input_ids], dim=1)
    with pytest.raises(ValueError, match="a collator that changes the length belongs inside AnchorTrajectoryCollator"):
        Trajectory.from_batch({**batch, "input_ids": longer})
    del batch["noise_keys"]
    with pytest.raises(KeyError, match="noise_keys"):
        Trajectory.from_batch(batch)


@pytest.mark.parametrize("targets", ["masked", "newly_revealed"])
@pytest.mark.parametrize("config", CONFIGS[::3], ids=name_of)
def test_where_each_state_has_its_loss(config, targets):
    built = build(dataclasses.replace(config, targets=targets), samples=6)
    assert len(built.loss_index) == built.steps + 1
    for state in range(built.steps + 1):
        mask = built.anchor_mask if state == built.steps else built.inner_masks[:, state]
        if targets == "newly_revealed" and state < built.steps:
            mask = mask & ~built.inner_masks[:, state + 1]
        found = built.loss_positions(state, targets)
        assert torch.equal(torch.zeros_like(mask).scatter(1, found.index, found.valid), mask)
        assert found.index.shape[1] == max(1, int(mask.sum(-1).max()))  # no further than the longest
    assert all(torch.equal(*pair) for pair in zip(found, built.loss_positions(-1), strict=True))
    by_hand = dataclasses.replace(built, loss_index=()).loss_positions(-1)
    assert all(torch.equal(*pair) for pair in zip(found, by_hand, strict=True))
