"""The table of figures and tables: what each needs, and how it is drawn.

A new one is an entry of FIGURES: cases, and a function that draws their points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from . import cases, documents, draw, dropout
from .cases import PAPER, Case
from .draw import Drawn
from .scales import Scale
from .scores import DOCUMENTS


class Figure(NamedTuple):
    """A figure or table of the paper."""

    title: str
    cases: Callable[[Scale], Iterator[Case]]
    draw: Callable[[Scale, pd.DataFrame, Path], Drawn]  #: the points of the cases, to a PNG file
    scales: tuple[str, ...] = ("cpu", "small", "paper")  #: that have it


FIGURES = {
    "figure4": Figure("Training dynamics (figure 4)", cases.pairs, draw.dynamics),
    "figure3": Figure("Before and after fine-tuning, by context length (figure 3)", cases.by_length, draw.by_length),
    "figure7": Figure("Anchor ratio at inference (figure 7)", cases.by_ratio, draw.by_ratio),
    "figure11": Figure("Exposure bias (figure 11)", cases.exposed, draw.exposed),
    "ablations": Figure("Ablations (figures 5 to 10)", cases.ablated, draw.ablated),
    **{
        name: Figure(PAPER[name]["title"], partial(cases.table, name), partial(draw.table, name))
        for name in ("table1", "table2", "table3")
    },
    # Not the paper's: what it takes to read documents longer than the context, and memory dropout, from scratch
    "documents": Figure(
        "A document longer than what the model sees (ours)", documents.cases, documents.draw, tuple(DOCUMENTS)
    ),
    "further": Figure("How far a memory of prompts goes (ours)", documents.further, documents.draw_further, ("cpu",)),
    "dropout": Figure("Memory dropout, from scratch (ours)", dropout.cases, dropout.draw, ("cpu",)),
}
