"""A sample-by-sample reference of trajectories in Python's own numbers, and the batches it is compared on."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method import noise
from dllm_memdlm.method.trajectory import Trajectory, build_trajectory

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
