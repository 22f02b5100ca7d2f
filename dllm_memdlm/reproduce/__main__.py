"""Reproduce figures and tables of the paper: run what is missing, draw, and put the paper's numbers beside ours.

python -m dllm_memdlm.reproduce figure4 --scale cpu
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..config import ConfigError
from ..launch import exit_code

#: What can be reproduced, and where it stands: modules or objects with `stages(scale)` and `page(scale, folder)`.
TARGETS = {
    "figure3": ("figure3", None),
    "figure4": ("figure4", None),
    "figure7": ("figure7", None),
    "figure11": ("figure11", None),
    "ablations": ("ablations", None),
    "dropout": ("dropout", None),
    "table1": ("tables", "TABLE_1"),
    "table2": ("tables", "TABLE_2"),
    "table3": ("tables", "TABLE_3"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `memdlm-reproduce`. Returns 2 after one line about what the user can correct."""
    parser = argparse.ArgumentParser(prog="memdlm-reproduce", description="Reproduce the paper's figures and tables.")
    parser.add_argument("targets", nargs="+", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--scale", default="cpu", help="cpu, small (one GPU) or paper (many; default: cpu)")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="where runs are kept")
    parser.add_argument("--reports", type=Path, default=Path("reports"), metavar="DIR", help="where to write")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="of the runs (default: 42 43 44 on the CPU)")
    parser.add_argument("--jobs", type=int, metavar="N", help="commands at a time (default: one a core on the CPU)")
    parser.add_argument("--questions", type=int, metavar="N", help="texts or examples that a model is scored on")
    parser.add_argument("--set", nargs="+", default=(), metavar="KEY=VALUE", help="changes of every recipe")
    parser.add_argument("--commands", action="store_true", help="print the commands and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    for name in ("jobs", "questions"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    for target in args.targets:
        if target not in TARGETS:
            parser.error(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
    return exit_code(lambda: run(args), args.debug)


def run(args: argparse.Namespace) -> None:
    """Reproduce each target in turn. Raises ConfigError for what the user can correct."""
    from ..report import write_reports  # seconds to import, as they read recipes
    from .commands import run_missing
    from .scales import SCALES

    if args.scale not in SCALES:
        raise ConfigError(f"--scale {args.scale}: expected one of {', '.join(SCALES)}")
    changes = {"runs": args.runs, "settings": tuple(args.set), "seeds": tuple(args.seeds or ())}
    changes |= {"at_once": args.jobs, "questions": args.questions}
    scale = dataclasses.replace(SCALES[args.scale], **{name: value for name, value in changes.items() if value})
    console = Console(highlight=False)
    for target in args.targets:
        module, name = TARGETS[target]
        found = importlib.import_module(f".{module}", __package__)
        what = found if name is None else getattr(found, name)
        stages = what.stages(scale)
        if args.commands:
            for command in dict.fromkeys(command for stage in stages for command in stage):
                console.print(command.line, markup=False, soft_wrap=True)
            continue
        run_missing(stages, scale.runs / scale.name, scale.at_once, console)
        folder = args.reports / (target if scale.name == "cpu" else f"{target}-{scale.name}")
        what.page(scale, folder).write(folder)
        write_reports(args.reports)
        console.print(f"{folder}/index.html", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
