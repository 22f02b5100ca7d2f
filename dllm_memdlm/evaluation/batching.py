"""Batches of requests: of a fixed size, or as many as fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size


class HasLength(Protocol):
    @property
    def length(self) -> int: ...  # tokens


Item = TypeVar("Item", bound=HasLength)

#: Tokens of a batch that `auto` makes on a CPU, where memory does not say when to stop, and more do not make it faster.
CPU_TOKENS = 8192


class Batches:
    """Splits requests into batches, and halves those that do not fit into the GPU's memory.

    Args:
        size: requests in a batch, or auto (lm-eval's auto:N is the same: what fits is found as it goes).
        most: the most that auto tries; 64 if none.
        device: where they run.
    """

    def __init__(self, size: int | str, most: int | None, device: torch.device) -> None:
        auto = str(size).startswith("auto")
        self.size = (most or 64) if auto else int(size)
        self.tokens = CPU_TOKENS if auto and device.type == "cpu" else None  #: the most in one batch, padding included

    def run(
        self,
        work: Callable[[list[Item]], list[Any]],
        items: Sequence[Item],
        alike: Callable[[Item], Any] = lambda item: None,
    ) -> Iterator[tuple[Item, Any]]:
        """Do the work batch by batch; yield each item with its result, in order.

        Args:
            work: gives one result for each item of a batch.
            items: of a `length` in tokens, in the order they are taken; the longest first, so that what does not fit
                shows at once.
            alike: a batch ends where this changes.
        """
        start = 0
        while start < len(items):
            longest, kind = items[start].length, alike(items[start])
            size = self.size if self.tokens is None else min(self.size, max(1, self.tokens // longest))
            batch = list(items[start : start + size])
            batch = batch[: next((i for i, item in enumerate(batch) if alike(item) != kind), len(batch))]
            try:
                results = work(batch)
            except RuntimeError as error:
                if len(batch) == 1 or not should_reduce_batch_size(error):
                    raise
                results = None
            if results is None:  # outside the handler, whose traceback keeps the tensors of the failed batch
                self.tokens = len(batch) // 2 * longest
                torch.cuda.empty_cache()
                continue
            yield from zip(batch, results, strict=True)
            start += len(batch)
