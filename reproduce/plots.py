"""Lines and bars over the seeds, by matplotlib, in colours that any colour vision tells apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, GREY, ORANGE = "#0072b2", "#6b6b6b", "#d55e00"
LIGHT = "#b9c6d2"  #: of the paper's bars, beside our strong ones

#: The curve the paper leaves out: MemDLM's slow weights alone.
DISCARDED = "MemDLM, fast weights discarded"

#: Lines by label, with dashes besides the colours; others take the colours below in their order.
STYLES: dict[str, dict[str, Any]] = {
    "before fine-tuning": {"color": "#b5b5b5", "linestyle": ":"},
    "MDLM": {"color": GREY},
    "MemDLM": {"color": BLUE},
    DISCARDED: {"color": ORANGE, "linestyle": "--"},
    "MemDLM, memory off": {"color": ORANGE, "linestyle": "--", "zorder": 3},  # seen where the next one covers it
    "MemDLM, memory on": {"color": BLUE},
    "MemDLM, φ of the prompt": {"color": "#009e73"},
    "MemDLM, φ of another prompt": {"color": "#cc79a7", "linestyle": ":"},
    "MemDLM, another text's memory": {"color": "#cc79a7", "linestyle": ":", "zorder": 4},
}
OTHERS = (BLUE, "#e69f00", "#009e73", "#cc79a7", ORANGE, "#56b4e9")


def grid(rows: int, columns: int, size: tuple[float, float] = (4.05, 2.9), **layout: Any) -> tuple[Figure, Any]:
    """A figure and the array of its axes, each of `size` in inches."""
    from matplotlib.figure import Figure  # without pyplot, a PNG is always drawn by Agg and needs no display

    figure = Figure(figsize=(0.9 + size[0] * columns, 0.6 + size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **layout)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_prop_cycle(color=OTHERS)
    return figure, axes


def over_seeds(points: pd.DataFrame, by: str, value: str) -> pd.DataFrame:
    """mean and std of a value at each place of `by`, where all seeds have one, in the order of the points."""
    found = points.groupby(by, sort=False)[value].agg(["mean", "std", "count"])
    return found[found["count"] == found["count"].max()]


def line(ax: Axes, points: pd.DataFrame, by: str, value: str, label: str, noisy: bool = False) -> None:
    """Draw the mean of the seeds, in a band of a standard deviation to each side.

    What is noisy is smoothed, each seed by itself: a running mean over a tenth of it. Its own mean is drawn faintly.
    """
    if points.empty:
        return
    raw = over_seeds(points, by, value)
    if pd.api.types.is_integer_dtype(raw.index):
        ax.locator_params(axis="x", integer=True)
    if noisy:
        width = 2 * (len(raw) // 20) + 1
        smooth = points.groupby("seed")[value].transform(lambda v: v.rolling(width, center=True, min_periods=1).mean())
        points = points.assign(**{value: smooth})
    found = over_seeds(points, by, value)
    style = {"label": label, "linewidth": 2, "marker": "" if noisy else "o", "markersize": 3} | STYLES.get(label, {})
    (drawn,) = ax.plot(found.index, found["mean"], **style)
    if noisy:
        ax.plot(raw.index, raw["mean"], color=drawn.get_color(), alpha=0.25, linewidth=0.8, label="_raw")
    if found["std"].notna().all():
        low, high = found["mean"] - found["std"], found["mean"] + found["std"]
        ax.fill_between(found.index, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)


def columns(ax: Axes, groups: dict[str, dict[str, pd.Series]]) -> None:
    """Draw a group of columns for each label, one for the mean over the seeds of each of its series."""
    names = list(next(iter(groups.values())))
    for number, (name, color) in enumerate(zip(names, (LIGHT, GREY, BLUE), strict=False)):
        for place, group in enumerate(groups.values()):
            seeds = group[name]
            spread = {"yerr": seeds.std(), "error_kw": {"linewidth": 1, "capsize": 2}} if len(seeds) > 1 else {}
            x, label = place + 0.27 * (number - (len(names) - 1) / 2), name if place == 0 else None
            ax.bar(x, seeds.mean(), 0.25, color=color, label=label, **spread)
            ax.annotate(f"{seeds.mean():.0f}", (x, seeds.mean()), ha="center", va="bottom", fontsize=8)
    ax.set_xticks(range(len(groups)), [label.replace(", ", ",\n") for label in groups], fontsize=9)


def bars(ax: Axes, labels: Sequence[str], values: Sequence[Sequence[float]], color: str) -> None:
    """Draw a bar for the mean over the seeds of each of `values`, an empty place where there are none."""
    for place, seeds in enumerate(map(pd.Series, values)):
        if len(seeds):
            spread = {"xerr": seeds.std(), "error_kw": {"linewidth": 1, "capsize": 2}} if len(seeds) > 1 else {}
            ax.barh(place, seeds.mean(), color=color, **spread)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.locator_params(axis="x", nbins=5)
    ax.tick_params(labelsize=9)
    if any(map(len, values)):
        ax.axvline(0, color="black", linewidth=0.8)
    else:
        ax.set_xticks([])


def save(figure: Figure, path: Path) -> None:
    """Write a PNG with one legend for all of its lines."""
    drawn = {line.get_label(): line for ax in figure.axes for line in ax.get_legend_handles_labels()[0]}
    columns = {ax.get_subplotspec().colspan.start for ax in figure.axes}
    if drawn:
        rows = 1 if sum(map(len, drawn)) <= 34 * len(columns) else 2  # about so many letters fit above an axes
        place = {"loc": "outside upper center", "ncols": -(-len(drawn) // rows), "frameon": False}
        figure.legend(handles=[*drawn.values()], **place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
