"""Batches of requests: their size, their order, their borders, and what happens when one does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dllm_memdlm.evaluation.batching import CPU_TOKENS, Batches

CPU, GPU = torch.device("cpu"), torch.device("cuda")
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 MiB."


class Work:
    """Answers each item with its double, and remembers the batches; more than `room` items do not fit."""

    def __init__(self, room: int = 10**9, error: Exception | None = None) -> None:
        self.room, self.error, self.tried = room, error or torch.OutOfMemoryError(OUT_OF_MEMORY), []

    def __call__(self, batch: list[int]) -> list[int]:
        self.tried.append(list(batch))
        if len(batch) > self.room:
            raise self.error
        return [2 * item for item in batch]

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.tried]


def run(work: Work, batches: Batches, items: list[int], length: Callable[[int], int] | None = None, **kw: Any) -> None:
    """Every item once, in order, with its own result."""
    found = list(batches.run(work, items, length or (lambda item: 1), **kw))
    assert found == [(item, 2 * item) for item in items]


@pytest.mark.parametrize("size", [1, 3, "3", 100])
def test_a_fixed_size(size):
    work = Work()
    run(work, Batches(size, None, CPU), list(range(7)), length=lambda item: 10**6)
    assert work.sizes == {"1": [1] * 7, "3": [3, 3, 1], "100": [7]}[str(size)]


def test_no_items_is_no_work():
    work = Work()
    run(work, Batches("auto", None, CPU), [])
    assert work.tried == []


@pytest.mark.parametrize("size", ["auto", "auto:4"])
def test_auto_on_a_cpu_goes_by_tokens(size):
    work = Work()
    lengths = [CPU_TOKENS * 2, CPU_TOKENS // 2, CPU_TOKENS // 2, CPU_TOKENS // 5, *[1] * 100]
    run(work, Batches(size, None, CPU), list(range(104)), length=lengths.__getitem__)
    assert work.sizes == [1, 2, 5, 64, 32], "the first item's length counts for all, as they are padded to it"


def test_auto_tries_no_more_than_it_is_told():
    for device in (CPU, GPU):
        work = Work()
        run(work, Batches("auto", 10, device), list(range(25)))
        assert work.sizes == [10, 10, 5]
    work = Work()
    run(work, Batches("auto", None, GPU), list(range(70)), length=lambda item: 10**9)
    assert work.sizes == [64, 6], "a GPU says itself when it is full"


@pytest.mark.parametrize("size", ["auto", 64])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError(OUT_OF_MEMORY), RuntimeError(OUT_OF_MEMORY)])
def test_what_does_not_fit_is_halved_until_it_does(size, error):
    work = Work(room=9, error=error)
    run(work, Batches(size, None, GPU), list(range(70)), length=lambda item: 100)
    assert work.sizes == [64, 32, 16, *[8] * 8, 6]
    assert work.tried[3] == list(range(8)), "it begins again where it failed"


def test_shorter_items_make_larger_batches_again():
    work = Work(room=2)
    lengths = [100] * 4 + [50] * 4 + [10] * 20
    seen = []

    def fits(batch: list[int]) -> list[int]:
        seen.append(len(batch))
        work.room = 256 // lengths[batch[0]]
        return work(batch)

    found = list(Batches("auto", None, GPU).run(fits, list(range(28)), lengths.__getitem__))
    assert [item for item, _ in found] == list(range(28))
    assert seen == [28, 14, 7, 3, 1, 1, 1, 1, 2, 2, 10, 10], "as many tokens as fitted"


def test_one_item_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        list(Batches(4, None, GPU).run(Work(room=0), [1, 2, 3], lambda item: 1))


def test_other_errors_are_not_a_matter_of_size():
    work = Work(room=0, error=RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        list(Batches(4, None, GPU).run(work, [1, 2, 3], lambda item: 1))
    assert work.sizes == [3]


def test_a_batch_ends_where_the_items_differ():
    work = Work()
    run(work, Batches(4, None, CPU), [1, 3, 5, 2, 4, 6, 8, 10, 7], alike=lambda item: item % 2)
    assert work.tried == [[1, 3, 5], [2, 4, 6, 8], [10], [7]]


def test_borders_and_halving_together():
    work = Work(room=1)
    run(work, Batches(4, None, GPU), [1, 3, 5, 2, 4], alike=lambda item: item % 2)
    assert all(len({item % 2 for item in batch}) == 1 for batch in work.tried)
    assert work.tried == [[1, 3, 5], [1], [3], [5], [2], [4]]


def test_as_many_results_as_items():
    with pytest.raises(ValueError, match="shorter"):
        list(Batches(4, None, CPU).run(lambda batch: [0], [1, 2], lambda item: 1))


def test_results_come_as_they_are_made():
    work, batches = Work(), Batches(2, None, CPU)
    results = batches.run(work, [1, 2, 3, 4], lambda item: 1)
    assert next(results) == (1, 2) and work.tried == [[1, 2]]
