"""Trajectories against the reference sample by sample, and the properties of section 3.2."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch
from trajectories import (
    CONFIGS,
    build,
    make_batch,
    naive_trajectory,
    name_of,
    positions,
    subset,
)

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method import noise
from dllm_memdlm.method.trajectory import ENDS_ON_ANCHOR, STRATEGIES, Trajectory, build_trajectory, sample_anchor


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_equals_the_reference_sample_by_sample(config):
    input_ids, maskable, t, keys = make_batch(seed=1)
    built = build_trajectory(input_ids, maskable, t, t, keys, config)
    for i in range(len(input_ids)):
        anchor, states, ratios = naive_trajectory(
            positions(maskable[i]), maskable.shape[1], t[i].item(), keys[i].item(), config
        )
        assert positions(built.anchor_mask[i]) == anchor
        assert [positions(mask) for mask in built.inner_masks[i]] == states
        assert built.inner_ratios[i].tolist() == pytest.approx(ratios, abs=1e-7)
    assert built.steps == built.inner_ratios.shape[1] == built.inner_masks.shape[1] - 1
    assert built.inner_masks.dtype == built.anchor_mask.dtype == torch.bool
    assert built.inner_ratios.dtype == torch.float32
    assert built.input_ids is input_ids and built.noise_keys is keys and built.noise_level is t


def test_every_strategy_of_the_config_is_there():
    hints = typing.get_type_hints(MemoryConfig)
    assert set(STRATEGIES) == set(typing.get_args(hints["strategy"]))


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_prompt_is_never_masked(config):
    built = build(config)
    assert subset(built.anchor_mask, built.maskable)
    assert subset(built.inner_masks, built.maskable[:, None])
    prompt_mask = build_trajectory(*_all_masked(), config).anchor_mask
    assert torch.equal(prompt_mask, _all_masked()[1])  # at t = 1 all that may be masked is


def _all_masked():
    input_ids, maskable, t, keys = make_batch()
    return input_ids, maskable, torch.ones_like(t), torch.ones_like(t), keys


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_states_only_reveal(config):
    masks = build(config).inner_masks
    for k in range(masks.shape[1] - 1):
        assert subset(masks[:, k + 1], masks[:, k])


@pytest.mark.parametrize("steps", range(1, 6))
def test_anchor_consistent_ends_on_the_anchor(steps):
    built = build(MemoryConfig(steps=steps), samples=50)
    assert built.steps == steps
    assert torch.equal(built.inner_masks[:, -2], built.anchor_mask)
    assert subset(built.anchor_mask, built.inner_masks[:, 0])
    if steps > 1:
        assert (built.inner_masks[:, 0].sum(-1) > built.anchor_mask.sum(-1)).sum() > 30  # the pre-anchor is a real one
    else:
        assert torch.equal(built.inner_masks[:, 0], built.anchor_mask)


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_ends_on_anchor_names_the_strategies_that_do(steps):
    for strategy in STRATEGIES:
        built = build(MemoryConfig(strategy=strategy, steps=steps), samples=50)
        assert torch.equal(built.inner_masks[:, built.steps - 1], built.anchor_mask) == (strategy in ENDS_ON_ANCHOR)


def test_the_state_after_the_last():
    """What a last state's teacher sees, and so what `newly_revealed` takes from it."""
    for strategy in ("anchor_consistent", "inconsistent", "anchor_only"):
        assert not build(MemoryConfig(strategy=strategy)).inner_masks[:, -1].any()
    built = build(MemoryConfig(strategy="pre_anchor_only"))
    assert built.steps == 1
    assert torch.equal(built.inner_masks[:, -1], built.anchor_mask)


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_newly_revealed_tokens_partition_the_pre_anchor(steps):
    masks = build(MemoryConfig(steps=steps)).inner_masks
    revealed = masks[:, :-1] & ~masks[:, 1:]
    assert torch.equal(revealed.sum(1), masks[:, 0].long())


def test_newly_revealed_tokens_of_the_pre_anchor_alone_leave_the_anchor_out():
    built = build(MemoryConfig(strategy="pre_anchor_only"))
    revealed = built.inner_masks[:, 0] & ~built.inner_masks[:, 1]
    assert revealed.any() and not (revealed & built.anchor_mask).any()


def test_memory_off_has_no_inner_states():
    off, on = build(MemoryConfig(enabled=False)), build(MemoryConfig())
    assert off.steps == 0 and off.inner_ratios.shape == (24, 0)
    assert torch.equal(off.anchor_mask, on.anchor_mask)  # MDLM and MemDLM train on the same masks


