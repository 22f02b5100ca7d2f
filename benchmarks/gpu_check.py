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
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .parts import ROOT, Check, Part
from .user_commands import chains

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


def parts(folder: Path, cpu: bool) -> tuple[Part, list[list[Part]], list[Part]]:
    """What the machine is; what is right or wrong, chains in parallel; and what is timed, one after the other."""
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
    kinds = ["-k", "llada2 or not (llada or llama)"] if cpu else []
    equality = pytest("equality", "-m", "gpu", "--device", device, *kinds, "tests/test_gpu.py")
    together = [
        [Part("equality", TOGETHER, equality)],
        *chains(folder / "commands", cpu),
        [Part("unit_tests", TOGETHER, pytest("unit_tests", "--default-device", device, *workers, *files))],
    ]
    timed = []
    for recipe, bits, seconds in TIMED:
        name = f"{recipe}_{bits}bit"
        command = module("benchmarks.full_size", f"recipes/{recipe}.yaml", "--bits", str(bits), *small)
        command += ["--plans", str(folder / "plans")]
        together.append([Part(f"plan_{name}", TOGETHER, [*command, "--plan-only"])])
        timed.append(Part(name, seconds, [*command, "--output", str(folder / name)]))
    machine = Part("machine", 90, module("benchmarks.machine", str(folder / "machine"), *small))
    return machine, together, timed


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


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


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
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if args.wheels is not None:
            if not any(args.wheels.glob("*.whl")):
                parser.error(f"--wheels {args.wheels}: expected a folder with .whl files")
            try:
                install(folder / "site", args.wheels)
            except subprocess.CalledProcessError:
                parser.error(f"--wheels {args.wheels}: pip could not install them; it says above why")
        first, together, timed = parts(folder, args.cpu)
        names = [part.name for chain in (*together, timed) for part in chain]
        wanted = tuple(args.only)
        chosen = {name for name in names if name.startswith(wanted) or name.removeprefix("plan_").startswith(wanted)}
        if not chosen:
            parser.error(f"--only {' '.join(args.only)}: expected the beginning of one of {', '.join(names)}")
        about = {"card": "unknown", "torch": "unknown", "commit": args.commit or commit(), "date": time.strftime("%F")}
        environ, slower = environment(folder, args.wheels), SLOWER if args.cpu else 1
        check = Check(folder, args.output, start + args.seconds, environ, about, slower)
        try:
            check.run(first)
            check.run_together([chain for chain in together if chosen & {part.name for part in chain}])
            for part in timed:
                if part.name in chosen:
                    check.run(part)
        except KeyboardInterrupt:
            check.failed.append("the rest, as it was interrupted")
        finally:
            check.stop()
        paths = check.write()
        show(check.sections())
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


def show(sections: list[Any]) -> None:
    """Print the tables that are not long."""
    from .report import console

    for section in sections:
        if section.title not in ("The longest kernels of a step", "The machine"):
            section.print(console())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    raise SystemExit(main())
