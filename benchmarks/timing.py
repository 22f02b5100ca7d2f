"""Seconds of things that are compared, taken in turns so that a busy moment of the machine does not hit one alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Timed(NamedTuple):
    seconds: float  #: median
    repeats: int
    result: Any  #: of the last repeat


def side_by_side(cases: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Timed]:
    """Run every case once, then every case again, and so on."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    results = {}
    for _ in range(repeats):
        for name, case in cases.items():
            start = time.perf_counter()
            results[name] = case()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timed(statistics.median(seconds[name]), repeats, results[name]) for name in cases}
