"""Reproduce figures and tables of the paper: run what is missing, draw, and put the paper's numbers beside ours.

python -m reproduce figure4 --scale cpu
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dllm_memdlm.cli import exit_code
from dllm_memdlm.config import ConfigError

#: What can be reproduced, and the name to import: a module or an object with `stages(scale)` and `page(scale, folder)`.
TARGETS = {
    **{name: f"reproduce.{name}" for name in ("figure3", "figure4", "figure7", "figure11")},
    **{name: f"reproduce.{name}" for name in ("ablations", "dropout")},
    **{f"table{number}": f"reproduce.tables.TABLE_{number}" for number in (1, 2, 3)},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 2 after one line about what the user can correct."""
    parser = argparse.ArgumentParser(prog="reproduce", description="Reproduce the paper's figures and tables.")
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
    from .commands import run_missing
    from .demo import RECIPE_FOLDER  # seconds to import, as they read recipes
    from .report import write_page, write_reports
    from .scales import SCALES

    if args.scale not in SCALES:
        raise ConfigError(f"--scale {args.scale}: expected one of {', '.join(SCALES)}")
    if not RECIPE_FOLDER.is_dir():
        raise ConfigError(f"{RECIPE_FOLDER}: no such folder; the recipes are in a checkout, so run this from one")
    scale = SCALES[args.scale]
    changes = {"runs": args.runs, "settings": (*scale.settings, *args.set), "seeds": tuple(args.seeds or ())}
    changes |= {"at_once": args.jobs, "questions": args.questions}
    changes |= {"about": f"{scale.about} Changed in every recipe: {', '.join(args.set)}." if args.set else None}
    scale = dataclasses.replace(scale, **{name: value for name, value in changes.items() if value})
    console = Console(highlight=False)
    for name in args.targets:
        target = pkgutil.resolve_name(TARGETS[name])
        stages = target.stages(scale)
        if args.commands:
            for command in dict.fromkeys(command for stage in stages for command in stage):
                console.print(command.line, markup=False, soft_wrap=True)
            continue
        if any("dllm_memdlm.evaluate" in command.argv for stage in stages for command in stage):
            if args.questions is not None:
                raise ConfigError(
                    f"--questions {args.questions}: {name} is scored by lm-eval, which asks what recipes/eval says; "
                    "expected none"
                )
            if importlib.util.find_spec("lm_eval") is None:
                raise ConfigError(f"{name} is scored by lm-eval, which is not installed: pip install '.[eval]'")
        run_missing(stages, scale.runs / scale.name, scale.at_once, console)
        folder = args.reports / (name if scale.name == "cpu" else f"{name}-{scale.name}")
        page = target.page(scale, folder)
        page.write(folder)
        console.print(str(write_page(folder, page)), soft_wrap=True)
    if not args.commands:
        write_reports(args.reports)


if __name__ == "__main__":
    sys.exit(main())
