"""The demo: it trains, scores and asks by real commands, cut to seconds; and how it marks what is said."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import LAUNCHED
from data_files import needle_rows

from reproduce import demo
from reproduce.needle import plant
from reproduce.scales import RECIPES

#: Four steps each.
TINY = ("training.max_steps=4", "training.eval_steps=4", "training.save_steps=4", "data.eval_size=2")
TINY += ("training.per_device_train_batch_size=2", "data.eval_fraction=0.5", "memory.rank=2")


@pytest.mark.slow
def test_it_runs_and_goes_on_where_it_was_stopped(tmp_path, warm_python, monkeypatch, capfd):
    (tmp_path / "data").mkdir()
    for name in ("needles-32-64", "needles-40"):
        lines = "\n".join(map(json.dumps, needle_rows()))
        (tmp_path / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(RECIPES.parent), *filter(None, sys.path)]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "QUICK", TINY)
    monkeypatch.setattr(demo.sys, "executable", warm_python)
    assert demo.main(["--quick", "--runs", "runs"]) == 0, capfd.readouterr().err
    out = capfd.readouterr().out
    assert out.count("python -m dllm_memdlm.train ") == 5 and out.count("python -m reproduce.needle ") == 9
    assert Path("runs/quick/report/documents-demo.png").is_file() and "Right answers, %" in out
    assert out.count("memory off") == out.count("memory on ") == demo.DOCUMENTS
    (line,) = (line for line in out.splitlines() if line.strip().startswith("memdlm generate "))
    assert Path("runs/quick/document.txt").read_text() in out and "--prompt-file runs/quick/document.txt" in line
    assert demo.main(["--quick", "--runs", "runs"]) == 0
    again = capfd.readouterr().out
    assert "dllm_memdlm.train" not in again and again.count("memory off") == demo.DOCUMENTS
    # what fails is said in a line, and where to look
    for log in Path("runs").glob("quick/demo/*/*/done"):
        log.unlink()
    for name in Path("data").iterdir():
        name.unlink()
    assert demo.main(["--quick", "--runs", "runs"]) == 2
    assert "runs/quick/*/*/*/log.txt" in capfd.readouterr().err.splitlines()[-1]


def test_answers_are_marked():
    planted = plant(["Ann wrote a book."], 30, 3)
    (first, right), (second, _), (third, other) = planted.values.items()
    text = demo.marked(f"Named: {first} {right} {third} not{other}", planted, visible={first, second})
    assert text.plain.split("  ")[:3] == [f"{first} {right} ✓", f"{second} - ✗", f"{third} not{other}* ✗"]
    assert [span.style for span in text.spans] == ["green", "red", "red"]
