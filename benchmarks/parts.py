"""Processes with limits of their own, and one report of what they have found, on disk anew after each of them.

Only the standard library is imported at the top: `gpu_check` installs the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Every part is a group of processes, so that it ends with all that it has started; not a session, which would outlive
#: one that is killed whole.
GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
#: As much of a failed part's output as the report shows, and as the log keeps of every part, in characters.
SHOWN, KEPT = 3_000, 60_000


@dataclass(frozen=True)
class Part:
    """A process, and the most seconds that it may take."""

    name: str
    seconds: int
    command: list[str]
    found: Callable[[str], str] = str  #: from its output to what came of it; the last line is shown


@dataclass
class Check:
    """Parts that have run, and what they have found."""

    folder: Path  #: for each part one to write to
    output: Path  #: where the report goes
    deadline: float
    environment: dict[str, str]
    about: dict[str, Any]
    slower: int = 1  #: times a part may take as long as it says
    ended: list[list[Any]] = field(default_factory=list)  #: a row for each part, in the order of their ends
    failed: list[str] = field(default_factory=list)
    running: set[subprocess.Popen] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, part: Part, threads: int | None = None) -> bool:
        """Run a part to its end or its limit, and write the report. `threads`: of its CPU work; all cores if none."""
        left = int(self.deadline - time.monotonic())
        limit, start = min(part.seconds * self.slower, left), time.monotonic()
        if limit < 5:
            return self._end(part, "no time left", 0, limit)
        how = "stopped"
        with self._log(part.name).open("w") as file:
            environment = self.environment | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
            process = subprocess.Popen(part.command, cwd=ROOT, env=environment, stdout=file, stderr=file, **GROUP)
            self.running.add(process)
            try:
                code = process.wait(limit)
                how = "well" if code == 0 else f"exit code {code}"
            except subprocess.TimeoutExpired:
                how = f"stopped at its limit of {limit} s"
            finally:
                _kill(process)
                self.running.discard(process)
                well = self._end(part, how, time.monotonic() - start, limit)
        return well

    def run_together(self, chains: Sequence[Sequence[Part]]) -> None:
        """As many chains at once as there are cores, which they share; each until one of its parts fails."""
        cores = os.cpu_count() or 1
        threads = max(1, cores // (2 * max(1, len(chains))))
        with ThreadPoolExecutor(cores) as pool:
            try:
                list(pool.map(lambda chain: all(self.run(part, threads) for part in chain), chains))
            except BaseException:
                self.stop()  # the pool would wait for them
                raise

    def stop(self) -> None:
        """End what runs, and begin nothing more."""
        self.deadline = time.monotonic()
        for process in list(self.running):
            _kill(process)

    def _end(self, part: Part, how: str, seconds: float, limit: int) -> bool:
        with self.lock:
            said = self._said(part.name)
            last = (part.found(said) if how == "well" else said).strip().splitlines()[-1:]
            self.ended.append([part.name, how, round(seconds, 1), limit, "".join(last)[:160].replace("|", "/")])
            if how != "well":
                self.failed.append(part.name)
            print(f"{part.name}: {how}, {seconds:.0f} s", flush=True)
            self.write()
        return how == "well"

    def sections(self) -> list[Any]:
        """The parts, and the tables that they have written, those of one title joined."""
        from .report import Section

        parts = Section("Parts", ["part", "ended", "s", "limit s", "what came of it"], rows=self.ended)
        found = {parts.title: parts}
        for name in [row[0] for row in self.ended]:
            for path in sorted((self.folder / name).glob("*.json")):
                for values in json.loads(path.read_text()).get("sections", []):
                    section = Section(**values)
                    found.setdefault(section.title, Section(**{**values, "rows": []})).rows += section.rows
        return list(found.values())

    def write(self) -> list[Path]:
        """The report, and the end of every log."""
        from .report import write

        machine = self.folder / "machine" / "machine.json"
        if machine.exists():
            facts = json.loads(machine.read_text())
            self.about |= {name: facts[name] for name in ("card", "torch")}
        tails = [f"## What {name} said last\n\n```\n{self._said(name)[-SHOWN:]}\n```\n" for name in self.failed]
        data, page = write(self.sections(), "GPU check", self.about, self.output, "gpu-check", "\n".join(tails))
        logs = self.output / "gpu-check.log"
        logs.write_text("\n".join(f"===== {name}\n{self._said(name)[-KEPT:]}" for name, *_ in self.ended))
        return [page, data, logs]

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _said(self, name: str) -> str:
        log = self._log(name)
        return log.read_text(errors="replace") if log.exists() else ""


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
