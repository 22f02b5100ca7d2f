"""Choose the inner learning rate by a rule that looks at no result of training.

python -m reproduce.inner_rate recipes/cpu/llada_moe.yaml

It is the rate at which an inner loop lowers the loss of the anchor by a tenth, for the model as it is before training,
in the mean of the examples that it evaluates on: `eval_loss` against `eval_loss_memory_off`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from dllm_memdlm.cli import exit_code
from dllm_memdlm.config import ConfigError

RATES = (1e-3, 1e2)  #: among which it is searched


def rate_of(loss_at: Callable[[float], float], wanted: float, halvings: int = 5) -> float:
    """Return the smallest rate at which the loss is at most as wanted: the first power of ten, then by halving.

    Raises:
        ConfigError: there is none in RATES.
    """
    low, high = RATES
    rate = low
    while not loss_at(rate) <= wanted:  # nor is what is no number
        low, rate = rate, 10 * rate
        if rate > high:
            raise ConfigError(f"no inner rate up to {high:g} lowers the loss to {wanted:.4f}")
    if rate == low:
        return rate
    high = rate
    for _ in range(halvings):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if loss_at(middle) <= wanted else (middle, high)
    return high


def run(args: argparse.Namespace) -> None:
    """Search, and show what was found. Raises ConfigError for what the user can correct."""
    from dllm_memdlm.training.recipe import load_recipe  # seconds to import
    from dllm_memdlm.training.run import build_trainer

    if not 0 < args.fall < 1:
        raise ConfigError(f"--fall {args.fall:g}: expected a share of the loss, in (0, 1)")
    console, table = Console(highlight=False), Table("inner lr", "eval_loss", "falls by")
    with contextlib.redirect_stdout(sys.stderr):  # what the trainer says
        recipe = load_recipe(args.recipe, args.overrides)
        if not recipe.memory.enabled:
            raise ConfigError(f"{args.recipe}: memory.enabled=False: expected true")
        trainer = build_trainer(recipe)
        if trainer.eval_dataset is None:
            raise ConfigError(
                f"{args.recipe}: expected examples to evaluate on (data.eval_fraction or data.eval_split)"
            )
        memory, without = trainer.memory.config, trainer.evaluate()["eval_loss_memory_off"]

        def loss_at(rate: float) -> float:
            trainer.memory.config = replace(memory, inner_lr=rate)
            loss = trainer.evaluate()["eval_loss"]
            table.add_row(f"{rate:.3g}", f"{loss:.4f}", f"{1 - loss / without:.1%}")
            return loss

        rate = rate_of(loss_at, (1 - args.fall) * without)
    console.print(table)
    console.print(f"memory.inner_lr: {rate:.2g}    # lowers the loss, {without:.4f}, by {args.fall:.0%}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 2 after one line about what the user can correct."""
    parser = argparse.ArgumentParser(prog="python -m reproduce.inner_rate", description="Choose memory.inner_lr.")
    parser.add_argument("recipe", help="recipe file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ")
    parser.add_argument("--fall", type=float, default=0.1, metavar="SHARE", help="of the loss (default: 0.1)")
    args = parser.parse_intermixed_args(argv)
    return exit_code(lambda: run(args), debug=False)


if __name__ == "__main__":
    sys.exit(main())
