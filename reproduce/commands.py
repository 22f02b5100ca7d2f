"""Commands that leave a folder behind. What is missing is run, several at a time; what is there is not run again.

A folder holds what its command wrote, `log.txt` with what it printed, and `begun.json`, which says what it is made from
and becomes `done.json` once it has ended well. A training that was cut short goes on from its last checkpoint; other
commands begin anew.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from rich.console import Console

from dllm_memdlm.config import ConfigError
from dllm_memdlm.machine import devices, package_versions

BEGUN = "begun.json"
DONE = "done.json"
LOG = "log.txt"


@dataclass(frozen=True)
class Command:
    """One command line, and the folder it writes to.

    Args:
        folder: where its results go; no other command writes there.
        argv: what stands behind the interpreter.
        made_from: what its result depends on that the command line does not say, such as the keys of a recipe.
        after: the commands whose results it reads.
        env: environment variables to set.
        resumes: whether it goes on from what it left behind; if not, that is removed before it begins anew.
    """

    folder: Path
    argv: tuple[str, ...]
    made_from: Mapping[str, Any] = field(default_factory=dict, hash=False)
    after: tuple[Command, ...] = field(default=(), hash=False)
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    resumes: bool = False

    @property
    def line(self) -> str:
        """As one would type it."""
        return shlex.join([*(f"{name}={value}" for name, value in self.env.items()), "python", *self.argv])

    def record(self) -> dict[str, Any] | None:
        """What `done.json` says: the command, the seconds it took, versions, devices; none where it has not ended."""
        return _read(self.folder / DONE)

    def is_done(self) -> bool:
        """Whether the folder holds the result of this very command, on what is there of those before it.

        Raises:
            ConfigError: it holds another one's, or what another one that can go on has left.
        """
        record = self.record()
        if record is not None:
            self._check(record)
        elif self.resumes and any(path.is_dir() for path in self.folder.glob("*")):  # something to go on from
            self._check(_read(self.folder / BEGUN) or self._made())
        return record is not None

    def _check(self, record: Mapping[str, Any]) -> None:
        advice = "move it away, or give another folder with --runs"
        for command in self.after:
            if record["after"].get(str(command.folder)) != _id(command):
                raise ConfigError(f"{self.folder}: made from what {command.folder} was before; {advice}")
        now = self._made()
        for key in sorted(record["made_from"].keys() | now["made_from"].keys()):
            before, here = record["made_from"].get(key), now["made_from"].get(key)
            if before != here:
                raise ConfigError(f"{self.folder}: made with {key}={before!r}, now {here!r}; {advice}")
        if record["command"] != now["command"]:
            before, here = _apart(shlex.split(record["command"]), shlex.split(now["command"]))
            raise ConfigError(f"{self.folder}: made with {before}, now {here}; {advice}")

    def _made(self) -> dict[str, Any]:
        made_from = json.loads(json.dumps(dict(self.made_from)))  # lists, as JSON gives them back
        return {"command": self.line, "made_from": made_from, "after": {str(c.folder): _id(c) for c in self.after}}

    def begin(self) -> None:
        """Make way for an attempt, and write `begun.json`."""
        if not self.resumes:
            self.clear()
        _write(self.folder / BEGUN, self._made())

    def write_record(self, seconds: float) -> None:
        """Write `done.json`: from here on the command is done."""
        record = {"id": uuid.uuid4().hex, **self._made(), "seconds": round(seconds, 1)}
        _write(self.folder / DONE, record | {"versions": package_versions(), "devices": self._devices()})
        (self.folder / BEGUN).unlink(missing_ok=True)

    def _devices(self) -> list[str]:
        if self.env.get("CUDA_VISIBLE_DEVICES") == "":
            return [f"cpu: {os.cpu_count()} cores, {self.env.get('OMP_NUM_THREADS', 'all')} used by each command"]
        return devices()

    def clear(self) -> None:
        """Remove what an attempt that did not end has left, but for its log."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOG:
                path.unlink()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _write(path: Path, record: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    aside.rename(path)


def _apart(one: list[str], other: list[str]) -> tuple[str, str]:
    """What stands in each of two command lines between the words that they begin and end with alike."""
    for _ in range(2):  # from the front, then from the back
        alike = sum(1 for _ in itertools.takewhile(lambda words: words[0] == words[1], zip(one, other, strict=False)))
        one, other = one[alike:][::-1], other[alike:][::-1]
    return " ".join(one) or "nothing", " ".join(other) or "nothing"


def _id(command: Command) -> str | None:
    """The name of a command's result: another one each time that it is made."""
    record = command.record()
    return None if record is None else record["id"]


def run_missing(stages: Sequence[Sequence[Command]], folder: Path, at_once: int, console: Console) -> None:
    """Run what is not done, stage after stage, up to `at_once` commands of a stage at a time.

    Raises:
        ConfigError: a command failed (the message ends with the last line it printed), a folder holds another
            command's result, or another process is at work in `folder`.
    """
    with _alone_in(folder), _ended_by_sigterm():
        done = {command: command.is_done() for stage in stages for command in stage}
        count, number = len(done) - sum(done.values()), 0
        console.print(f"{len(done) - count} commands done, {count} to run")
        for stage in stages:
            with _Processes(console, at_once) as processes:
                for command in (command for command in dict.fromkeys(stage) if not done[command]):
                    number += 1
                    done[command] = True  # for a later stage that has it too
                    processes.start(command, f"{number}/{count}")


class _Processes:
    """Runs commands in threads that wait for their processes; leaving the block waits for all, or ends all."""

    def __init__(self, console: Console, at_once: int) -> None:
        self.console = console
        self.pool = ThreadPoolExecutor(at_once)
        self.futures: list[Future] = []
        self.running: set[subprocess.Popen] = set()
        self.lock, self.stopped = Lock(), False

    def __enter__(self) -> _Processes:
        return self

    def start(self, command: Command, number: str) -> None:
        self.futures.append(self.pool.submit(self._run, command, number))

    def __exit__(self, kind: Any, *details: Any) -> None:
        try:
            if kind is None:
                done, _ = wait(self.futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
        finally:
            with self.lock:  # nothing is started from here on
                self.stopped = True
                for process in self.running:
                    with suppress(ProcessLookupError):  # it has just ended
                        os.killpg(process.pid, signal.SIGTERM)  # accelerate's launcher would not pass it on
            self.pool.shutdown(cancel_futures=True)

    def _run(self, command: Command, number: str) -> None:
        folder = command.folder
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOG, "a", encoding="utf-8") as log:
            begin = log.tell()
            with self.lock:
                if self.stopped:
                    return
                command.begin()
                self.console.print(f"{number}  {command.line}", markup=False, soft_wrap=True)
                started = time.perf_counter()
                process = subprocess.Popen(
                    [sys.executable, *command.argv],
                    env={**os.environ, **command.env},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    close_fds=False,  # it keeps the lock of `_alone_in` for as long as it lives
                    start_new_session=True,  # a group of its own, to be ended as a whole
                )
                self.running.add(process)
            process.wait()
        with self.lock:
            self.running.remove(process)
            stopped = self.stopped
            self.stopped = stopped or process.returncode != 0  # the next one is not begun
        if process.returncode and not stopped:
            raise ConfigError(
                f"{folder / LOG}: the command ended with {process.returncode}: {_last_line(folder / LOG, begin)}"
            )
        if not process.returncode:
            seconds = time.perf_counter() - started
            command.write_record(seconds)
            self.console.print(f"{number}  {folder} took {seconds:.0f} s", style="dim", soft_wrap=True)


def _last_line(log: Path, begin: int) -> str:
    """What was printed last from a place of the log on, in bytes; a line that begins with error if there is one."""
    text = log.read_bytes()[begin:].decode("utf-8", errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.split("\n") if line.strip(" \t=-")]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1]


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Commands inherit it, so it outlives a process that was killed until they end."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: another run, or a command that one has left behind, is at work there; wait for it"
            ) from None
        yield


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that its commands are ended too."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
