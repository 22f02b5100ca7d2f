"""Trajectories against those made sample by sample, and the properties of section 3.2."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch
from trajectories import CONFIGS, build, make_batch, naive_trajectory, name_of, positions, subset

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method import noise
from dllm_memdlm.method.trajectory import ENDS_ON_ANCHOR, STRATEGIES, Trajectory, build_trajectory, sample_anchor


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


def test_every_strategy_of_the_config_is_there():
    assert set(STRATEGIES) == set(typing.get_args(typing.get_type_hints(MemoryConfig)["strategy"]))


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_states_only_reveal_and_never_mask_the_prompt(config):
    built = build(config)
    assert subset(built.anchor_mask, built.maskable) and subset(built.inner_masks, built.maskable[:, None])
    assert subset(built.inner_masks[:, 1:], built.inner_masks[:, :-1])
    input_ids, maskable, t, keys = make_batch()
    everything = torch.ones_like(t)
    assert torch.equal(build_trajectory(input_ids, maskable, t, everything, keys, config).anchor_mask, maskable)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("steps", range(1, 6))
def test_the_last_state_is_the_anchor_and_the_first_a_pre_anchor(strategy, steps):
    built = build(MemoryConfig(strategy=strategy, steps=steps), samples=50)
    pre, anchor, after = built.inner_masks[:, 0], built.anchor_mask, built.inner_masks[:, -1]
    assert torch.equal(built.inner_masks[:, built.steps - 1], anchor) == (strategy in ENDS_ON_ANCHOR)
    assert built.steps == (steps if strategy in ("anchor_consistent", "inconsistent") else 1)
    # What the last state's teacher sees, and so what `newly_revealed` takes from it.
    assert torch.equal(after, anchor if strategy == "pre_anchor_only" else torch.zeros_like(anchor))
    if strategy == "pre_anchor_only" or (strategy == "anchor_consistent" and steps > 1):
        assert subset(anchor, pre) and (pre.sum(-1) > anchor.sum(-1)).sum() > 30


def test_memory_off_has_no_inner_states():
    off, on = build(MemoryConfig(enabled=False)), build(MemoryConfig())
    assert off.steps == 0 and off.inner_ratios.shape == (24, 0)
    assert torch.equal(off.anchor_mask, on.anchor_mask)  # MDLM and MemDLM train on the same masks


# === batches ===


@pytest.mark.parametrize("config", CONFIGS[::3], ids=name_of)
def test_a_batch_is_its_samples_one_by_one(config):
    input_ids, maskable, t, keys = make_batch(samples=6)
    whole = build_trajectory(input_ids, maskable, t, t, keys, config).to_batch()
    for i in range(6):
        row = slice(i, i + 1)
        alone = build_trajectory(input_ids[row], maskable[row], t[row], t[row], keys[row], config).to_batch()
        for name, value in alone.items():
            # as many positions as the sample itself has, not the longest of its batch
            assert torch.equal(value, whole[name][row][:, : value.shape[1]] if "index" in name else whole[name][row])


@pytest.mark.parametrize("config", CONFIGS[::3], ids=name_of)
def test_padding_changes_nothing(config):
    input_ids, maskable, t, keys = make_batch(samples=6)
    short, more = build_trajectory(input_ids, maskable, t, t, keys, config), torch.zeros(6, 13, dtype=torch.bool)
    long = build_trajectory(torch.cat([input_ids, more.long()], 1), torch.cat([maskable, more], 1), t, t, keys, config)
    assert torch.equal(long.anchor_mask[:, :40], short.anchor_mask)
    assert torch.equal(long.inner_masks[..., :40], short.inner_masks) and not long.inner_masks[..., 40:].any()
    assert torch.equal(long.inner_ratios, short.inner_ratios)
    labelled = sample_anchor(torch.cat([maskable, ~more], 1), t, keys)  # padding that is a label, too
    assert torch.equal(labelled[:, :40], short.anchor_mask)


@pytest.mark.parametrize("config", CONFIGS[::3], ids=name_of)
def test_samples_without_maskable_tokens(config):
    input_ids, _, t, keys = make_batch(samples=3)
    built = build_trajectory(input_ids, torch.zeros(3, 40, dtype=torch.bool), t, t, keys, config)
    assert not built.anchor_mask.any() and not built.inner_masks.any()
    assert torch.isfinite(built.inner_ratios).all() and torch.isfinite(built.inner_weights).all()


def test_state_replaces_masked_tokens_only():
    built = build(MemoryConfig(), samples=5)
    state = built.state(built.anchor_mask, 999)
    assert torch.equal(state == 999, built.anchor_mask)
    assert torch.equal(state[~built.anchor_mask], built.input_ids[~built.anchor_mask])


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


@pytest.mark.parametrize(("start", "end", "steps", "total", "second"), [(1.0, 0.3, 3, 20, 13), (0.7, 0.2, 3, 60, 27)])
def test_inconsistent_levels_are_not_rounded_below_whole_tokens(start, end, steps, total, second):
    config = MemoryConfig(strategy="inconsistent", start_ratio=start, anchor_ratio=end, steps=steps)
    maskable, t = torch.ones(64, total, dtype=torch.bool), torch.full((64,), 0.5)
    built = build_trajectory(maskable.long(), maskable, t, t, noise.example_keys(0, 0, torch.arange(64)), config)
    assert built.inner_masks[:, 1].sum(-1).max() == second


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
