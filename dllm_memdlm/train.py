"""Train a recipe.

accelerate launch -m dllm_memdlm.train recipes/tiny_llada2.yaml
accelerate launch -m dllm_memdlm.train recipes/llada2_mini.yaml memory.inner_lr=0.05 --dry-run
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .config import ConfigError
from .launch import check_processes, close_process_group, end, prepare_to_load


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `memdlm train`. Returns 2 where the user can correct something, after one line that says what."""
    parser = argparse.ArgumentParser(prog="memdlm train", description="Train a recipe.")
    parser.add_argument("recipe", help="recipe file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained, and what is missing")
    parser.add_argument("--gpus", help="plan for so many GPUs (with --dry-run; default: WORLD_SIZE, or 1)")
    parser.add_argument("--memory", help="say whether it fits GPUs of this size, such as 80GiB (with --dry-run)")
    parser.add_argument("--response-share", help="masked part of an example (with --dry-run; default: 0.25)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_intermixed_args(argv)
    try:
        prepare_to_load()
        # Here, not above: transformers and datasets look at the offline switch when they are imported.
        from .training.recipe import load_recipe
        from .training.run import train

        planned = (args.gpus, args.memory, args.response_share)
        if not args.dry_run and planned != (None, None, None):
            raise ConfigError("--gpus, --memory and --response-share: expected with --dry-run, to plan for")
        recipe = load_recipe(args.recipe, args.overrides)
        if args.dry_run:
            from .training.dry_run import Machine, dry_run

            dry_run(recipe, Machine.from_arguments(*planned))
        else:
            check_processes()
            train(recipe, args.resume)
            close_process_group()  # not where something has failed: it would wait for processes that may be gone
    except ConfigError as error:
        if args.debug:
            raise
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # on every node, as the next may lack another file
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def command() -> None:
    """What `python -m dllm_memdlm.train` runs."""
    end(main())


if __name__ == "__main__":
    command()
