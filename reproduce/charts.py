"""Line and bar charts of numbers over seeds, in colours that any colour vision tells apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

BLUE, GREY, ORANGE = "#0072b2", "#6b6b6b", "#d55e00"
LIGHT = "#b9c6d2"  #: of the paper's bars, beside our strong ones

#: The curve the paper leaves out: MemDLM's slow weights alone.
DISCARDED = "MemDLM, fast weights discarded"

#: Lines by label, with dashes besides the colours.
STYLES = {
    "before fine-tuning": {"color": "#b5b5b5", "linestyle": ":"},
    "MDLM": {"color": GREY, "linestyle": "-"},
    "MemDLM": {"color": BLUE, "linestyle": "-"},
    DISCARDED: {"color": ORANGE, "linestyle": "--"},
    "MemDLM, memory off": {"color": ORANGE, "linestyle": "--", "zorder": 3},  # seen where the next one covers it
    "MemDLM, memory on": {"color": BLUE, "linestyle": "-"},
}

#: Colours of lines with other labels, in their order.
OTHERS = (BLUE, "#e69f00", "#009e73", "#cc79a7", ORANGE, "#56b4e9")


class Spread(NamedTuple):
    """A number over the seeds."""

    mean: float
    stdev: float | None  #: none for a single seed

    def text(self, digits: int = 3, sign: bool = False) -> str:
        """mean ± standard deviation."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.stdev is None else f"{mean} ± {self.stdev:.{digits}f}"


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of at least one value."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None)


class Line(NamedTuple):
    """One curve: a number over the seeds at each place, a number or a name."""

    label: str
    places: Sequence[float | str]
    values: Sequence[Spread]
    raw: Sequence[float] = ()  #: what `values` was smoothed from, drawn faintly


class Lines(NamedTuple):
    """A line chart: one axis."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    zero: bool = False  #: whether to draw where nothing differs


class Bar(NamedTuple):
    """One bar; no value leaves its place empty."""

    label: str
    value: Spread | None
    color: str = BLUE


class Bars(NamedTuple):
    """A bar chart: one axis."""

    title: str
    axis: str  #: what is measured, with its unit
    bars: Sequence[Bar]


def draw_lines(rows: Sequence[Sequence[Lines]], path: Path) -> None:
    """A PNG with a chart for each entry. Line: mean of the seeds; band: a standard deviation to each side."""
    across = max(map(len, rows))
    figure, grid = _grid(rows, (0.9 + 4.05 * across, 0.6 + 2.9 * len(rows)), _draw_lines)
    drawn = {line.get_label(): line for ax in grid.flat for line in ax.get_legend_handles_labels()[0]}
    columns = min(len(drawn), 3 * across) or 1
    figure.legend(handles=[*drawn.values()], loc="outside upper center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=150)


def draw_bars(rows: Sequence[Sequence[Bars]], path: Path) -> None:
    """A PNG with a chart for each entry, rows aligned; error bars are a standard deviation to each side."""
    heights = [max(len(chart.bars) for chart in row) + 1.6 for row in rows]
    figure, grid = _grid(rows, (1.0 + 3.3 * max(map(len, rows)), 0.3 * sum(heights)), _draw_bars, height_ratios=heights)
    for ax in grid[:, 1:].flat:  # a bar is named at the left of its row
        ax.set_yticklabels([])
    figure.savefig(path, dpi=150)


def _grid(
    rows: Sequence[Sequence[Any]], size: tuple[float, float], draw: Callable[[Any, Any], None], **layout: Any
) -> tuple[Any, Any]:
    """A figure of `size` in inches with a chart for each entry, and the array of its axes."""
    from matplotlib.figure import Figure  # without pyplot, a PNG is always drawn by Agg and needs no display

    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), max(map(len, rows)), squeeze=False, **layout)
    for axes, row in zip(grid, rows, strict=True):
        for ax, chart in zip(axes, row, strict=False):
            ax.spines[["top", "right"]].set_visible(False)
            draw(ax, chart)
        for ax in axes[len(row) :]:
            ax.set_axis_off()
    return figure, grid


def _draw_lines(ax: Any, chart: Lines) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    ax.set_prop_cycle(color=OTHERS)
    if all(isinstance(place, int) for line in chart.lines for place in line.places):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chart.zero:
        ax.axhline(0, color=GREY, linewidth=1, label="_zero")
    for line in chart.lines:
        marker, means = "" if line.raw else "o", [value.mean for value in line.values]
        style = {"label": line.label, "linewidth": 2, "marker": marker, "markersize": 3} | STYLES.get(line.label, {})
        (drawn,) = ax.plot(line.places, means, **style)
        if line.raw:
            ax.plot(line.places, line.raw, color=drawn.get_color(), alpha=0.25, linewidth=0.8, label="_raw")
        if all(value.stdev is not None for value in line.values):
            low, high = ([v.mean + sign * v.stdev for v in line.values] for sign in (-1, 1))
            ax.fill_between(line.places, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)


def _draw_bars(ax: Any, chart: Bars) -> None:
    places = range(len(chart.bars))
    for place, bar in zip(places, chart.bars, strict=True):
        if bar.value is not None:
            error = {"xerr": bar.value.stdev, "error_kw": {"linewidth": 1, "capsize": 2}}
            ax.barh(place, bar.value.mean, color=bar.color, **error)
    ax.set_yticks(places, [bar.label for bar in chart.bars])
    ax.set_ylim(len(chart.bars) - 0.5, -0.5)  # the first on top
    ax.locator_params(axis="x", nbins=5)
    ax.set_title(chart.title, fontsize=10, loc="left")
    ax.set_xlabel(chart.axis, fontsize=9)
    if all(bar.value is None for bar in chart.bars):
        ax.set_xticks([])
    else:
        ax.axvline(0, color="black", linewidth=0.8)
    ax.tick_params(labelsize=9)
