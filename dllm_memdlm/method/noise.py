"""Counter-based noise: every random number is a pure function of (seed, epoch, example, stream, position).

No generator is carried along. So the noise of an example is the same for any number of workers and ranks, in any
batch, before and after a restart, and on every device. The mixing function is SplitMix64 (Steele et al., OOPSLA
2014), written in wrapping int64 arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The streams of one example. They are fixed numbers: a new one must not move the others.
TIME, ANCHOR, REVEAL, DROPOUT, START, COVER, PROMPT, CHOICE, CUTOFF = 1, 2, 3, 4, 5, 6, 7, 8, 9
#: The first of the streams that fast weights are initialised from, one a site.
INITIAL = 1000
#: The first of the streams of a prompt's windows, one a window.
WINDOWS = 1 << 32

#: The epoch and the seed of evaluation. Its noise never changes, so that eval curves can be compared point by point,
#: and runs of one seed with runs of another.
EVALUATION, EVALUATION_SEED = -1, 42


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right as if unsigned; its own `>>` copies the sign bit."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Mix in place."""
    x.bitwise_xor_(_shift(x, 30)).mul_(_MIX_1)
    x.bitwise_xor_(_shift(x, 27)).mul_(_MIX_2)
    return x.bitwise_xor_(_shift(x, 31))


def example_keys(seed: int, epoch: int, examples: Tensor) -> Tensor:
    """Make one key an example. examples [B] int64 (index in the dataset) → [B] int64."""
    key = torch.zeros_like(examples)
    for part in (seed, epoch, examples):
        key = _mix((key ^ part) + _GAMMA)
    return key


def stream_keys(keys: Tensor, streams: int | Tensor) -> Tensor:
    """Make a key for each example and stream. keys [B], or [B, 1] with streams [n]."""
    return _mix((keys ^ streams) + _GAMMA)


def uniform(keys: Tensor, stream: int, length: int) -> Tensor:
    """Draw uniform numbers in [0, 1) with 24 random bits each. keys [B] → [B, length] float32.

    A prefix does not depend on `length`: an example keeps its noise when a batch is padded further.
    """
    return uniform_of(stream_keys(keys, stream), length)


def uniform_of(keys: Tensor, length: int) -> Tensor:
    """Draw the numbers of streams, by their keys [B] → [B, length]."""
    position = torch.arange(1, length + 1, device=keys.device)
    bits = _mix(keys[:, None] + position * _GAMMA)
    return _shift(bits, 40).to(torch.float32).mul_(2.0**-24)
