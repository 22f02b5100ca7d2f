"""Bar charts with the paper's bars beside ours, in the colours of the curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .curves import Spread

#: Colours that any colour vision tells apart: the paper's bars are light, ours strong.
OURS, PAPERS, BASELINE = "#0072b2", "#b9c6d2", "#6b6b6b"


class Bar(NamedTuple):
    """One bar; no value leaves its place empty."""

    label: str
    value: Spread | None
    color: str = OURS


class Panel(NamedTuple):
    """A group of bars on one axis."""

    title: str
    axis: str  #: what is measured, with its unit
    bars: Sequence[Bar]


def draw_bars(rows: Sequence[Sequence[Panel]], path: Path) -> None:
    """A PNG with a panel for each entry, rows aligned; error bars are a standard deviation to each side."""
    from matplotlib.figure import Figure  # without pyplot, a PNG is always drawn by Agg and needs no display

    heights = [max(len(panel.bars) for panel in row) + 1.6 for row in rows]
    figure = Figure(figsize=(4.6 * max(map(len, rows)), 0.3 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(rows), max(map(len, rows)), squeeze=False, height_ratios=heights)
    for axes, row in zip(grid, rows, strict=True):
        for ax, panel in zip(axes, row, strict=False):
            _draw(ax, panel, labelled=ax is axes[0])
        for ax in axes[len(row) :]:
            ax.set_axis_off()
    figure.savefig(path, dpi=150)


def _draw(ax: Any, panel: Panel, labelled: bool) -> None:
    places = range(len(panel.bars))
    for place, bar in zip(places, panel.bars, strict=True):
        if bar.value is None:
            continue
        ax.barh(place, bar.value.mean, color=bar.color, xerr=bar.value.stdev, error_kw={"linewidth": 1, "capsize": 2})
    ax.set_yticks(places, [bar.label if labelled else "" for bar in panel.bars])
    ax.invert_yaxis()
    ax.set_title(panel.title, fontsize=10, loc="left")
    ax.set_xlabel(panel.axis, fontsize=9)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.tick_params(labelsize=9)
    ax.spines[["top", "right"]].set_visible(False)
