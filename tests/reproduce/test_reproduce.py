"""From the command to a page: what is missing is trained and scored, and every number has its run; and the demo."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fresh_python
import matplotlib.image
import pytest
from conftest import LAUNCHED
from data_files import needle_rows

from reproduce import demo
from reproduce.__main__ import main
from reproduce.needle import plant
from reproduce.scales import RECIPES, SCALES

#: A few steps on a few short texts, all of which is logged.
TINY = ("training.max_steps=4", "training.eval_steps=4", "training.save_steps=4", "training.logging_steps=1")
TINY += ("training.per_device_train_batch_size=2", "data.eval_size=2", "data.eval_fraction=0.5", "memory.rank=2")


@contextlib.contextmanager
def at_work(folder: Path, python: str) -> Iterator[None]:
    """In a folder with the data, from a shell, where an interpreter has imported everything."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (*LAUNCHED, "MAKEFLAGS"):
            patch.delenv(name, raising=False)
        patch.setenv("HF_HOME", str(folder / "home"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(RECIPES.parent), *filter(None, sys.path)]))
        patch.setattr(sys, "executable", python)
        patch.chdir(folder)
        yield


def reproduced(*settings: str) -> subprocess.CompletedProcess[str]:
    """What the demo trains and scores, by a command in a process of its own, which becomes make."""
    given = ["documents", "--scale", "demo", "--jobs", "2", "--runs", "runs/quick", "--reports", "runs/quick/report"]
    command = [sys.executable, "-m", "reproduce", *given, "--set", *TINY, *settings]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory, warm_python) -> tuple[Path, list[str]]:
    """Where it is, and what was printed."""
    folder = tmp_path_factory.mktemp("reproduced")
    (folder / "data").mkdir()
    for name in ("needles-32-64", "needles-40"):
        rows = "\n".join(map(json.dumps, needle_rows()))
        (folder / "data" / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    with at_work(folder, warm_python):
        done = reproduced()
    assert done.returncode == 0, done.stderr
    return folder, done.stdout.splitlines()


def logs(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


@pytest.mark.slow
def test_a_figure_is_a_picture_its_numbers_and_a_page(made):
    folder, (*commands, last) = made
    reports = folder / "runs" / "quick" / "report"
    page = (reports / "documents-demo.md").read_text(encoding="utf-8")
    assert last == "runs/quick/report/documents-demo.md" and "](documents-demo.png)" in page
    modules = [line.partition(" -m ")[2].split()[0] for line in commands]
    assert (modules.count("dllm_memdlm.train"), modules.count("reproduce.needle"), len(modules)) == (5, 9, 14)
    assert all(line in page for line in commands) and "Changed in every recipe: " in page
    assert matplotlib.image.imread(reports / "documents-demo.png")[..., :3].var() > 1e-3
    assert "(documents-demo.md)" in (reports / "README.md").read_text(encoding="utf-8")
    points = list(map(json.loads, (reports / "documents-demo.jsonl").read_text(encoding="utf-8").splitlines()))
    for point in points:
        if "loss" in point:
            own = [log for log in logs(folder / point["run"]) if log["step"] == point["step"]]
            assert point["value"] in [log.get(point["loss"]) for log in own]
    counts = [sum(point["way"] == way and point.get("loss") == "eval_loss" for point in points) for way in demo.WAYS]
    assert counts == [2, 2, 2], "evaluated at the start and at the end"


@pytest.mark.slow
def test_both_methods_see_the_same_data_under_the_same_masks(made):
    """Before the first update, what MemDLM loses without its fast weights is MDLM's loss."""
    mdlm, memdlm = (logs(next(made[0].glob(f"runs/quick/demo/llada_moe/{m}-42-*"))) for m in ("mdlm", "memdlm"))
    assert mdlm[0]["eval_loss"] == memdlm[0]["eval_loss_memory_off"] != memdlm[0]["eval_loss"]
    first, other = (next(log for log in own if log["step"] == 1 and "loss" in log) for own in (mdlm, memdlm))
    assert first["prompt_nll"] == other["prompt_nll"] and first["loss"] != other["loss"]


@pytest.mark.slow
def test_what_is_there_stays_and_another_recipe_has_folders_of_its_own(made, warm_python):
    before = {path: path.stat().st_mtime_ns for path in made[0].glob("runs/quick/demo/*/*/*")}
    with at_work(made[0], warm_python):
        done, other = reproduced(), reproduced("data.dataset=data/gone.jsonl")
    assert done.returncode == 0 and done.stdout.splitlines() == made[1][-1:], "drawn again, and nothing run"
    assert other.returncode == 2 and "error: data.dataset='data/gone.jsonl': " in other.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.slow
def test_the_demo_asks_what_was_trained(made, warm_python, monkeypatch, capfd):
    with at_work(made[0], warm_python):
        monkeypatch.setattr(demo, "QUICK", TINY)
        assert demo.main(["--quick", "--runs", "runs"]) == 0, capfd.readouterr().err
        out = capfd.readouterr().out
        assert "dllm_memdlm.train" not in out, "all is there"
        assert "runs/quick/report/documents-demo.png" in out and "Right answers, %" in out
        assert out.count("memory off") == out.count("memory on ") == demo.DOCUMENTS
        (line,) = (line for line in out.splitlines() if line.strip().startswith("memdlm generate "))
        assert Path("runs/quick/document.txt").read_text() in out and "--prompt-file runs/quick/document.txt" in line
        # what fails is said in a line, and where to look
        monkeypatch.setattr(demo, "QUICK", (*TINY, "data.dataset=data/gone.jsonl"))
        assert demo.main(["--quick", "--runs", "runs"]) == 2
    assert "runs/quick/*/*/*/log.txt" in capfd.readouterr().err.splitlines()[-1]


def test_answers_of_the_demo_are_marked():
    planted = plant(["Ann wrote a book."], 30, 3)
    (first, right), (second, _), (third, other) = planted.values.items()
    text = demo.marked(f"Named: {first} {right} {third} not{other}", planted, visible={first, second})
    assert text.plain.split("  ")[:3] == [f"{first} {right} ✓", f"{second} - ✗", f"{third} not{other}* ✗"]
    assert [span.style for span in text.spans] == ["green", "red", "red"]


@pytest.mark.parametrize("scale", SCALES)
def test_commands_are_shown_and_nothing_is_run(scale, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--scale", scale, "--runs", "somewhere", "--seeds", "7", "--set", "memory.rank=3", "--commands"]
    assert main(given) == 0
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
        ("figure5", "unknown target 'figure5'; known: figure4, figure3"),
        ("figure4 --jobs 0", "--jobs 0: expected at least 1"),
        ("figure4 --scale huge", "--scale: invalid choice: 'huge' (choose from "),
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
