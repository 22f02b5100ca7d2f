"""The rule for the inner learning rate: the rate that it names lowers the loss by as much, and nothing is trained."""

from __future__ import annotations

import json

import pytest
from data_files import message_of, needle_rows
from small_run import RECIPE

from reproduce.inner_rate import main, rate_of


def test_the_smallest_rate_at_which_the_loss_falls_by_a_tenth():
    assert rate_of(lambda rate: 2 - rate / 3, 1.8) == pytest.approx(0.6, rel=0.08)
    assert rate_of(lambda rate: 2 - rate / 3 if rate < 1.5 else 9.0, 1.8) == pytest.approx(0.6, rel=0.08)
    assert rate_of(lambda rate: 0.0, 1.8) == 1e-3
    assert message_of(rate_of, lambda rate: 2.0 if rate < 5 else float("nan"), 1.8).startswith("no inner rate")
    assert message_of(rate_of, lambda rate: 2.0, 1.8) == "no inner rate up to 100 lowers the loss to 1.8000"


def test_the_rate_of_a_recipe_is_found_before_it_trains(tmp_path, capsys):
    (tmp_path / "rows.json").write_text(json.dumps(needle_rows()), encoding="utf-8")
    (tmp_path / "small.yaml").write_text(RECIPE.replace("DATASET", str(tmp_path / "rows.json")), encoding="utf-8")
    given = [str(tmp_path / "small.yaml"), f"training.output_dir={tmp_path / 'run'}", "--fall", "0.01"]
    assert main(given) == 0
    *rows, line = capsys.readouterr().out.splitlines()
    rate = float(line.split()[1])
    falls = {float(row.split("│")[1]): float(row.split("│")[3].strip(" %")) for row in rows if "%" in row}
    assert line.startswith("memory.inner_lr: ") and falls[min(falls, key=lambda own: abs(own - rate))] >= 1
    assert not [*(tmp_path / "run").rglob("*.safetensors")], "nothing is trained"
    assert main([*given, "memory.enabled=false"]) == 2
    assert "memory.enabled=False: expected true" in capsys.readouterr().err
    assert main([*given[:2], "--fall", "1.5"]) == 2 and "in (0, 1)" in capsys.readouterr().err
