"""Whether this machine's GPU trains and decodes right, and how fast: nine minutes, one table at the end.

`make gpu-check`, or where nothing can be installed `python -m benchmarks.gpu_check --wheels FOLDER`. What is right or
wrong runs first, in parallel; then what is timed, one thing after the other. Every part is a process of its own with
its own limit, and the report, gpu-check.md and gpu-check.json, is on disk anew after each of them, with what a part
that was stopped had measured. Exit code 1 if a part has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 540  #: of everything
TOGETHER = 150  #: of each part that runs beside others
SLOWER = 4  #: times a CPU may take as long
UNIT_TESTS = (
    *("canvas_cache", "dense_lora", "fast_weights", "memory_step", "moe", "noise"),
    *("objectives", "samplers_llada21", "samplers_mdlm", "trajectory"),
)
#: Recipes, bits of a weight of the base, and the seconds that each may take.
TIMED = (("llada_moe", 16, 100), ("llada_moe", 4, 100), ("llada2_mini", 16, 150), ("llada2_mini", 4, 180))
FEW_UNIT_TESTS = ("noise", "objectives")
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


@dataclass
class Check:
    """Parts that have run, and what they have found."""

    folder: Path  #: for each part one to write to
    output: Path  #: where the report goes
    deadline: float
    environment: dict[str, str]
    about: dict[str, Any]
    ended: list[list[Any]] = field(default_factory=list)  #: a row for each part, in the order of their ends
    failed: list[str] = field(default_factory=list)
    running: set[subprocess.Popen] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, part: Part, threads: int | None = None) -> None:
        """Run a part to its end or its limit, and write the report. `threads`: of its CPU work; all cores if none."""
        left = int(self.deadline - time.monotonic())
        limit, start = min(part.seconds, left), time.monotonic()
        log = self.folder / f"{part.name}.log"
        if limit < 5:
            self._end(part, "no time left", 0, limit)
            return
        how = "stopped"
        with log.open("w") as file:
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
                self._end(part, how, time.monotonic() - start, limit)

    def run_together(self, parts: Sequence[Part]) -> None:
        """As many at once as there are cores, which they share."""
        cores = os.cpu_count() or 1
        threads = max(1, cores // (2 * max(1, len(parts))))
        with ThreadPoolExecutor(cores) as pool:
            try:
                list(pool.map(lambda part: self.run(part, threads), parts))
            except BaseException:
                self.stop()  # the pool would wait for them
                raise

    def stop(self) -> None:
        """End what runs, and begin nothing more."""
        self.deadline = time.monotonic()
        for process in list(self.running):
            _kill(process)

    def _end(self, part: Part, how: str, seconds: float, limit: int) -> None:
        log = self.folder / f"{part.name}.log"
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
        with self.lock:
            self.ended.append([part.name, how, round(seconds, 1), limit, " ".join(said[-1:])[:160].replace("|", "/")])
            if how != "well":
                self.failed.append(part.name)
            print(f"{part.name}: {how}, {seconds:.0f} s", flush=True)
            self.write()

    def sections(self) -> list[Any]:
        """The parts, and the tables that they have written, those of one title joined."""
        from .report import Section

        parts = Section("Parts", ["part", "ended", "s", "limit s", "its last line"], rows=self.ended)
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
        tails = "\n".join(f"## What {name} said last\n\n```\n{self._tail(name, SHOWN)}\n```\n" for name in self.failed)
        data, page = write(self.sections(), "GPU check", self.about, self.output, "gpu-check", tails)
        logs = self.output / "gpu-check.log"
        logs.write_text("\n".join(f"===== {name}\n{self._tail(name, KEPT)}" for name, *_ in self.ended))
        return [page, data, logs]

    def _tail(self, name: str, characters: int) -> str:
        log = self.folder / f"{name}.log"
        return log.read_text(errors="replace")[-characters:] if log.exists() else ""


def parts(folder: Path, cpu: bool) -> tuple[Part, list[Part], list[Part]]:
    """What the machine is; what is right or wrong, in parallel; and what is timed, one after the other."""
    small = ["--cpu"] if cpu else []
    device = "cpu" if cpu else "cuda"

    def module(name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", name, *arguments]

    def pytest(name: str, *arguments: str) -> list[str]:
        # What a library warns of on this machine is no fault of the code's.
        fixed = ("-W", "default", "-p", "no:cacheprovider", "--tb=short", "--tables", str(folder / name))
        return module("pytest", "-q", *fixed, *arguments)

    files = [str(next(ROOT.glob(f"tests/*/test_{name}.py"))) for name in (FEW_UNIT_TESTS if cpu else UNIT_TESTS)]
    several = not cpu and importlib.util.find_spec("xdist") is not None
    workers = ["-n", "8", "--dist", "loadfile"] if several else []
    together = [
        Part("equality", TOGETHER, pytest("equality", "-m", "gpu", "--device", device, "tests/test_gpu.py")),
        Part("commands", TOGETHER, module("benchmarks.user_commands", str(folder / "commands"), *small)),
        Part("unit_tests", TOGETHER, pytest("unit_tests", "--default-device", device, *workers, *files)),
    ]
    timed = []
    for recipe, bits, seconds in TIMED:
        name = f"{recipe}_{bits}bit"
        command = module("benchmarks.full_size", f"recipes/{recipe}.yaml", "--bits", str(bits), *small)
        command += ["--plans", str(folder / "plans")]
        together.append(Part(f"plan_{name}", TOGETHER, [*command, "--plan-only"]))
        timed.append(Part(name, seconds, [*command, "--output", str(folder / name)]))
    machine = Part("machine", 90, module("benchmarks.machine", str(folder / "machine"), *small))
    slower = SLOWER if cpu else 1
    first, *rest = (replace(part, seconds=part.seconds * slower) for part in (machine, *together, *timed))
    return first, rest[: len(together)], rest[len(together) :]


def environment(folder: Path, wheels: Path | None) -> dict[str, str]:
    """For every part: no network, nothing in the user's folders, compiled modules kept for the next part."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PYTHONDONTWRITE"))}
    site = [] if wheels is None else [str(folder / "site")]
    compiled = {} if wheels is None else {"PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    paths = [str(ROOT), *site, *filter(None, [os.environ.get("PYTHONPATH")])]
    # A step of a quarter of a million kernels does not fit the profiler's 128 MB.
    kineto = folder / "kineto.conf"
    kineto.write_text("ACTIVITIES_MAX_GPU_BUFFER_SIZE_MB=1024\n")
    return {
        **inherited,
        **{"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HOME": str(folder / "hf")},
        **compiled,
        **{"PYTHONPATH": os.pathsep.join(paths)},
        **{"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]},
        **{"KINETO_CONFIG": str(kineto)},
    }


def commit() -> str:
    """Of the code that is checked, where git knows it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """A folder for what the parts write, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_check", description="Check a GPU machine, in nine minutes.")
    parser.add_argument("--cpu", action="store_true", help="all of it cut down, on a CPU: to try the check itself")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="parts that begin like this")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"of everything (default: {SECONDS})")
    parser.add_argument("--wheels", type=Path, help="install these wheels first, for the check alone; no network")
    parser.add_argument("--commit", help="of the code, where there is no git to ask")
    parser.add_argument("--output", type=Path, default=Path("reports"), help="where to write (default: reports)")
    args = parser.parse_args(argv)
    start = time.monotonic()
    with working_folder() as folder:
        if args.wheels is not None:
            if not any(args.wheels.glob("*.whl")):
                parser.error(f"--wheels {args.wheels}: expected a folder with .whl files")
            try:
                install(folder / "site", args.wheels)
            except subprocess.CalledProcessError:
                parser.error(f"--wheels {args.wheels}: pip could not install them; it says above why")
        first, together, timed = parts(folder, args.cpu)
        names = [part.name for part in (*together, *timed)]
        wanted = tuple(args.only)
        chosen = [name for name in names if name.startswith(wanted) or name.removeprefix("plan_").startswith(wanted)]
        if not chosen:
            parser.error(f"--only {' '.join(args.only)}: expected the beginning of one of {', '.join(names)}")
        about = {"card": "unknown", "torch": "unknown", "commit": args.commit or commit(), "date": time.strftime("%F")}
        check = Check(folder, args.output, start + args.seconds, environment(folder, args.wheels), about)
        try:
            check.run(first)
            check.run_together([part for part in together if part.name in chosen])
            for part in timed:
                if part.name in chosen:
                    check.run(part)
        except KeyboardInterrupt:
            check.failed.append("the rest, as it was interrupted")
        finally:
            check.stop()
        paths = check.write()
        _print(check.sections())
    print(*paths, sep="\n")
    if check.failed:
        print(f"failed: {', '.join(check.failed)}", file=sys.stderr)
    return 1 if check.failed else 0


def install(site: Path, wheels: Path) -> None:
    """Put wheels into a folder of the check's own, in front of what is installed. Raises CalledProcessError."""
    files = sorted(map(str, wheels.glob("*.whl")))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(site), *files], check=True)
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()


def _print(sections: list[Any]) -> None:
    from .report import console

    for section in sections:
        if section.title not in ("The longest kernels of a step", "The machine"):
            section.print(console())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    raise SystemExit(main())
