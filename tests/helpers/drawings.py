"""Runs made by hand to draw, and what was drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from reproduce.reporting import Run


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Those that are saved, which must not be blank."""
    saved, save = [], Figure.savefig

    def savefig(figure, path, **settings):
        saved.append(figure)
        save(figure, path, **settings)
        assert matplotlib.image.imread(path)[..., :3].var() > 1e-3

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def run_of(recipe: str, title: str = "LLaDA-MoE", **series: list[float]) -> Run:
    """Values logged at steps 10, 20, …"""
    rows = [{"step": 10 * (n + 1), key: value} for key, values in series.items() for n, value in enumerate(values)]
    return Run(recipe, Path("runs", recipe), rows, title)


def bands_of(ax: Any) -> dict[str, list[tuple[float, float]]]:
    """By colour, the corners of each band."""
    found = {to_hex(band.get_facecolor()): band.get_paths()[0].vertices for band in ax.collections}
    return {color: sorted(set(map(tuple, corners.round(6).tolist()))) for color, corners in found.items()}
