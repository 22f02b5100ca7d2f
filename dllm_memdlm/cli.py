"""The command `memdlm`, whose parts are modules of the same names: `python -m dllm_memdlm.train` is `memdlm train`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from . import __version__
from .launch import end

COMMANDS = {
    "train": "train a recipe",
    "generate": "ask a model about a document",
    "evaluate": "lm-evaluation-harness, with the model `memdlm`",
    "export": "write a plain checkpoint, with the adapter in its weights",
    "info": "versions, devices, and all settings",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit code, 2 after one line about what the user can correct."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="memdlm",
        usage="memdlm COMMAND …",
        epilog="\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "command", nargs="?", choices=COMMANDS, metavar="COMMAND", help="one of those below; each has a --help"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    return importlib.import_module(f".{args.command}", __package__).main(args.arguments)


def command() -> None:
    """What `memdlm` runs."""
    end(main())


if __name__ == "__main__":
    command()
