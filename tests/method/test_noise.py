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
    return key


def reference_uniform(key: int, stream: int, position: int) -> float:
    base = mix(((key ^ stream) + GAMMA) & BITS)
    bits = mix((base + (position + 1) * GAMMA) & BITS)
    return (bits >> 40) / 2**24


def signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def keys_of(count: int, seed: int = 42, epoch: int = 0) -> torch.Tensor:
    return noise.example_keys(seed, epoch, torch.arange(count))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1].item()


def assert_uniform(draws: torch.Tensor) -> None:
    """Kolmogorov-Smirnov at the 0.1 % level, and the ends of the range."""
    values = draws.flatten().double().sort().values
    n = len(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((steps[1:] - values).max(), (values - steps[:-1]).max()).item()
    assert distance < 1.95 / math.sqrt(n)
    assert values[0] >= 0 and values[-1] < 1
    assert values[0] < 20 / n and values[-1] > 1 - 20 / n


def test_mixing_function_is_splitmix64():
    # The published first outputs of the generator that is seeded with 0.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    state = torch.tensor([signed((i + 1) * GAMMA & BITS) for i in range(3)])
    assert noise._mix(state).tolist() == [signed(x) for x in published]
    assert [mix((i + 1) * GAMMA & BITS) for i in range(3)] == published


@pytest.mark.parametrize("seed", [0, 42, 2**40 + 7])
@pytest.mark.parametrize("epoch", [noise.EVALUATION, 0, 3])
def test_keys_equal_pure_python(seed, epoch):
    examples = [0, 1, 2, 1000, 2**31, 2**62 + 5]
    expected = [signed(reference_key(seed, epoch, e)) for e in examples]
    assert noise.example_keys(seed, epoch, torch.tensor(examples)).tolist() == expected


@pytest.mark.parametrize("stream", STREAMS)
def test_uniform_equals_pure_python(stream):
    keys = [signed(reference_key(42, 1, e)) for e in range(5)] + [0, -1, -(2**63), 2**63 - 1]
    drawn = noise.uniform(torch.tensor(keys), stream, 7)
    expected = [[reference_uniform(key & BITS, stream, i) for i in range(7)] for key in keys]
    assert drawn.dtype == torch.float32 and drawn.tolist() == expected


def test_golden_numbers():
    """A change of any of these changes every run that anybody has made."""
    assert (noise.TIME, noise.ANCHOR, noise.REVEAL, noise.DROPOUT, noise.START) == (1, 2, 3, 4, 5)
    assert noise.EVALUATION == -1
    keys = noise.example_keys(42, 0, torch.tensor([0, 1]))
    assert keys.tolist() == [7138415436909018950, -5295408365694611298]
    assert (noise.uniform(keys, noise.ANCHOR, 3) * 2**24).tolist() == [
        [1597327.0, 6098007.0, 9895621.0],
        [9536763.0, 7697720.0, 3364822.0],
    ]
    assert noise.example_keys(42, noise.EVALUATION, torch.tensor([0])).tolist() == [6084807027953656942]


def test_examples_are_independent_of_their_batch():
    keys = keys_of(16)
    drawn = noise.uniform(keys, noise.ANCHOR, 9)
    order = torch.tensor([5, 0, 11, 5])
    assert torch.equal(noise.example_keys(42, 0, order), keys[order])
    assert torch.equal(noise.uniform(keys[order], noise.ANCHOR, 9), drawn[order])
    for i in range(16):
        assert torch.equal(noise.uniform(keys[i : i + 1], noise.ANCHOR, 9)[0], drawn[i])


def test_prefix_does_not_depend_on_the_length():
    keys = keys_of(4)
    long = noise.uniform(keys, noise.REVEAL, 50)
    for length in (0, 1, 17, 49):
        assert torch.equal(noise.uniform(keys, noise.REVEAL, length), long[:, :length])


def test_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn = noise.uniform(keys_of(3), noise.TIME, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(noise.uniform(keys_of(3), noise.TIME, 5), drawn)


def test_uniform_over_positions():
    assert_uniform(noise.uniform(keys_of(1), noise.ANCHOR, 100_000))


def test_uniform_over_examples():
    assert_uniform(noise.uniform(keys_of(100_000), noise.TIME, 1))


def test_uniform_over_epochs_and_seeds():
    example = torch.tensor([3])
    epochs = torch.cat([noise.example_keys(42, epoch, example) for epoch in range(2000)])
    seeds = torch.cat([noise.example_keys(seed, 0, example) for seed in range(2000)])
    assert_uniform(noise.uniform(epochs, noise.TIME, 1))
    assert_uniform(noise.uniform(seeds, noise.TIME, 1))


def test_numbers_carry_24_bits():
    bits = noise.uniform(keys_of(10), noise.START, 1000).double() * 2**24
    assert torch.equal(bits, bits.floor())
    assert 0.45 < (bits.long() & 1).double().mean() < 0.55  # the last bit is used


def test_streams_epochs_seeds_and_neighbours_are_uncorrelated():
    examples = torch.arange(200)
    shape = 500  # positions: 1e5 numbers a comparison
    draws = {("stream", s): noise.uniform(keys_of(200), s, shape) for s in STREAMS}
    draws |= {("epoch", e): noise.uniform(keys_of(200, epoch=e), noise.ANCHOR, shape) for e in (noise.EVALUATION, 1, 2)}
    draws |= {("seed", s): noise.uniform(keys_of(200, seed=s), noise.ANCHOR, shape) for s in (0, 43)}
    # seed and epoch must not be interchangeable
    draws["swapped"] = noise.uniform(noise.example_keys(0, 42, examples), noise.ANCHOR, shape)
    anchor = draws["stream", noise.ANCHOR]
    draws["next example"] = anchor.roll(1, dims=0)
    draws["next position"] = anchor.roll(1, dims=1)
    names = list(draws)
    limit = 4.5 / math.sqrt(200 * shape)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert abs(correlation(draws[first], draws[second])) < limit, (first, second)


def test_keys_do_not_collide():
    keys = [noise.example_keys(s, e, torch.arange(100)) for s in range(10) for e in range(-1, 9)]
    assert len(torch.cat(keys).unique()) == 10 * 10 * 100
