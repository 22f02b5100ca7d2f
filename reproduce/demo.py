"""Train tiny MDLM and MemDLM models on the CPU and compare them: `python -m reproduce.demo [--steps N]`.

Each recipe is trained by the command a user would type, in a process of its own; then summary.json and curves.png are
written from what the runs logged. A run that has finished is not repeated unless --force is given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from dllm_memdlm.machine import package_versions

from .cases import LOSSES
from .draw import curves
from .logs import last, logged, state_of, tail
from .plots import grid, save
from .scales import MDLM, MEMDLM, RECIPES

#: Recipes, with the backbone and the method that they train; any others are told by their names.
BACKBONES = {"tiny_llada_moe": "LLaDA-MoE", "tiny_llada2": "LLaDA2.1"}
DEMO = ("tiny_llada_moe_mdlm", "tiny_llada_moe", "tiny_llada2_mdlm", "tiny_llada2")

# Every choice that accelerate would otherwise take from the machine or from the user's own accelerate config.
LAUNCH = (
    *("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"),
)
#: Losses nearer to each other than this share of MDLM's are called the same.
SAME = 0.005
CAUTION = (
    "Fast weights are fitted to the very tokens that are then scored, so only the losses without them compare the "
    "methods. This is one run for each; other seeds will move these numbers."
)


def find_recipe(name: str) -> Path:
    """Return the recipe file of a name in the recipe folder, or of a path. Raises FileNotFoundError."""
    for path in (RECIPES / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise FileNotFoundError(f"no recipe {name!r}; in {RECIPES}: {known or 'none (run the demo from a checkout)'}")


def is_finished(run: Path, recipe: Path, steps: int | None) -> bool:
    """Whether a run has taken the steps that are asked for, by default those of its recipe."""
    state = state_of(run)
    if state is None:
        return False
    if steps is None:
        from dllm_memdlm.training.recipe import resolve  # seconds to import

        in_recipe = resolve(recipe).get("training", {}).get("max_steps", 0)
        steps = in_recipe if in_recipe > 0 else state["max_steps"]
    return state["global_step"] >= steps


def train(recipe: Path, run: Path, steps: int | None, console: Console) -> None:
    """Train one recipe, its output going straight to ours. Raises CalledProcessError where it fails."""
    # A run that is cut short must not be taken for the finished one it replaces
    (run / "trainer_state.json").unlink(missing_ok=True)
    overrides = [f"training.output_dir={run}", *([] if steps is None else [f"training.max_steps={steps}"])]
    command = [sys.executable, *LAUNCH, "-m", "dllm_memdlm.train", str(recipe), *overrides]
    console.print(f"\n$ {' '.join(command)}", style="bold", soft_wrap=True)
    environment = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"}  # a cluster's
    subprocess.run(command, check=True, env=environment)


def points_of(recipe: str, run: Path) -> pd.DataFrame:
    """What a run has logged: its losses, and the seconds of its steps."""
    stem = recipe.removesuffix("_mdlm")
    labels = {"recipe": recipe, "backbone": BACKBONES.get(stem, stem), "seed": 0, "path": str(run)}
    labels["method"] = MEMDLM if stem == recipe else MDLM
    return pd.DataFrame([{**labels, **point} for point in logged(run, (*LOSSES, "step_seconds"))])


def summarise(runs: list[pd.DataFrame]) -> list[dict[str, Any]]:
    """One row of numbers for each run; what a run did not log, or has no baseline for, is None. Losses in nats."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        row = {name: run[name].iloc[0] for name in ("recipe", "backbone", "method", "path")}
        logs = set(run.loss)
        row |= {key: tail(run, key).item() if key in logs else None for key in ("loss", "loss_memory_off")}
        row |= {key: last(run, key).item() if key in logs else None for key in ("eval_loss", "eval_loss_memory_off")}
        seconds = run[run.loss == "step_seconds"].value.median() if "step_seconds" in logs else None
        rows.append(row | {"step_seconds": seconds, "steps": int(run.step.max())})
    baselines = {row["backbone"]: row["step_seconds"] for row in rows if row["method"] == MDLM}
    for row in rows:
        own, base = row["step_seconds"], baselines.get(row["backbone"])
        row["step_seconds_over_mdlm"] = own / base if own and base else None
    return rows


