"""Commands for a folder each, which note their runs there, and what becomes of their processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import psutil
from rich.console import Console

from reproduce.commands import Command, run_missing

#: They note each of their runs beside the folder, as what is in it may be removed.
NOTE = """
import os, sys, time
from pathlib import Path
own = Path(sys.argv[1])
own.with_suffix(".runs").open("a").write("x")
"""
#: They are there for longer than any test, unless they are ended.
STAY = "(own / 'pid.part').write_text(str(os.getpid())); (own / 'pid.part').rename(own / 'pid'); time.sleep(120)"


def command(folder: Path, code: str = "", *arguments: str, **fields) -> Command:
    return Command(folder, ("-c", NOTE + code, str(folder), *arguments), **fields)


def run(folder: Path, *stages: list[Command], at_once: int = 2) -> list[str]:
    """The lines that it prints."""
    console = Console(file=StringIO(), width=60)
    run_missing(stages, folder, at_once, console)
    return console.file.getvalue().splitlines()


def runs_of(folder: Path) -> int:
    path = folder.with_suffix(".runs")
    return len(path.read_text()) if path.exists() else 0


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not in {seconds} s"
        time.sleep(0.02)


def pid_of(folder: Path) -> int:
    """Of a command that stays."""
    wait_for((folder / "pid").exists)
    return int((folder / "pid").read_text())


def is_running(pid: int) -> bool:
    """Whether there is a process; what has ended may lie there until somebody asks for its exit code."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
