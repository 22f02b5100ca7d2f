"""Noise: SplitMix64's numbers exactly, pure functions of their arguments, uniform, and independent of each other."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_memdlm.method import noise

BITS = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
STREAMS = (noise.TIME, noise.ANCHOR, noise.REVEAL, noise.DROPOUT, noise.START)


def mix(z: int) -> int:
    """The finaliser of SplitMix64 on an unsigned number, every product cut to 64 bits."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & BITS
    return z ^ (z >> 31)


def reference_key(seed: int, epoch: int, example: int) -> int:
    key = 0
    for part in (seed, epoch, example):
        key = mix(((key ^ (part & BITS)) + GAMMA) & BITS)
    return signed(key)


def reference_uniform(key: int, stream: int, position: int) -> float:
    base = mix((((key & BITS) ^ stream) + GAMMA) & BITS)
    return (mix((base + (position + 1) * GAMMA) & BITS) >> 40) / 2**24


def signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def keys_of(count: int, seed: int = 42, epoch: int = 0) -> torch.Tensor:
    return noise.example_keys(seed, epoch, torch.arange(count))


def test_keys_equal_pure_python():
    # The published first outputs of the generator that is seeded with 0.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [mix((i + 1) * GAMMA & BITS) for i in range(3)] == published
    examples = [0, 1, 2, 1000, 2**31, 2**62 + 5]
    for seed, epoch in ((0, 0), (42, 3), (2**40 + 7, noise.EVALUATION)):
        expected = [reference_key(seed, epoch, e) for e in examples]
        assert noise.example_keys(seed, epoch, torch.tensor(examples)).tolist() == expected


@pytest.mark.parametrize("stream", STREAMS)
def test_uniform_equals_pure_python(stream):
    state = torch.get_rng_state()
    keys = [reference_key(42, 1, e) for e in range(5)] + [0, -1, -(2**63), 2**63 - 1]
    expected = [[reference_uniform(key, stream, i) for i in range(7)] for key in keys]
    drawn = noise.uniform(torch.tensor(keys), stream, 7)
    assert drawn.dtype == torch.float32 and drawn.tolist() == expected
    assert noise.uniform(torch.tensor(keys[3:4]), stream, 3).tolist() == [expected[3][:3]]
    assert torch.equal(torch.get_rng_state(), state)


def test_golden_numbers():
    """A change of any of these changes every run that anybody has made."""
    assert STREAMS == (1, 2, 3, 4, 5)
    assert (noise.EVALUATION, noise.EVALUATION_SEED, noise.INITIAL) == (-1, 42, 1000)
    keys = noise.example_keys(42, 0, torch.tensor([0, 1]))
    assert keys.tolist() == [7138415436909018950, -5295408365694611298]
    drawn = (noise.uniform(keys, noise.ANCHOR, 3) * 2**24).tolist()
    assert drawn == [[1597327.0, 6098007.0, 9895621.0], [9536763.0, 7697720.0, 3364822.0]]


def test_streams_epochs_seeds_and_neighbours_are_uncorrelated():
    shape = 500  # positions: 1e5 numbers a comparison
    draws = [noise.uniform(keys_of(200), stream, shape) for stream in STREAMS]
    others = [(42, noise.EVALUATION), (42, 1), (42, 2), (0, 0), (43, 0), (0, 42)]  # seed and epoch are not interchanged
    draws += [noise.uniform(keys_of(200, seed, epoch), noise.ANCHOR, shape) for seed, epoch in others]
    anchor = draws[STREAMS.index(noise.ANCHOR)]
    draws += [anchor.roll(1, dims=0), anchor.roll(1, dims=1)]  # the next example, the next position
    correlations = torch.corrcoef(torch.stack([each.flatten().double() for each in draws]))
    assert (correlations - torch.eye(len(draws))).abs().max() < 4.5 / math.sqrt(200 * shape)
    keys = [keys_of(100, seed, epoch) for seed in range(10) for epoch in range(-1, 9)]
    assert len(torch.cat(keys).unique()) == 10 * 10 * 100