# --- batches ---


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_a_batch_is_its_samples_one_by_one(config):
    input_ids, maskable, t, keys = make_batch(samples=6)
    whole = build_trajectory(input_ids, maskable, t, t, keys, config).to_batch()
    for i in range(6):
        row = slice(i, i + 1)
        alone = build_trajectory(input_ids[row], maskable[row], t[row], t[row], keys[row], config).to_batch()
        for name, value in alone.items():
            expected = whole[name][row]
            # as many positions as the sample itself has, not the longest of its batch
            assert torch.equal(value, expected[:, : value.shape[1]] if "index" in name else expected), name


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_padding_that_cannot_be_masked_changes_nothing(config):
    input_ids, maskable, t, keys = make_batch(samples=6)
    short = build_trajectory(input_ids, maskable, t, t, keys, config)
    more = torch.zeros(6, 13, dtype=torch.bool)
    long = build_trajectory(torch.cat([input_ids, more.long()], 1), torch.cat([maskable, more], 1), t, t, keys, config)
    assert torch.equal(long.anchor_mask[:, :40], short.anchor_mask)
    assert torch.equal(long.inner_masks[..., :40], short.inner_masks)
    assert torch.equal(long.inner_ratios, short.inner_ratios)
    assert not long.inner_masks[..., 40:].any()


def test_padding_that_can_be_masked_leaves_earlier_anchors_alone():
    _, maskable, t, keys = make_batch(samples=6)
    more = torch.ones(6, 13, dtype=torch.bool)
    long = sample_anchor(torch.cat([maskable, more], 1), t, keys)
    assert torch.equal(long[:, :40], sample_anchor(maskable, t, keys))


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_samples_without_maskable_tokens(config):
    input_ids, _, t, keys = make_batch(samples=3)
    built = build_trajectory(input_ids, torch.zeros(3, 40, dtype=torch.bool), t, t, keys, config)
    assert not built.anchor_mask.any() and not built.inner_masks.any()
    assert torch.isfinite(built.inner_ratios).all()
    if config.enabled and config.strategy in ("anchor_consistent", "pre_anchor_only"):
        assert not built.inner_ratios.any()


# --- the record ---


def test_state_replaces_masked_tokens_only():
    built = build(MemoryConfig(), samples=5)
    state = built.state(built.anchor_mask, 999)
    for i in range(5):
        expected = [
            999 if m else x for x, m in zip(built.input_ids[i].tolist(), built.anchor_mask[i].tolist(), strict=True)
        ]
        assert state[i].tolist() == expected
    assert (built.input_ids != 999).all()


def test_batch_round_trip():
    built = build(MemoryConfig(), samples=5)
    batch = built.to_batch()
    assert all(len(value) == 5 for value in batch.values())
    again = Trajectory.from_batch({**batch, "labels": built.input_ids, "attention_mask": None})
    assert again.loss_index == tuple(batch[f"loss_index_{state}"] for state in range(3))
    for name, value in batch.items():
        assert "index" in name or getattr(again, name) is value
    del batch["noise_keys"]
    with pytest.raises(KeyError, match="noise_keys"):
        Trajectory.from_batch(batch)


@pytest.mark.parametrize(("start", "end", "steps", "total", "second"), [(1.0, 0.3, 3, 20, 13), (0.7, 0.2, 3, 60, 27)])
def test_inconsistent_levels_are_not_rounded_below_whole_tokens(start, end, steps, total, second):
    config = MemoryConfig(strategy="inconsistent", start_ratio=start, anchor_ratio=end, steps=steps)
    maskable = torch.ones(64, total, dtype=torch.bool)
    keys = noise.example_keys(0, 0, torch.arange(64))
    t = torch.full((64,), 0.5)
    counts = build_trajectory(maskable.long(), maskable, t, t, keys, config).inner_masks.sum(-1)
    assert counts[:, 1].max() == second


def test_a_batch_whose_length_was_changed_afterwards_is_refused():
    ids, maskable, t, keys = make_batch(samples=2)
    batch = build_trajectory(ids, maskable, t, t, keys, MemoryConfig()).to_batch()
    batch["input_ids"] = torch.cat([ids[:, :1], ids], dim=1)
    with pytest.raises(ValueError, match="a collator that changes the length belongs inside AnchorTrajectoryCollator"):
        Trajectory.from_batch(batch)


@pytest.mark.parametrize("targets", ["masked", "newly_revealed"])
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_where_each_state_has_its_loss(config, targets):
    built = build(dataclasses.replace(config, targets=targets), samples=6)
    assert len(built.loss_index) == built.steps + 1
    for state in range(built.steps + 1):
        mask = built.anchor_mask if state == built.steps else built.inner_masks[:, state]
        if targets == "newly_revealed" and state < built.steps:
            mask = mask & ~built.inner_masks[:, state + 1]
        found = built.loss_positions(state, targets)
        again = torch.zeros_like(mask).scatter(1, found.index, found.valid)
        assert torch.equal(again, mask)
        assert found.index.shape[1] == max(1, int(mask.sum(-1).max()))  # no further than the longest
    for ours, worked_out in zip(built.loss_positions(-1), built.loss_positions(built.steps), strict=True):
        assert torch.equal(ours, worked_out)
