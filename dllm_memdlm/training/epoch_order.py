"""The order of the examples: a pure function of (seed, epoch), as their noise is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..method import noise


@dataclass(eq=False)
class EpochSampler(Sampler[int]):
    """A shuffle of each epoch's own.

    transformers' samplers follow torch's global generator, or a count of their own that accelerate sets back when it
    resumes within an epoch: the rest of that epoch then has another order than in a run that was never stopped.

    `epoch` gives the epoch that begins. With `lengths` of all examples, similar ones come together (`group_by_length`)
    in the `batch_size` of one optimizer step of one process.
    """

    size: int
    seed: int
    epoch: Callable[[], int]
    lengths: Sequence[int] | None = field(default=None, repr=False)
    batch_size: int = 1

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        key = noise.example_keys(self.seed, self.epoch(), torch.zeros(1, dtype=torch.int64))
        generator = torch.Generator().manual_seed(int(key))
        if self.lengths is None:
            return iter(torch.randperm(self.size, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
