"""Trajectories against a sample-by-sample reference in Python's own numbers, and the properties of section 3.2."""

from __future__ import annotations

import math
import typing
from fractions import Fraction

import pytest
import torch

from dllm_memdlm import noise
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.trajectory import (
    ENDS_ON_ANCHOR,
    STRATEGIES,
    Trajectory,
    build_trajectory,
    masked_ratio,
    pre_anchor_count,
    prompt_trajectory,
    reveal_counts,
    sample_anchor,
    smallest,
)

SCALES = (1.25, 1.5, 1.75, 2.0)
LEVELS = {0.2: Fraction(1, 5), 0.8: Fraction(4, 5), 0.3: Fraction(3, 10), 1.0: Fraction(1)}


# --- the reference: one sample, sets of positions, exact fractions ---


def numbers(key: int, stream: int, length: int) -> list[float]:
    return noise.uniform(torch.tensor([key]), stream, length)[0].tolist()


def naive_pre_anchor_count(masked: int, total: int, scale: float) -> int:
    ratio = Fraction(masked, total) if total else Fraction(0)
    return math.floor(total * min(Fraction(1), max(Fraction(scale) * ratio, ratio)))


def naive_hidden_counts(extra: int, steps: int) -> list[int]:
    """Extra tokens that are hidden in each of the `steps` states."""
    counts, left = [extra], extra
    for steps_left in range(steps - 1, 0, -1):
        left -= math.ceil(Fraction(left, steps_left))
        counts.append(left)
    return counts


def naive_trajectory(
    maskable: set[int], length: int, t: float, key: int, config: MemoryConfig
) -> tuple[set[int], list[set[int]], list[float]]:
    """Anchor, the K+1 states, and the K ratios of one sample."""
    draws = numbers(key, noise.ANCHOR, length)
    anchor = {i for i in maskable if draws[i] < t}
    reveal = numbers(key, noise.REVEAL, length)

    def hidden(candidates: set[int], count: int) -> set[int]:
        return set(sorted(candidates, key=lambda i: (reveal[i], i))[:count])

    def ratio(state: set[int]) -> float:
        return len(state) / len(maskable) if maskable else 0.0

    if not config.enabled:
        return anchor, [set()], []
    if config.strategy == "anchor_only":
        return anchor, [anchor, set()], [t]
    if config.strategy == "inconsistent":
        first, last = LEVELS[config.start_ratio], LEVELS[config.anchor_ratio]
        levels = [first + (last - first) * Fraction(k, max(1, config.steps - 1)) for k in range(config.steps)]
        if config.steps == 1:
            levels = [last]
        draws = numbers(key, noise.START, length)
        states = [{i for i in maskable if draws[i] < float(levels[0])}]
        for level in levels[1:]:
            aim = min(math.floor(len(maskable) * level), len(states[-1]))
            states.append(hidden(states[0], aim))
        return anchor, [*states, set()], [float(level) for level in levels]
    extra = naive_pre_anchor_count(len(anchor), len(maskable), config.pre_anchor_scale) - len(anchor)
    if config.strategy == "pre_anchor_only":
        pre = anchor | hidden(maskable - anchor, extra)
        return anchor, [pre, anchor], [ratio(pre)]
    counts = naive_hidden_counts(extra, config.steps) if config.steps > 1 else [0]
    states = [anchor | hidden(maskable - anchor, count) for count in counts]
    return anchor, [*states, set()], [ratio(state) for state in states]


# --- batches ---


def make_batch(samples: int = 24, length: int = 40, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """input_ids, maskable (a response of every length from 0 on), t, keys."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(10, 100, (samples, length), generator=generator)
    responses = torch.arange(samples) * length // (samples - 1)
    maskable = torch.arange(length) >= length - responses[:, None]
    t = torch.rand(samples, generator=generator) * 0.98 + 0.01
    return input_ids, maskable, t, noise.example_keys(7, seed, torch.arange(samples))


def build(config: MemoryConfig, samples: int = 24, length: int = 40, seed: int = 0) -> Trajectory:
    input_ids, maskable, t, keys = make_batch(samples, length, seed)
    return build_trajectory(input_ids, maskable, t, t, keys, config)


def positions(mask: torch.Tensor) -> set[int]:
    return set(mask.nonzero().flatten().tolist())


def subset(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not (a & ~b).any()


CONFIGS = [
    *(MemoryConfig(steps=k, pre_anchor_scale=s) for k in range(1, 6) for s in SCALES),
    *(MemoryConfig(strategy="inconsistent", steps=k) for k in range(1, 6)),
    MemoryConfig(strategy="inconsistent", steps=3, start_ratio=0.8, anchor_ratio=0.3),
    MemoryConfig(strategy="inconsistent", steps=2, start_ratio=1.0, anchor_ratio=0.3),
    MemoryConfig(strategy="inconsistent", steps=3, start_ratio=0.8, anchor_ratio=0.8),  # reveals next to nothing
    *(MemoryConfig(strategy="pre_anchor_only", pre_anchor_scale=s) for s in SCALES),
    MemoryConfig(strategy="pre_anchor_only", steps=4),
    MemoryConfig(strategy="anchor_only"),
    MemoryConfig(enabled=False),
]


def name_of(config: MemoryConfig) -> str:
    return f"{config.strategy if config.enabled else 'off'}-{config.steps}-{config.pre_anchor_scale}"


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


# --- batches ---


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_a_batch_is_its_samples_one_by_one(config):
    input_ids, maskable, t, keys = make_batch(samples=6)
    whole = build_trajectory(input_ids, maskable, t, t, keys, config).to_batch()
    for i in range(6):
        row = slice(i, i + 1)
        alone = build_trajectory(input_ids[row], maskable[row], t[row], t[row], keys[row], config).to_batch()
        for name, value in alone.items():
            assert torch.equal(value, whole[name][row]), name


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
    for name, value in batch.items():
        assert getattr(again, name) is value
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
