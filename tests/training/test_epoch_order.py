"""The order of the examples: a permutation that (seed, epoch) alone decide, and batches of similar lengths."""

from __future__ import annotations

import datasets
import torch

from dllm_memdlm.training.epoch_order import EpochSampler, LongestFirst
from dllm_memdlm.training.example_ids import lengths_of

LENGTHS = [int(n) for n in torch.randint(5, 500, (256,), generator=torch.Generator().manual_seed(0))]


def order(epoch: int = 0, seed: int = 42, lengths: list[int] | None = None) -> list[int]:
    return list(EpochSampler(256, seed, lambda: epoch, lengths, batch_size=8))


def spread(indices: list[int]) -> float:
    """The mean difference between the longest and the shortest example of a batch of 8."""
    batches = [[LENGTHS[i] for i in indices[start : start + 8]] for start in range(0, 256, 8)]
    return sum(max(batch) - min(batch) for batch in batches) / len(batches)


def test_every_epoch_and_seed_has_an_order_of_its_own_and_keeps_it():
    for lengths in (None, LENGTHS):
        first = order(lengths=lengths)
        assert sorted(first) == list(range(256))
        torch.manual_seed(7)  # the global generator has no say
        assert order(lengths=lengths) == first
        assert order(epoch=1, lengths=lengths) != first
        assert order(seed=1, lengths=lengths) != first


def test_the_epoch_is_asked_for_when_it_begins():
    epoch = 0
    sampler = EpochSampler(256, 42, lambda: epoch)
    first = list(sampler)
    epoch = 3
    assert list(sampler) == order(epoch=3) != first
    assert len(sampler) == 256


def test_grouping_puts_similar_lengths_into_a_batch():
    assert spread(order(lengths=LENGTHS)) < 0.35 * spread(order())


def test_longest_first_is_sorted_by_length():
    sampler = LongestFirst(LENGTHS)
    assert [LENGTHS[i] for i in sampler] == sorted(LENGTHS, reverse=True)
    assert sorted(sampler) == list(range(256)) and len(sampler) == 256
    assert list(LongestFirst([3, 5, 3, 5])) == [1, 3, 0, 2]  # equal ones as they stand


def test_lengths_of_any_map_style_dataset():
    rows = [{"input_ids": [0] * n} for n in (3, 1, 2)]
    assert lengths_of(rows) == lengths_of(datasets.Dataset.from_list(rows)) == [3, 1, 2]
