"""Train a recipe.

accelerate launch -m dllm_memdlm.train recipes/tiny_llada2.yaml
accelerate launch -m dllm_memdlm.train recipes/llada2_mini.yaml memory.inner_lr=0.05 --dry-run
accelerate launch -m dllm_memdlm.train recipe:llada2_mini       # the same, in any folder
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from .cli import end, exit_code
from .config import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run `memdlm train` and return its exit code."""
    parser = argparse.ArgumentParser(prog="memdlm train", description="Train a recipe.")
    parser.add_argument("recipe", help="recipe file (YAML), or recipe:NAME of those that `memdlm recipes list` shows")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained, and what is missing")
    parser.add_argument("--gpus", help="plan for so many GPUs (with --dry-run; default: WORLD_SIZE, or 1)")
    parser.add_argument("--memory", help="say whether it fits GPUs of this size, such as 80GiB (with --dry-run)")
    parser.add_argument("--response-share", help="masked part of an example (with --dry-run; default: 0.25)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_intermixed_args(argv)
    return exit_code(lambda: run(args), args.debug, first_only=True)


def run(args: argparse.Namespace) -> None:
    """Train, or plan. Raises ConfigError for what the user can correct."""
    planned = (args.gpus, args.memory, args.response_share)
    if not args.dry_run and planned != (None, None, None):
        raise ConfigError("--gpus, --memory and --response-share: expected with --dry-run, to plan for")
    # Here, not above: these imports take seconds.
    from .training.recipe import load_recipe
    from .training.run import train

    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run:
        from .training.dry_run import dry_run, planned_for

        dry_run(recipe, **planned_for(*planned))
        return
    check_processes()
    trainer = train(recipe, args.resume)
    trainer.accelerator.end_training()  # not where something has failed: it would wait for processes that may be gone


def check_processes() -> None:
    """Refuse to be one process of several: without a GPU accelerate starts one, whatever it was asked for.

    Raises:
        ConfigError: it has set the address of a main process, and left this one without a rank.
    """
    import torch

    left_alone = {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and "RANK" not in os.environ
    if left_alone and not torch.cuda.is_available():
        raise ConfigError(
            "accelerate has started one process of several, as there is no GPU; expected `torchrun --nproc_per_node N "
            "-m dllm_memdlm.train …`, or, for one process, no MASTER_ADDR in the environment"
        )


if __name__ == "__main__":
    end(main())
