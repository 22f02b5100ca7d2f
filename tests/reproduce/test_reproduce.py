"""From the command to a page: what is missing is trained and scored, and every number has its run."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import fresh_python
import matplotlib.image
import pytest
from conftest import LAUNCHED
from data_files import needle_rows

from reproduce.__main__ import main
from reproduce.figures import FIGURES
from reproduce.scales import RECIPES, SCALES

#: A few steps on a few short texts, all of which is logged.
SETTINGS = ("data.eval_size=2", "data.eval_fraction=0.5", "lora.dropout=0", "training.max_steps=4")
SETTINGS += ("training.eval_steps=2", "training.logging_steps=1", "training.save_steps=4")
SETTINGS += ("training.per_device_train_batch_size=4", "training.per_device_eval_batch_size=2")


def reproduced(
    python: str, folder: Path, *given: str, settings: tuple[str, ...] = SETTINGS
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which becomes make; of one backbone, as each training takes its seconds."""
    argv = [*given, "--seeds", "1", "--jobs", "2", "--runs", str(folder / "runs"), "--reports", str(folder / "reports")]
    variables = {k: v for k, v in os.environ.items() if k not in (*LAUNCHED, "MAKEFLAGS")}
    variables |= {"HF_HOME": str(folder / "home"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    settings = (f"data.dataset={folder / 'rows.json'}", *settings)
    command = [python, "-m", "reproduce", "dropout", *argv, "--set", *settings]
    return subprocess.run(command, env=variables, cwd=RECIPES.parent, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory, warm_python) -> tuple[Path, list[str]]:
    """Where it is, and what was printed."""
    folder = tmp_path_factory.mktemp("reproduced")
    (folder / "rows.json").write_text(json.dumps(needle_rows()), encoding="utf-8")
    done = reproduced(warm_python, folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout.splitlines()


def logs(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


@pytest.mark.slow
def test_a_figure_is_a_picture_its_numbers_and_a_page(made):
    folder, (*commands, last) = made
    page, reports = (folder / "reports" / "dropout.md").read_text(encoding="utf-8"), folder / "reports"
    assert last == str(reports / "dropout.md") and len(commands) == 4
    assert all(line in page for line in commands) and "](dropout.png)" in page and "Changed in every recipe: " in page
    assert matplotlib.image.imread(reports / "dropout.png")[..., :3].var() > 1e-3
    assert "(dropout.md)" in (reports / "README.md").read_text(encoding="utf-8")
    points = list(map(json.loads, (reports / "dropout.jsonl").read_text(encoding="utf-8").splitlines()))
    for point in points:
        own = [log for log in logs(Path(point["run"])) if log["step"] == point["step"]]
        assert point["case"] in point["run"] and point["value"] in [log.get(point["loss"]) for log in own]
    counts = [sum(point["case"] == case for point in points) for case in ("mdlm", "dropout-0.5")]
    assert counts == [2, 4], "evaluated at 2 and at 4"


@pytest.mark.slow
def test_both_methods_see_the_same_data_under_the_same_masks(made):
    """Before the first update, what MemDLM loses without its fast weights is MDLM's loss."""
    folders = [next(made[0].glob(f"runs/cpu/llada_moe/scratch-{case}-1-*")) for case in ("mdlm", "dropout-0")]
    first, other = (next(log for log in logs(run) if log["step"] == 1 and "loss" in log) for run in folders)
    # transformers 4.57 keeps four digits of a train loss
    assert round(first["loss"], 4) == round(other["loss_memory_off"], 4) != round(other["loss"], 4)


@pytest.mark.slow
def test_what_is_there_stays_and_another_recipe_has_folders_of_its_own(made, warm_python):
    folder, before = made[0], {path: path.stat().st_mtime_ns for path in made[0].glob("runs/cpu/*/*/*")}
    done = reproduced(warm_python, folder)
    assert done.returncode == 0 and done.stdout.splitlines() == made[1][-1:], "drawn again, and nothing run"
    (folder / "rows.json").unlink()
    done = reproduced(warm_python, folder, settings=(*SETTINGS, "memory.rank=3"))
    assert done.returncode == 2 and "error: " in done.stderr and str(folder / "rows.json") in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("scale", SCALES)
def test_commands_are_shown_and_nothing_is_run(scale, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    targets = [target for target, figure in FIGURES.items() if scale in figure.scales]
    given = ["--scale", scale, "--runs", "somewhere", "--seeds", "7", "--set", "memory.rank=3", "--commands"]
    assert main([*targets, *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) > 10
    for line in lines:
        words = shlex.split(line.partition("python ")[2])
        assert words[0] == "-m" and any(f"somewhere/{scale}/" in word for word in words), line
        if "dllm_memdlm.train" in words:
            recipe = next(word for word in words if word.endswith(".yaml"))
            assert Path(recipe).is_file(), "as seen from here"
            assert "memory.rank=3" in words and words[-1] == "--resume"
            assert "training.seed=7" in words or recipe.endswith(("_base.yaml", "_words.yaml"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_unknown_is_refused_in_a_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "lm_eval" else find(name, *of))
    for given, says in (
        ("figure5", "unknown target 'figure5'; known: figure3, figure4"),
        ("figure4 --jobs 0", "--jobs 0: expected at least 1"),
        ("", "expected a target: figure3"),
        ("figure4 --scale huge", "--scale huge: expected one of demo, cpu, small, paper"),
        ("figure4 --set training.max_steps", "expected section.key=value"),
        ("figure4 --set training.max_stepps=4", "training.max_stepps"),
        ("dropout --scale paper --commands", "--scale paper: does not have dropout; expected cpu"),
        ("figure4 --scale demo", "--scale demo: does not have figure4; expected cpu or small or paper"),
        ("table1 --questions 5", "--questions 5"),
        ("figure4 --runs 'a b'", "--runs a b"),
        ("figure4 --draw", "have not been run, such as "),
        ("table1", "pip install '.[eval]'"),
    ):
        try:
            assert main(shlex.split(given)) == 2
        except SystemExit as stopped:
            assert stopped.code == 2
        *usage, line = capsys.readouterr().err.splitlines()
        assert "error: " in line and says in line and (not usage or usage[0].startswith("usage: "))
    assert list(tmp_path.iterdir()) == []


def test_one_at_a_time_is_at_work_in_a_folder(capsys, tmp_path):
    (tmp_path / "cpu").mkdir()
    with (tmp_path / "cpu" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["figure4", "--runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'cpu'}: another make")


def test_help_does_not_wait_for_torch():
    code = "import json, sys, reproduce.__main__, reproduce.needle; print(json.dumps('torch' in sys.modules))"
    assert fresh_python.printed(fresh_python.run("-c", code)) is False
