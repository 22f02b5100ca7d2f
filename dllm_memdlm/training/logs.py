"""What a training run logs beyond the loss: running means that the device is not waited for, and the clock."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

import torch
import transformers
from torch import Tensor


class Averages:
    """Running means and counts of tensors on the device: nothing is waited for until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  #: of a mean [sum, number of values], of a count the number

    def add(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Add values of any shape to a mean, those at which `where` holds."""
        values = values.detach().float()
        where = torch.ones_like(values, dtype=torch.bool) if where is None else where
        self.count(name, torch.stack([values.where(where, 0).sum(), where.sum()]))

    def count(self, name: str, number: Tensor) -> None:
        """Add to a count."""
        self._sums[name] = self._sums.get(name, 0) + number

    def pop(self, accelerator: Any) -> dict[str, float]:
        """Return means and counts over all processes since the last call."""
        logs: dict[str, float] = {}
        for name, sums in self._sums.items():
            found = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
            if not isinstance(found, list):
                logs[name] = found
            elif found[1]:
                logs[name] = found[0] / found[1]
        self._sums = {}
        return logs


class EpochClock(transformers.TrainerCallback):
    """Tells the collator the epoch, and the log the seconds of an optimizer step (without data, logs, evaluation)."""

    def __init__(self, collator: Any, averages: Averages) -> None:
        self.collator, self.averages = collator, averages

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.next_epoch = math.floor(state.epoch or 0)
        self.first_step = state.global_step  #: of this session: what a run goes on from
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=args.device)  #: of all its batches here
        #: When the steps since the last log began and ended; the last of them, where nothing is logged.
        self.steps: deque[tuple[Any, Any]] = deque(maxlen=1000)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Counted, as state.epoch is no epoch where the length of the data is not known.
        self.collator.set_epoch(self.next_epoch)
        self.next_epoch += 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append((_now(args.device), None))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[-1] = self.steps[-1][0], _now(args.device)

    def note_seconds(self) -> None:
        """Put the seconds of the steps since the last log into it. Waits for the device."""
        for start, end in self.steps:
            if end is None:  # it is under way
                continue
            if isinstance(end, float):
                seconds = end - start
            else:
                end.synchronize()
                seconds = start.elapsed_time(end) / 1000
            self.averages.add("step_seconds", torch.tensor(seconds))
        self.steps.clear()


def _now(device: torch.device) -> float | torch.cuda.Event:
    """The time; on a GPU what the GPU will note when it gets there, as the host runs ahead of it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
