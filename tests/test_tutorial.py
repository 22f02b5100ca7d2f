"""docs/tutorial.ipynb runs from top to bottom, and what it shows is what is kept in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


def shown(notebook: Any) -> list[str]:
    """What each cell prints, but for bars of progress, and cells whose words may vary by processor."""
    cells = [cell for cell in notebook.cells if "varies" not in cell.metadata.get("tags", [])]
    outputs = [[own for own in cell.get("outputs", []) if own.get("name") != "stderr"] for cell in cells]
    return ["".join("".join(own.get("text", "")) for own in cell) for cell in outputs]


@pytest.mark.tutorial
def test_the_tutorial_shows_what_it_says(tmp_path, monkeypatch):
    """Words are the same, and numbers nearly: processors round differently."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    kept = nbformat.read(NOTEBOOK, as_version=4)
    run = nbformat.read(NOTEBOOK, as_version=4)
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(run, timeout=900, kernel_name="python3", resources=folder).execute()
    for now, before in zip(shown(run), shown(kept), strict=True):
        assert NUMBER.sub("#", now).split() == NUMBER.sub("#", before).split()
        for one, other in zip(NUMBER.findall(now), NUMBER.findall(before), strict=True):
            assert float(one.replace(",", "")) == pytest.approx(float(other.replace(",", "")), rel=0.1)
    pictures = sum("image/png" in output.get("data", {}) for cell in run.cells for output in cell.get("outputs", []))
    assert pictures == 2
