"""Commands as rules for make: whose result is in a folder, what is run, and what a failure says."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from reproduce.steps import FOLDER, Step, in_order

#: Notes each of its runs beside its folder, as what is in it may be removed.
NOTE = "import os, sys, time; own = sys.argv[1]; open(own + '.runs', 'a').write('x'); "


def step(folder: Path, name: str = "a", code: str = "", *words: str, made_from: object = 1, **fields) -> Step:
    return Step.of(folder / name, ("-c", NOTE + code, FOLDER, *words), made_from, folder, **fields)


def make(folder: Path, step: Step) -> subprocess.CompletedProcess[str]:
    (folder / "rules.mk").write_text("\n".join(step.rule() for step in in_order([step])), encoding="utf-8")
    argv = ["make", "-f", "rules.mk", str(step.done)]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True)


def runs_of(step: Step) -> int:
    path = Path(f"{step.folder}.runs")
    return len(path.read_text()) if path.exists() else 0


def test_a_folder_is_of_all_that_its_result_depends_on(tmp_path):
    base, changed = (step(tmp_path, "base", made_from={"lr": lr}) for lr in (1, 2))
    assert base.folder != changed.folder and base.folder.name.startswith("base-")
    assert step(tmp_path, "base", made_from={"lr": 1}) == base and hash(base)
    over, other = (step(tmp_path, "own", made_from=[str(of.folder)], after=(of,)) for of in (base, changed))
    assert over.folder != other.folder, "what came before counts"
    assert in_order([over, other, over]) == [base, over, changed, other], "once, and behind what they read"
    moved = step(tmp_path / "new", "base", made_from={"path": f"{tmp_path}/new/x"})
    assert moved.folder.name == step(tmp_path, "base", made_from={"path": f"{tmp_path}/x"}).folder.name
    assert str(base.folder) in base.argv


def test_the_line_can_be_typed_in_a_shell(tmp_path):
    own = Step(tmp_path, ("-c", "print('a  b', $2)", "memory.target_modules=[q, k]"), env={"A": "1", "B": ""})
    assert shlex.split(own.line) == ["A=1", "B=", "python", *own.argv] and own.line.startswith("A=1 B='' python -c ")


def test_what_is_there_is_not_run_again(tmp_path):
    base = step(tmp_path, "base", "print('a  b $HOME', os.environ['MEMDLM_TEST'])", env={"MEMDLM_TEST": "x y"})
    own = step(tmp_path, "own", f"assert os.path.exists({str(base.done)!r})", after=(base,))
    done = make(tmp_path, own)
    assert done.returncode == 0, done.stderr
    assert base.line in done.stdout.splitlines()
    assert (base.folder / "log.txt").read_text() == "a  b $HOME x y\n"
    assert re.fullmatch(r"\d+ s, \d{4}-\d\d-\d\d, \S*\n", base.done.read_text())
    assert "up to date" in make(tmp_path, own).stdout and runs_of(base) == runs_of(own) == 1


@pytest.mark.parametrize("resumes", [True, False])
def test_a_training_that_was_cut_short_goes_on_and_others_begin_anew(tmp_path, resumes):
    code = "print(os.path.exists(own + '/kept')); open(own + '/kept', 'w'); sys.exit(not os.path.exists('flag'))"
    own = step(tmp_path, "a", code, *["--resume"] * resumes)
    assert make(tmp_path, own).returncode == 2 and not own.done.exists()
    (tmp_path / "flag").touch()
    assert make(tmp_path, own).returncode == 0 and own.done.exists()
    assert (own.folder / "log.txt").read_text() == ("False\nTrue\n" if resumes else "False\n")


@pytest.mark.parametrize(
    ("code", "last"),
    [
        ("print('error: no rows'); print('Traceback: …'); sys.exit(2)", "error: no rows"),
        ("raise ValueError('rank=0: expected $1')", "ValueError: rank=0: expected $1"),
        ("os.kill(os.getpid(), 9)", ""),
    ],
)
def test_a_failure_says_its_last_line_and_ends_it(tmp_path, code, last):
    bad = step(tmp_path, "bad", code)
    later = step(tmp_path, "later", after=(bad,))
    done = make(tmp_path, later)
    assert done.returncode == 2 and last in done.stderr and f"failed: {bad.folder / 'log.txt'}\n" in done.stderr
    assert not bad.done.exists() and runs_of(later) == 0


def test_a_signal_to_the_group_ends_the_commands(tmp_path):
    own = step(tmp_path, "a", "open(own + '/pid', 'w').write(str(os.getpid())); time.sleep(100)")
    (tmp_path / "rules.mk").write_text(own.rule(), encoding="utf-8")
    argv = ["make", "-f", "rules.mk", str(own.done)]
    with subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        end = time.monotonic() + 60
        while not (own.folder / "pid").exists() or not (own.folder / "pid").read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
    state = Path(f"/proc/{(own.folder / 'pid').read_text()}/status")
    while state.exists() and "zombie" not in state.read_text():
        assert time.monotonic() < end, "it lives on"
        time.sleep(0.05)
    assert not own.done.exists()
