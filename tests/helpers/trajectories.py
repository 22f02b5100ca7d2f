"""Trajectories sample by sample in Python's own numbers, and the batches they are compared on."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method import noise
from dllm_memdlm.method.reference import naive_states
from dllm_memdlm.method.trajectory import Trajectory, build_trajectory

SCALES = (1.25, 1.5, 1.75, 2.0)
LEVELS = {0.2: Fraction(1, 5), 0.8: Fraction(4, 5), 0.3: Fraction(3, 10), 1.0: Fraction(1)}

CONFIGS = [
    *(MemoryConfig(steps=k, pre_anchor_scale=s) for k in range(1, 6) for s in (1.0, *SCALES)),
    *(MemoryConfig(strategy="inconsistent", steps=k) for k in range(1, 6)),
    MemoryConfig(strategy="inconsistent", steps=3, start_ratio=0.8, anchor_ratio=0.3),
    MemoryConfig(strategy="inconsistent", steps=3, start_ratio=1.0, anchor_ratio=0.3),  # 0.65 · 20 is 13, not 12.99…
    MemoryConfig(strategy="inconsistent", steps=3, start_ratio=0.8, anchor_ratio=0.8),  # reveals next to nothing
    *(MemoryConfig(strategy="pre_anchor_only", pre_anchor_scale=s) for s in SCALES),
    MemoryConfig(strategy="pre_anchor_only", steps=4),
    MemoryConfig(strategy="anchor_only"),
    MemoryConfig(enabled=False),
]


def name_of(config: MemoryConfig) -> str:
    return f"{config.strategy if config.enabled else 'off'}-{config.steps}-{config.pre_anchor_scale}"


def naive_trajectory(
    maskable: set[int], length: int, t: float, key: int, config: MemoryConfig
) -> tuple[set[int], list[set[int]], list[float]]:
    """Anchor, the K+1 states, and the K ratios of one sample."""
    anchor_draws, order, start_draws = (
        noise.uniform(torch.tensor([key]), stream, length)[0].tolist()
        for stream in (noise.ANCHOR, noise.REVEAL, noise.START)
    )
    anchor = {i for i in maskable if anchor_draws[i] < t}
    if not config.enabled:
        return anchor, [set()], []
    if config.strategy == "anchor_only":
        return anchor, [anchor, set()], [t]
    if config.strategy == "inconsistent":
        first, last = (
            LEVELS[config.start_ratio if config.steps > 1 else config.anchor_ratio],
            LEVELS[config.anchor_ratio],
        )
        levels = [first + (last - first) * Fraction(k, max(1, config.steps - 1)) for k in range(config.steps)]
        states = [{i for i in maskable if start_draws[i] < float(first)}]
        hidden_longest = sorted(states[0], key=lambda i: (order[i], i))
        for level in levels[1:]:
            states.append(set(hidden_longest[: min(math.floor(len(maskable) * level), len(states[-1]))]))
        return anchor, [*states, set()], [float(level) for level in levels]
    alone = config.strategy == "pre_anchor_only"
    states = naive_states(maskable, anchor, order, config.pre_anchor_scale, 2 if alone else config.steps)
    states = states if alone else [*states, set()]
    return anchor, states, [len(state) / max(len(maskable), 1) for state in states[:-1]]


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
