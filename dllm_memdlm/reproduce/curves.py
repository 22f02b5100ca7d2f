"""What training runs logged, put together over their seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from ..reporting import Run

Series = tuple[list[int], list[float]]  #: steps, and the values logged at them


class Spread(NamedTuple):
    """A number over the seeds."""

    mean: float
    stdev: float | None  #: none for a single seed
    count: int

    def text(self, digits: int = 3, sign: bool = False) -> str:
        """mean ± standard deviation."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.stdev is None else f"{mean} ± {self.stdev:.{digits}f}"


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of at least one value."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def first_step_at(series: Series, loss: float) -> float | None:
    """The optimizer step at which a loss curve first comes down to `loss`, between two points on a straight line."""
    before: tuple[int, float] | None = None
    for step, value in zip(*series, strict=True):
        if value <= loss:
            if before is None or before[1] == value:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (step, value)
    return None


def final(run: Run, key: str) -> float:
    """The last value that a run logged of something. Raises KeyError if it logged none."""
    values = run.series(key)[1]
    if not values:
        raise KeyError(f"{run.path} logged no {key}")
    return values[-1]
