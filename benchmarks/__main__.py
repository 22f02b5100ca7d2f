"""Time training and decoding: `python -m benchmarks [--quick] [--only NAME …] [--repeats N]`, or `make bench`.

Writes reports/bench.json and reports/bench.md.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dllm_memdlm.compat import dllm_api
from dllm_memdlm.machine import package_versions

from . import decode, host, models, padding, profiling, report, switches, training
from .report import Section


def sections(quick: bool, repeats: int | None = None) -> dict[str, Callable[[], Section]]:
    """What is measured, by the names of `--only`. `repeats` is of training steps."""
    size, threads = training.QUICK if quick else training.FULL, torch.get_num_threads()
    size = replace(size, repeats=repeats or size.repeats)
    found = {f"step-{count}": partial(training.compared, size, count) for count in sorted({1, threads})}
    found |= {
        "host": partial(host.host, quick),
        "host-traffic": partial(host.traffic, quick),
        "profile": partial(profiling.profiling, size),
        "peaks": partial(training.peaks, size),
        "growth": partial(training.growth, size),
        "padding": partial(padding.padding, size),
        "switches": partial(switches.switches, size),
    }
    decoding = decode.sections(decode.QUICK if quick else decode.FULL)
    return found | {f"decode-{name.replace(' ', '-')}": measure for name, measure in decoding.items()}


def facts(quick: bool) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "machine": f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads unless stated, float32",
        "models": "; ".join(
            f"{name}: {dims['num_hidden_layers']} layers, hidden {dims['hidden_size']}, {dims['num_experts']} experts"
            for name, dims in (models.QUICK if quick else models.FULL).items()
        )
        + "; random weights of a fixed seed",
        "in use": dllm_api.describe(),
        "versions": ", ".join(f"{name} {version}" for name, version in package_versions().items()),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks", description="Time training steps and decoding.")
    parser.add_argument("--quick", action="store_true", help="small models and batches, to try the benchmark itself")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="what begins like this: step, decode-a")
    parser.add_argument("--repeats", type=int, help="turns of the training steps (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("reports"), help="where to write (default: reports)")
    args = parser.parse_args(argv)
    console, threads = report.console(), torch.get_num_threads()
    measures = sections(args.quick, args.repeats)
    chosen = [name for name in measures if name.startswith(tuple(args.only))]
    if not chosen:
        parser.error(f"--only {' '.join(args.only)}: expected the beginning of one of {', '.join(measures)}")
    about = facts(args.quick)
    for key, value in about.items():
        console.print(f"{key}: {value}", markup=False)
    if not dllm_api.HAS_DLLM:
        console.print("dllm is not installed: its trainer and its sampler are not timed")
    done = []
    for name in chosen:
        console.log(f"measuring {name}")
        done.append(measures[name]())
        torch.set_num_threads(threads)
        done[-1].print(console)
        # Each time, so that a run that is cut off leaves what it has
        paths = report.write(done, "Benchmarks", about, args.output, "bench")
    console.print()
    for path in paths:
        console.print(str(path), soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
