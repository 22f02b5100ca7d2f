"""What was drawn."""

from __future__ import annotations

from typing import Any

import matplotlib.image
import pytest
from matplotlib.figure import Figure


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


def lines_of(ax: Any) -> dict[str, list[list[float]]]:
    """By label, the points of each line."""
    return {line.get_label(): line.get_xydata().round(6).tolist() for line in ax.get_lines()}
