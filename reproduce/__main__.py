"""Reproduce figures and tables of the paper: run what is missing, draw, and put the paper's numbers beside ours.

python -m reproduce figure4 --scale cpu
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import importlib.util
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.gpu_check import commit
from dllm_memdlm.cli import exit_code
from dllm_memdlm.config import ConfigError
from dllm_memdlm.machine import devices, package_versions

from .cases import points_of
from .figures import FIGURES
from .scales import RECIPES, SCALES, Scale
from .scores import without_memory
from .steps import in_order


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 2 after one line about what the user can correct."""
    parser = argparse.ArgumentParser(prog="reproduce", description="Reproduce the paper's figures and tables.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(FIGURES)} (default: all)")
    parser.add_argument("--scale", default="cpu", choices=SCALES, help="small: for a GPU; paper: many (default: cpu)")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="where runs are kept")
    parser.add_argument("--reports", type=Path, default=Path("reports"), metavar="DIR", help="where to write")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="of the runs (default: 42; for cpu 42 43 44)")
    parser.add_argument("--jobs", type=int, metavar="N", help="commands at a time (default: one a core on the CPU)")
    parser.add_argument("--questions", type=int, metavar="N", help="texts or examples that a model is scored on")
    parser.add_argument("--set", nargs="+", default=(), metavar="KEY=VALUE", help="changes of every recipe")
    parser.add_argument("--commands", action="store_true", help="print the commands and stop")
    parser.add_argument("--draw", action="store_true", help="draw what has been run, and run nothing")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    for name in ("jobs", "questions"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    for target in args.targets:
        if target not in FIGURES:
            parser.error(f"unknown target {target!r}; known: {', '.join(FIGURES)}")
    return exit_code(lambda: run(args, sys.argv[1:] if argv is None else list(argv)), args.debug)


def run(args: argparse.Namespace, argv: list[str]) -> None:
    """Do what the command line says. Raises ConfigError for what the user can correct."""
    if not RECIPES.is_dir():
        raise ConfigError(f"{RECIPES}: no such folder; the recipes are in a checkout, so run this from one")
    if not re.fullmatch(r"[\w./+-]+", str(args.runs)):
        raise ConfigError(f"--runs {args.runs}: expected a folder of letters, digits and ._+-/ in its name, for make")
    scale = SCALES[args.scale]
    given = {"runs": args.runs, "seeds": tuple(args.seeds or ()), "jobs": args.jobs, "questions": args.questions}
    if args.set:
        given["settings"] = (*scale.settings, *args.set)
        given["about"] = f"{scale.about} Changed in every recipe: {', '.join(args.set)}."
    scale = dataclasses.replace(scale, **{name: value for name, value in given.items() if value})
    there = [name for name in FIGURES if scale.name in FIGURES[name].scales]
    if missing := [name for name in args.targets if name not in there]:
        scales = " or ".join(FIGURES[missing[0]].scales)
        raise ConfigError(f"--scale {scale.name}: does not have {missing[0]}; expected {scales}")
    targets = args.targets or there
    if args.draw:
        draw_all(targets, scale, args.reports, all_of_them=bool(args.targets))
        return
    steps = {name: in_order(case.step for case in FIGURES[name].cases(scale)) for name in targets}
    if args.commands:
        print(*dict.fromkeys(step.line for own in steps.values() for step in own), sep="\n")
        return
    if any("dllm_memdlm.evaluate" in step.argv for own in steps.values() for step in own):
        if args.questions is not None:
            raise ConfigError(f"--questions {args.questions}: lm-eval asks what recipes/eval says; expected none")
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigError("lm-eval, which is to score models, is not installed: pip install '.[eval]'")
    options = list(argv)
    for name in args.targets:  # which stand before options of the same word
        options.remove(name)
    draw = [sys.executable, "-m", "reproduce", "--draw", *options]
    rules = [step.rule() for step in dict.fromkeys(step for own in steps.values() for step in own)]
    for name, own in steps.items():
        command = shlex.join([*draw[:4], name, *draw[4:]]).replace("$", "$$")
        rules.append(f".PHONY: {name}\n{name}: {' '.join(str(step.done) for step in own)}\n\t@{command}\n")
    make(scale, rules, targets)


def make(scale: Scale, rules: Sequence[str], targets: Sequence[str]) -> None:
    """Become make, at work on these rules. Ctrl-C ends it and its commands. Raises ConfigError if it cannot be."""
    folder = scale.runs / scale.name
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(lock, True)  # make and its commands hold it to their end
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(f"{folder}: another make, or what one left behind, is at work there; wait for it") from None
    file = folder / "rules.mk"
    file.write_text("\n".join(rules), encoding="utf-8")
    flags = os.environ.get("MAKEFLAGS", "").partition(" -- ")[0]
    jobs = [] if "-j" in flags else [f"-j{scale.jobs}"]
    sys.stdout.flush()
    try:
        os.execvp("make", ["make", "--no-print-directory", *jobs, "-f", str(file), *targets])
    except FileNotFoundError:
        raise ConfigError("make is not installed; --commands prints what it would run") from None


def draw_all(names: Sequence[str], scale: Scale, reports: Path, all_of_them: bool) -> None:
    """Draw each, and list the pages there are. Raises ConfigError where one, or all of them, cannot be drawn yet."""
    written = []
    for name in names:
        try:
            written.append(draw(name, scale, reports))
            print(written[-1])
        except ConfigError as error:
            if all_of_them:
                raise
            print(f"{name}: {error}", file=sys.stderr)
    if not written:
        raise ConfigError(f"{scale.runs}: nothing to draw there; `make reproduce` makes something")
    pages = [page for page in sorted(reports.glob("*.md")) if page.name != "README.md"]
    lines = [f"- [{page.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}]({page.name})" for page in pages]
    (reports / "README.md").write_text("\n".join(["# Reports", "", *lines, ""]), encoding="utf-8")


def draw(name: str, scale: Scale, reports: Path) -> Path:
    """Write NAME.png, NAME.jsonl with a line for every number, and NAME.md. Returns the last.

    Raises:
        ConfigError: not all of its steps have been run.
    """
    figure = FIGURES[name]
    cases = list(figure.cases(scale))
    steps = in_order(case.step for case in cases)
    if missing := [step for step in steps if not step.done.exists()]:
        raise ConfigError(f"{len(missing)} of {len(steps)} commands have not been run, such as {missing[0].line}")
    stem = name if scale.name == "cpu" else f"{name}-{scale.name}"
    points = points_of(cases)
    reports.mkdir(parents=True, exist_ok=True)
    drawn = figure.draw(scale, pd.DataFrame(points), reports / f"{stem}.png")
    lines = "".join(json.dumps(point, ensure_ascii=False) + "\n" for point in points)
    (reports / f"{stem}.jsonl").write_text(lines, encoding="utf-8")
    page = reports / f"{stem}.md"
    versions = ", ".join(f"{package} {version}" for package, version in package_versions().items())
    ran = [f"{step.line}   # {step.done.read_text(encoding='utf-8').strip()}" for step in steps]
    text = [
        *(f"# {figure.title}", f"Scale: {scale.name}; seeds: {', '.join(map(str, scale.seeds))}. {scale.about}"),
        *([f"![{drawn.caption}]({stem}.png)", drawn.caption] if drawn.caption else []),
        *drawn.notes,
        *without_memory(case.step.folder for case in cases),
        *(table.markdown().rstrip() for table in drawn.tables),
        f"Every number drawn or tabled here is a line of [{stem}.jsonl]({stem}.jsonl), with the folder it is from.",
        f"Drawn on {time.strftime('%F')} at commit {commit()}, by `make reproduce-{name} "
        f"SCALE={scale.name}`, from {len(steps)} commands ({'; '.join(devices())}; {versions}):",
        "\n".join(["```", *ran, "```", ""]),
    ]
    page.write_text("\n\n".join(text), encoding="utf-8")
    return page


if __name__ == "__main__":
    sys.exit(main())
