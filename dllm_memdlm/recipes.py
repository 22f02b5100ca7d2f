"""List the recipes that come with the package, or copy one to change it.

python -m dllm_memdlm.recipes list
python -m dllm_memdlm.recipes copy llada2_mini my_recipes
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .cli import exit_code
from .training import shipped


def main(argv: Sequence[str] | None = None) -> int:
    """Run `memdlm recipes` and return its exit code."""
    about = "List the recipes that come with the package, or copy one to change it."
    parser = argparse.ArgumentParser(prog="memdlm recipes", description=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{list,copy}")
    commands.add_parser("list", help="show each recipe's name and what it trains")
    copy = commands.add_parser("copy", help="write a recipe, and the files that it extends, into a folder")
    copy.add_argument("name", help="one of those that `memdlm recipes list` shows")
    copy.add_argument("folder", nargs="?", default=".", help="where to write (default: here)")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """List or copy. Raises ConfigError for what the user can correct."""
    if args.command == "list":
        width = max(map(len, shipped.names()))
        for name in shipped.names():
            print(f"{name:<{width}}  {shipped.about(name)}")
        print(f"\nmemdlm train {shipped.PREFIX}NAME trains one, memdlm recipes copy NAME writes it here")
        return
    for path in shipped.copy(args.name.removeprefix(shipped.PREFIX), args.folder):
        print(path)


if __name__ == "__main__":
    raise SystemExit(main())
