"""Seconds of things that are compared, taken in turns so that a busy moment of the machine does not hit one alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from .device import finish
from .report import Range

Clock = Literal["wall", "cpu"]


@dataclass
class Timed:
    """How long one thing took, every time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  #: of all threads together
    result: Any = None  #: of the last repeat

    @property
    def seconds(self) -> float:
        """Median of the wall times."""
        return self.median("wall")

    def median(self, clock: Clock) -> float:
        return statistics.median(getattr(self, clock))

    def ratio(self, other: Timed, clock: Clock = "wall") -> Range:
        """How many times as long as the other, turn by turn."""
        turns = [mine / its for mine, its in zip(getattr(self, clock), getattr(other, clock), strict=True)]
        return Range(statistics.median(turns), min(turns), max(turns))


def side_by_side(cases: dict[str, Callable[[], Any]], repeats: int, warm: bool = False) -> dict[str, Timed]:
    """Run every case once, then every case again, and so on. `warm`: once before, untimed."""
    for case in cases.values() if warm else ():
        case()
    timed = {name: Timed() for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            wall, cpu = time.perf_counter(), time.process_time()
            timed[name].result = case()
            timed[name].wall.append(time.perf_counter() - wall)
            timed[name].cpu.append(time.process_time() - cpu)
    return timed


class Rates(NamedTuple):
    """What a device reaches in the simplest case."""

    flops: float  #: a second, in the product of two large square matrices
    bytes: float  #: a second, in a copy: read and written


def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best of ten each."""
    width, size = (8192, 2**30) if device.type == "cuda" else (1024, 2**26)
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    product, copy = _fastest(lambda: a @ b, device), _fastest(lambda: target.copy_(source), device)
    return Rates(2 * width**3 / product, 2 * size / copy)


def _fastest(work: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(10):
        finish(device)
        start = time.perf_counter()
        work()
        finish(device)
        times.append(time.perf_counter() - start)
    return min(times)
