"""From the command to a page: what is missing is trained and scored, and every number has its run."""

from __future__ import annotations

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
SETTINGS = (
    *("data.eval_size=2", "data.eval_fraction=0.5", "lora.dropout=0"),
    *("training.max_steps=4", "training.eval_steps=2", "training.logging_steps=1", "training.save_steps=4"),
    *("training.per_device_train_batch_size=4", "training.per_device_eval_batch_size=2"),
)


def reproduced(folder: Path, *given: str, settings: tuple[str, ...] = SETTINGS) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which becomes make; of one backbone, as each training takes its seconds."""
    argv = [*given, "--seeds", "1", "--jobs", "2", "--runs", str(folder / "runs"), "--reports", str(folder / "reports")]
    variables = {k: v for k, v in os.environ.items() if k not in (*LAUNCHED, "MAKEFLAGS")}
    variables |= {"HF_HOME": str(folder / "home"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    settings = (f"data.dataset={folder / 'rows.json'}", *settings)
    command = [sys.executable, "-m", "reproduce", "dropout", *argv, "--set", *settings]
    return subprocess.run(command, env=variables, cwd=RECIPES.parent, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[str]]:
    """Where it is, and what was printed."""
    folder = tmp_path_factory.mktemp("reproduced")
    (folder / "rows.json").write_text(json.dumps(needle_rows()), encoding="utf-8")
    done = reproduced(folder)
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
        assert point["case"] in point["run"]
        assert any(
            log["step"] == point["step"] and log.get(point["loss"]) == point["value"]
            for log in logs(Path(point["run"]))
        )
    counts = [sum(point["case"] == case for point in points) for case in ("mdlm", "dropout-0.5")]
    assert counts == [2, 4], "evaluated at 2 and at 4"


@pytest.mark.slow
def test_both_methods_see_the_same_data_under_the_same_masks(made):
    """Before the first update, what MemDLM loses without its fast weights is MDLM's loss."""
    mdlm, memdlm = (
        logs(next(made[0].glob(f"runs/cpu/llada_moe/scratch-{case}-1-*"))) for case in ("mdlm", "dropout-0")
    )
    first, other = (next(log for log in own if log["step"] == 1 and "loss" in log) for own in (mdlm, memdlm))
    # transformers 4.57 keeps four digits of a train loss
    assert round(first["loss"], 4) == round(other["loss_memory_off"], 4) != round(other["loss"], 4)


@pytest.mark.slow
def test_what_is_there_stays_and_another_recipe_has_folders_of_its_own(made):
    folder, before = made[0], {path: path.stat().st_mtime_ns for path in made[0].glob("runs/cpu/*/*/*")}
    done = reproduced(folder)
    assert done.returncode == 0 and done.stdout.splitlines() == made[1][-1:], "drawn again, and nothing run"
    (folder / "rows.json").rename(folder / "gone.json")
    done = reproduced(folder, settings=(*SETTINGS, "memory.rank=3"))
    (folder / "gone.json").rename(folder / "rows.json")
    assert done.returncode == 2 and "error: " in done.stderr and str(folder / "rows.json") in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}


# === without running anything ===


def error_of(capsys: pytest.CaptureFixture, *given: str) -> str:
    """The one line on stderr, after `error: `."""
    assert main(list(given)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: "), captured.err
    return captured.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("scale", SCALES)
def test_commands_are_shown_and_nothing_is_run(scale, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    targets = [target for target in FIGURES if scale == "cpu" or target != "dropout"]
    given = ["--scale", scale, "--runs", "somewhere", "--seeds", "7", "--set", "memory.rank=3", "--commands"]
    assert main([*targets, *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) > 10
    for line in lines:
        words = shlex.split(line)
        words = words[words.index("python") + 1 :]
        assert words[0] == "-m" and any(f"somewhere/{scale}/" in word for word in words), line
        if "dllm_memdlm.train" in words:
            recipe = next(word for word in words if word.endswith(".yaml"))
            assert Path(recipe).is_file(), "as seen from here"
            assert "memory.rank=3" in words and words[-1] == "--resume"
            assert "training.seed=7" in words or recipe.endswith("_base.yaml")
    assert list(tmp_path.iterdir()) == []


def test_what_is_unknown_is_refused_in_a_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert error_of(capsys, "figure4", "--scale", "huge") == "--scale huge: expected one of cpu, small, paper"
    for given, message in (
        (["figure5"], "unknown target 'figure5'; known: figure3, figure4"),
        (["figure4", "--jobs", "0"], "--jobs 0: expected at least 1"),
        (["figure4", "--questions", "-1"], "--questions -1: expected at least 1"),
        ([], "expected a target: figure3"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(given)
        assert stopped.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert "expected section.key=value" in error_of(capsys, "figure4", "--set", "training.max_steps")
    assert "training.max_stepps" in error_of(capsys, "figure4", "--set", "training.max_stepps=4")
    assert "--scale paper" in error_of(capsys, "dropout", "--scale", "paper", "--commands")
    assert "--questions 5" in error_of(capsys, "table1", "--questions", "5")
    assert "--runs a b" in error_of(capsys, "figure4", "--runs", "a b")
    assert "have not been run, such as " in error_of(capsys, "figure4", "--draw")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install '.[eval]'" in error_of(capsys, "table1")
    assert list(tmp_path.iterdir()) == []


def test_one_at_a_time_is_at_work_in_a_folder(capsys, tmp_path):
    hold = "import fcntl, sys, time; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX); "
    hold += "print(flush=True); time.sleep(100)"
    (tmp_path / "cpu").mkdir()
    argv = [sys.executable, "-c", hold, str(tmp_path / "cpu" / ".lock")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert error_of(capsys, "figure4", "--runs", str(tmp_path)).startswith(f"{tmp_path / 'cpu'}: another make")
        process.kill()


def test_help_does_not_wait_for_torch():
    code = "import json, sys; import reproduce.__main__; print(json.dumps('torch' in sys.modules))"
    assert fresh_python.printed(fresh_python.run("-c", code)) is False
