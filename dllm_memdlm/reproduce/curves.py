"""What training runs logged, put together over their seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from ..config import ConfigError
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


def over_seeds(points: Sequence[Mapping[str, Any]], key: str, **where: Any) -> Spread:
    """A number of those points whose fields are `where`: one for each seed."""
    return spread([point[key] for point in points if all(point[name] == value for name, value in where.items())])


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
    """The last value that a run logged of something. Raises ConfigError if it logged none."""
    values = run.series(key)[1]
    if not values:
        raise ConfigError(f"{run.path}: no {key} was logged; expected a recipe that evaluates")
    return values[-1]
