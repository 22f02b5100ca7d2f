"""Merge an adapter into its base and write a plain checkpoint, which needs neither PEFT nor this package.

python -m dllm_memdlm.export --model runs/mine --out merged --dtype bfloat16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .launch import exit_code, prepare_to_load

DESCRIPTION = "Write a plain checkpoint, with the adapter added to the weights; those are loaded unquantised."


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `memdlm export`. Returns 2 after one line about what the user can correct."""
    parser = argparse.ArgumentParser(prog="memdlm export", description=DESCRIPTION)
    parser.add_argument("--model", required=True, metavar="DIR", help="a run's folder, a hub name, or an adapter")
    parser.add_argument("--adapter", metavar="DIR", help="a PEFT adapter for the model")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write; not there yet, or empty")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights (default: auto, the base's)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args), args.debug)


def run(args: argparse.Namespace) -> None:
    """Write the checkpoint. Raises ConfigError for what the user can correct."""
    prepare_to_load()
    # Here, not above: transformers looks at the offline switch when it is imported.
    from .inference.plain_checkpoint import export

    print(f"saved to {export(args.model, args.out, args.adapter, args.dtype)}")


if __name__ == "__main__":
    sys.exit(main())
