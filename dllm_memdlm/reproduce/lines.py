"""Line charts with a band over the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .curves import Spread

#: By label: colours that any colour vision tells apart, and dashes besides.
STYLES = {
    "before fine-tuning": {"color": "#b5b5b5", "linestyle": ":"},
    "MDLM": {"color": "#6b6b6b", "linestyle": "-"},
    "MemDLM, memory off": {"color": "#d55e00", "linestyle": "--", "zorder": 3},  # seen where the next one covers it
    "MemDLM, memory on": {"color": "#0072b2", "linestyle": "-"},
    "MemDLM": {"color": "#0072b2", "linestyle": "-"},
    "MemDLM, fast weights discarded": {"color": "#d55e00", "linestyle": "--"},
}

#: Colours of curves with other labels, in their order.
OTHERS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")


class Line(NamedTuple):
    """One curve: a number over the seeds at each place, a number or a name."""

    label: str
    places: Sequence[float | str]
    values: Sequence[Spread]


class Chart(NamedTuple):
    """One axis."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    zero: bool = False  #: whether to draw where nothing differs


def draw_lines(rows: Sequence[Sequence[Chart]], path: Path) -> None:
    """A PNG with a chart for each entry. Line: mean of the seeds; band: a standard deviation to each side."""
    from matplotlib.figure import Figure  # without pyplot, a PNG is always drawn by Agg and needs no display

    size = (0.5 + 3.6 * max(map(len, rows)), 0.6 + 2.9 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), max(map(len, rows)), squeeze=False)
    for axes, row in zip(grid, rows, strict=True):
        for ax, chart in zip(axes, row, strict=True):
            _draw(ax, chart)
    drawn = {line.get_label(): line for ax in grid.flat for line in ax.get_legend_handles_labels()[0]}
    figure.legend(
        handles=[*drawn.values()],
        loc="outside upper center",
        ncols=min(len(drawn), 3 * max(map(len, rows))),
        frameon=False,
    )
    figure.savefig(path, dpi=150)


def _draw(ax: Any, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_prop_cycle(color=OTHERS)
    if all(isinstance(place, int) for line in chart.lines for place in line.places):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chart.zero:
        ax.axhline(0, color="#6b6b6b", linewidth=1, label="_zero")
    for line in chart.lines:
        style = STYLES.get(line.label, {})
        means = [value.mean for value in line.values]
        (drawn,) = ax.plot(line.places, means, label=line.label, linewidth=2, marker="o", markersize=3, **style)
        if all(value.stdev is not None for value in line.values):
            low, high = ([v.mean + sign * v.stdev for v in line.values] for sign in (-1, 1))
            ax.fill_between(line.places, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
