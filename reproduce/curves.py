"""What training runs logged, put together over their seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dllm_memdlm.config import ConfigError

from .charts import Spread, spread
from .reporting import Run

Series = tuple[list[int], list[float]]  #: steps, and the values logged at them


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
