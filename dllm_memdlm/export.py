"""Merge an adapter into its base and write a plain checkpoint, which needs neither PEFT nor this package.

python -m dllm_memdlm.export --model runs/mine --out merged --dtype bfloat16
"""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Sequence

from .cli import exit_code
from .config import DType

DESCRIPTION = "Write a plain checkpoint, with the adapter added to the weights; those are loaded unquantised."


def main(argv: Sequence[str] | None = None) -> int:
    """Run `memdlm export` and return its exit code."""
    parser = argparse.ArgumentParser(prog="memdlm export", description=DESCRIPTION)
    parser.add_argument("--model", required=True, metavar="DIR", help="a run's folder, a hub name, or an adapter")
    parser.add_argument("--adapter", metavar="DIR", help="a PEFT adapter for the model")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write; not there yet, or empty")
    dtypes = typing.get_args(DType)
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights (default: auto, the base's)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args), args.debug)


def run(args: argparse.Namespace) -> None:
    """Write the checkpoint. Raises ConfigError for what the user can correct."""
    from .inference.plain_checkpoint import export  # takes seconds to import

    print(f"saved to {export(args.model, args.out, args.adapter, args.dtype)}")


if __name__ == "__main__":
    sys.exit(main())
