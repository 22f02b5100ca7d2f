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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dllm_memdlm.machine import package_versions

from .reporting import Run, draw_curves, is_finished, load_run, reading, summarise, summary_table

RECIPES = ("tiny_llada_moe_mdlm", "tiny_llada_moe", "tiny_llada2_mdlm", "tiny_llada2")

#: Where a checkout keeps its recipes: beside the package.
RECIPE_FOLDER = Path(__file__).resolve().parent.parent / "recipes"

# Every choice that accelerate would otherwise take from the machine or from the user's own accelerate config.
LAUNCH = (
    *("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"),
)


def find_recipe(name: str) -> Path:
    """The recipe file of a name in the recipe folder, or of a path."""
    for path in (RECIPE_FOLDER / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml")))
    raise FileNotFoundError(f"no recipe {name!r}; in {RECIPE_FOLDER}: {known or 'none (run the demo from a checkout)'}")


def train_command(recipe: Path, run_dir: Path, steps: int | None, settings: Sequence[str] = ()) -> list[str]:
    """The command line that trains one recipe into `run_dir`, with settings that differ."""
    overrides = [f"training.output_dir={run_dir}", *settings]
    if steps is not None:
        overrides.append(f"training.max_steps={steps}")
    return [sys.executable, *LAUNCH, "-m", "dllm_memdlm.train", str(recipe), *overrides]


def wanted_steps(recipe: Path, steps: int | None) -> int | None:
    """The steps a run of the recipe takes, or None where the recipe leaves that to the number of epochs."""
    if steps is not None:
        return steps
    from dllm_memdlm.training.recipe import resolve  # seconds to import, and not needed where the steps are given

    in_recipe = resolve(recipe).get("training", {}).get("max_steps", 0)
    return in_recipe if in_recipe > 0 else None


def train(recipe: Path, run_dir: Path, steps: int | None, console: Console, settings: Sequence[str] = ()) -> None:
    """Train one recipe, its output going straight to ours.

    Raises:
        subprocess.CalledProcessError: the training failed; it has said why.
    """
    # A run that is cut short must not be taken for the finished one it replaces
    (run_dir / "trainer_state.json").unlink(missing_ok=True)
    command = train_command(recipe, run_dir, steps, settings)
    console.print(f"\n$ {' '.join(command)}", style="bold", soft_wrap=True)
    environment = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"}  # a cluster's
    subprocess.run(command, check=True, env=environment)


def report(runs: list[Run], output: Path, console: Console) -> None:
    """Write summary.json and curves.png, and print the table and its reading."""
    rows = summarise(runs)
    summary: dict[str, Any] = {"runs": rows, "versions": package_versions(), "cpu_count": os.cpu_count()}
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw_curves(runs, output / "curves.png")
    console.print()
    console.print(summary_table(rows))
    console.print(f"\n{reading(rows)}\n")
    for name in ("summary.json", "curves.png"):
        console.print(str(output / name), soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="reproduce.demo", description="Train tiny MDLM and MemDLM models; compare them."
    )
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps of each run (default: the recipe's)")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="NAME", help=f"default: {' '.join(RECIPES)}")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="where to write (default: runs/demo)")
    parser.add_argument("--force", action="store_true", help="train again what has already finished")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps}: expected at least 1")
    try:
        recipes = [find_recipe(name) for name in args.recipes]
    except FileNotFoundError as error:
        parser.error(str(error))

    console = Console(markup=False, highlight=False)
    runs = []
    for recipe in recipes:
        run_dir = args.output / recipe.stem
        if not args.force and is_finished(run_dir, wanted_steps(recipe, args.steps)):
            console.print(f"{run_dir} has finished; --force trains it again", soft_wrap=True)
        else:
            try:
                train(recipe, run_dir, args.steps, console)
            except subprocess.CalledProcessError as error:
                console.print(f"training {recipe} failed with exit code {error.returncode}", soft_wrap=True)
                return error.returncode
        runs.append(load_run(recipe.stem, run_dir))
    report(runs, args.output, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
