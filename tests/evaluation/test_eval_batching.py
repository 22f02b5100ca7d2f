"""Batches of requests: their size, their order, their borders, and what happens when one does not fit."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from dllm_memdlm.evaluation.batching import CPU_TOKENS, Batches

CPU, GPU = torch.device("cpu"), torch.device("cuda")
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 MiB."


class Item(NamedTuple):
    number: int
    length: int = 1


class Work:
    """Answers each item with its double, and remembers the batches; more than `room` tokens do not fit."""

    def __init__(self, room: int = 10**9, error: Exception | None = None) -> None:
        self.room, self.error, self.tried = room, error or torch.OutOfMemoryError(OUT_OF_MEMORY), []

    def __call__(self, batch: list[Item]) -> list[int]:
        self.tried.append([item.number for item in batch])
        if sum(item.length for item in batch) > self.room:
            raise self.error
        return [2 * item.number for item in batch]


def sizes(work: Work, batches: Batches, lengths: list[int]) -> list[int]:
    """How many were tried at a time. Every item comes once, in order, with its own result."""
    items = [Item(number, length) for number, length in enumerate(lengths)]
    assert list(batches.run(work, items)) == [(item, 2 * item.number) for item in items]
    return [len(batch) for batch in work.tried]


@pytest.mark.parametrize(
    ("size", "most", "device", "lengths", "expected"),
    [
        (1, None, CPU, [10**6] * 3, [1] * 3),
        ("3", None, CPU, [10**6] * 7, [3, 3, 1]),
        (100, None, CPU, [10**6] * 7, [7]),
        ("auto", None, CPU, [], []),
        # the first item's length counts for all of a batch, as they are padded to it
        ("auto", None, CPU, [2 * CPU_TOKENS, *[CPU_TOKENS // 2] * 2, CPU_TOKENS // 5, *[1] * 100], [1, 2, 5, 64, 32]),
        ("auto:4", None, CPU, [CPU_TOKENS // 2] * 4, [2, 2]),
        ("auto", 10, CPU, [1] * 25, [10, 10, 5]),
        ("auto", 10, GPU, [1] * 25, [10, 10, 5]),
        ("auto", None, GPU, [10**7] * 70, [64, 6]),  # a GPU says itself when it is full
    ],
)
def test_sizes(size, most, device, lengths, expected):
    assert sizes(Work(), Batches(size, most, device), lengths) == expected


@pytest.mark.parametrize("size", ["auto", 64])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError(OUT_OF_MEMORY), RuntimeError(OUT_OF_MEMORY)])
def test_what_does_not_fit_is_halved_until_it_does(size, error):
    work = Work(room=999, error=error)
    assert sizes(work, Batches(size, None, GPU), [100] * 70) == [64, 32, 16, *[8] * 8, 6]
    assert work.tried[3] == list(range(8)), "it begins again where it failed"
    found = sizes(Work(256, error), Batches("auto", None, GPU), [100] * 4 + [50] * 4 + [10] * 20)
    assert found[:6] == [28, 14, 7, 3, 1, 1] and found[-2:] == [10, 10], "of shorter items as many tokens as fitted"


def test_what_is_not_a_matter_of_size():
    """Other errors, single items, and an answer too few. Results come as they are made."""
    work = Work()
    assert next(Batches(2, None, CPU).run(work, [Item(1), Item(2), Item(3)])) == (Item(1), 2) and work.tried == [[1, 2]]
    with pytest.raises(ValueError, match="shorter"):
        list(Batches(4, None, CPU).run(lambda batch: [0], [Item(1), Item(2)]))
    work = Work(room=0, error=RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        list(Batches(4, None, GPU).run(work, [Item(0), Item(1)]))
    assert len(work.tried) == 1
    with pytest.raises(torch.OutOfMemoryError):
        list(Batches(4, None, GPU).run(Work(room=0), [Item(0), Item(1)]))


@pytest.mark.parametrize(
    ("room", "tried"),
    [
        (9, [[1, 3, 5], [2, 4, 6, 8], [10], [7]]),
        (1, [[1, 3, 5], [1], [3], [5], [2], [4], [6], [8], [10], [7]]),
    ],
)
def test_a_batch_ends_where_the_items_differ(room, tried):
    work, items = Work(room), [Item(number) for number in (1, 3, 5, 2, 4, 6, 8, 10, 7)]
    found = list(Batches(4, None, GPU).run(work, items, alike=lambda item: item.number % 2))
    assert found == [(item, 2 * item.number) for item in items] and work.tried == tried
