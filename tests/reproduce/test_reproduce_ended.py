"""Runs that are ended from outside: nothing goes on alone, and one at a time is at work in a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
from data_files import message_of
from noted_commands import NOTE, STAY, command, is_running, pid_of, run, runs_of, wait_for

from reproduce.commands import DONE, Command

#: A process of its own that runs commands, and says what the user can correct as our commands do.
DRIVER = """
import json, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored from birth where the tests run in the background
from rich.console import Console
from dllm_memdlm.cli import exit_code
from reproduce.commands import Command, run_missing
stages = [[Command(Path(folder), tuple(argv)) for folder, argv in stage] for stage in json.loads(sys.argv[2])]
sys.exit(exit_code(lambda: run_missing(stages, Path(sys.argv[1]), 2, Console()), debug=False))
"""


def started(folder, *stages: list[Command]) -> subprocess.Popen[str]:
    """A process of its own at work in a folder."""
    given = json.dumps([[(str(own.folder), own.argv) for own in stage] for stage in stages])
    argv = [sys.executable, "-c", DRIVER, str(folder), given]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(argv, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(autouse=True)
def none_stays_behind(tmp_path):
    yield
    for file in tmp_path.glob("*/pid"):
        if is_running(pid := int(file.read_text())) and str(tmp_path) in " ".join(psutil.Process(pid).cmdline()):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_was_started(tmp_path, number):
    stage = [command(tmp_path / "a", STAY), command(tmp_path / "b", STAY), command(tmp_path / "c")]
    process = started(tmp_path, stage, [command(tmp_path / "d")])
    pids = [pid_of(tmp_path / name) for name in "ab"]
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert not any(map(is_running, pids))
    assert not list(tmp_path.glob(f"*/{DONE}")) and not (tmp_path / "d").exists()
    assert [runs_of(tmp_path / name) for name in "abcd"] == [1, 1, 0, 0]
    assert run(tmp_path, [command(tmp_path / "c")])[0] == "0 commands done, 1 to run", "the folder is free"


def test_what_ends_a_process_is_as_it_was_before(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run(tmp_path, [command(tmp_path / "a", "sys.exit(0)")])
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_ends_what_the_commands_have_started(tmp_path):
    """accelerate's launcher starts the training in a process of its own, and waits for it."""
    code = f"import subprocess; subprocess.run([sys.executable, '-c', {NOTE + STAY!r}, sys.argv[1]])"
    process = started(tmp_path, [command(tmp_path / "a", code)])
    pid = pid_of(tmp_path / "a")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    wait_for(lambda: not is_running(pid), seconds=5)  # or it goes on, and the next run writes to the same folder


def test_after_a_kill_the_folder_is_free_when_the_orphans_have_ended(tmp_path):
    done, missing = command(tmp_path / "a"), command(tmp_path / "c")
    process = started(tmp_path, [done], [command(tmp_path / "b", STAY)])
    pid = pid_of(tmp_path / "b")
    refusal = f"{tmp_path}: another run, or a command that one has left behind, is at work there; wait for it"
    assert message_of(run, tmp_path, [done], [missing]) == refusal, "while it lives"
    process.kill()
    process.communicate(timeout=60)
    assert is_running(pid) and message_of(run, tmp_path, [done], [missing]) == refusal, "and while what it started does"
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_running(pid))
    lines = run(tmp_path, [done], [missing], [command(tmp_path / "b")])
    assert lines[0] == "1 commands done, 2 to run" and lines[1].startswith("1/2  python -c ")
    assert [runs_of(tmp_path / name) for name in "acb"] == [1, 1, 2], "what was begun is run again"