def summary_table(rows: list[dict[str, Any]]) -> Table:
    """The summary for a terminal. MDLM has no fast weights: its eval loss stands in the column without them."""
    table = Table(title="Losses in nats", caption="φ: the fast weights. Compare methods in the column without φ.")
    for name in ("backbone", "method"):
        table.add_column(name)
    for name in ("train loss", "eval, φ", "eval, no φ", "s/step", "× MDLM"):
        table.add_column(name, justify="right")
    for row in rows:
        evals = (row["eval_loss"], row["eval_loss_memory_off"]) if row["method"] == MEMDLM else (None, row["eval_loss"])
        numbers = (row["loss"], *evals, row["step_seconds"], row["step_seconds_over_mdlm"])
        cells = ("-" if n is None else f"{n:.{d}f}" for n, d in zip(numbers, (3, 3, 3, 2, 2), strict=True))
        table.add_row(row["backbone"], "MDLM" if row["method"] == MDLM else "MemDLM", *cells)
    return table


def reading(rows: list[dict[str, Any]]) -> str:
    """Say in words how MemDLM's losses compare with MDLM's; backbones without both methods are left out."""
    found = []
    for backbone in dict.fromkeys(row["backbone"] for row in rows):
        pair = {row["method"]: row for row in rows if row["backbone"] == backbone}
        base, own = (pair.get(method, {}) for method in (MDLM, MEMDLM))
        losses = (base.get("eval_loss"), own.get("eval_loss"), own.get("eval_loss_memory_off"))
        if None not in losses:
            on, off = (_against(loss, losses[0]) for loss in losses[1:])
            found.append(f"{backbone}: MemDLM ends at {on} with its fast weights, and at {off} without them.")
    return " ".join([*found, CAUTION]) if found else "Nothing to compare: no backbone was trained with both methods."


def _against(loss: float, base: float) -> str:
    if abs(loss - base) <= SAME * base:
        return f"{loss:.3f} (the same as MDLM's {base:.3f} within {SAME:.1%})"
    return f"{loss:.3f} ({abs(loss - base):.3f} {'better' if loss < base else 'worse'} than MDLM's {base:.3f})"


def report(runs: list[pd.DataFrame], output: Path, console: Console) -> None:
    """Write summary.json and curves.png, and print the table and its reading."""
    rows, points = summarise(runs), pd.concat(runs)
    summary = {"runs": rows, "versions": package_versions(), "cpu_count": os.cpu_count()}
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    backbones = points.backbone.unique()
    figure, axes = grid(len(backbones), 2)
    for row, backbone in zip(axes, backbones, strict=True):
        curves(row, backbone, points[points.backbone == backbone])
    save(figure, output / "curves.png")
    console.print("", summary_table(rows), f"\n{reading(rows)}\n", sep="\n")
    for name in ("summary.json", "curves.png"):
        console.print(str(output / name), soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="reproduce.demo", description="Train tiny MDLM and MemDLM models.")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps of each run (default: the recipe's)")
    parser.add_argument("--recipes", nargs="+", default=DEMO, metavar="NAME", help=f"default: {' '.join(DEMO)}")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="where to write (default: runs/demo)")
    parser.add_argument("--force", action="store_true", help="train again what has already finished")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps}: expected at least 1")
    try:
        recipes = [find_recipe(name) for name in args.recipes]
    except FileNotFoundError as error:
        parser.error(str(error))
    console, runs = Console(markup=False, highlight=False), []
    for recipe in recipes:
        run = args.output / recipe.stem
        if not args.force and is_finished(run, recipe, args.steps):
            console.print(f"{run} has finished; --force trains it again", soft_wrap=True)
        else:
            try:
                train(recipe, run, args.steps, console)
            except subprocess.CalledProcessError as error:
                console.print(f"training {recipe} failed with exit code {error.returncode}", soft_wrap=True)
                return error.returncode
        runs.append(points_of(recipe.stem, run))
    report(runs, args.output, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
