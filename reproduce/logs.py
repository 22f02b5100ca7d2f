"""What training runs have logged, as points: one a value. And what is said of points over their seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dllm_memdlm.config import ConfigError


def logged(run: Path, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The values that a run logged under these keys. Raises ConfigError where the run has not ended."""
    try:
        history = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    except (FileNotFoundError, json.JSONDecodeError):
        raise ConfigError(f"{run}: no whole trainer_state.json, so the run did not finish") from None
    for key in keys:
        for row in history:
            if key in row:
                yield {"loss": key, "step": row["step"], "value": row[key]}


def last(points: pd.DataFrame, key: str) -> pd.Series:
    """The last value logged under a key, by seed. Raises ConfigError where none was."""
    found = points[points.loss == key].groupby("seed").value.last()
    if found.empty:
        raise ConfigError(f"no {key} was logged; expected a recipe that evaluates")
    return found


def tail(points: pd.DataFrame, key: str) -> pd.Series:
    """The mean of the last tenth, at least of one value, by seed: single training losses are noisy."""
    return points[points.loss == key].groupby("seed").value.agg(lambda v: v.iloc[-max(1, -(-len(v) // 10)) :].mean())


def first_step_at(curve: pd.Series, loss: float) -> float | None:
    """The step at which a curve (values by step) first comes down to `loss`, between two points on a straight line."""
    below = np.flatnonzero(curve <= loss)
    if not len(below):
        return None
    if (place := below[0]) == 0:
        return float(curve.index[0])
    (start, end), (above, under) = curve.index[place - 1 : place + 1], curve.iloc[place - 1 : place + 1]
    return start + (end - start) * (above - loss) / (above - under)


def said(values: pd.Series, digits: int = 3, sign: bool = False) -> str:
    """mean ± standard deviation over the seeds."""
    mean = f"{values.mean():{'+' if sign else ''}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std():.{digits}f}"


def against(points: pd.DataFrame, base: pd.DataFrame, value: str, *on: str) -> pd.DataFrame:
    """The points with `value` less that of `base` of the same seed, and the same `on`."""
    both = points.merge(base[["seed", *on, value]], on=["seed", *on], suffixes=("", "_base"))
    return both.assign(**{value: both[value] - both[f"{value}_base"]})
