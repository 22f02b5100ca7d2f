"""Merge an adapter into its base and write a plain checkpoint, which needs neither PEFT nor this package.

A memory of a document is added, too, or becomes an adapter of its own.

python -m dllm_memdlm.export --model runs/mine --out merged --dtype bfloat16
python -m dllm_memdlm.export --model runs/mine --memory doc.safetensors --as-adapter --out doc-adapter
"""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Sequence

from .cli import exit_code
from .config import DType

DESCRIPTION = (
    "Write a plain checkpoint, with the adapter added to the weights, which are loaded unquantised; "
    "or the memory of a document as an adapter for stock PEFT."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `memdlm export` and return its exit code."""
    parser = argparse.ArgumentParser(prog="memdlm export", description=DESCRIPTION)
    parser.add_argument("--model", required=True, metavar="DIR", help="a run's folder, a hub name, or an adapter")
    parser.add_argument("--adapter", metavar="DIR", help="a PEFT adapter for the model")
    parser.add_argument("--memory", metavar="FILE", help="what generate --save-memory kept; it is added, too")
    parser.add_argument("--as-adapter", action="store_true", help="write the memory as a LoRA, joined with the run's")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write; not there yet, or empty")
    dtypes = typing.get_args(DType)
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights (default: auto, the base's)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.as_adapter and args.memory is None:
        parser.error("--as-adapter: it is how a memory is written; give --memory FILE, too")
    if args.as_adapter and args.dtype not in ("auto", "float32"):
        parser.error(f"--dtype {args.dtype}: expected float32 with --as-adapter, as the memory is")
    return exit_code(lambda: run(args), args.debug)


def run(args: argparse.Namespace) -> None:
    """Write the checkpoint, or the adapter. Raises ConfigError for what the user can correct."""
    from .inference.plain_checkpoint import export, export_adapter  # takes seconds to import

    if args.as_adapter:
        out = export_adapter(args.model, args.out, args.memory, args.adapter)
    else:
        out = export(args.model, args.out, args.adapter, args.dtype, memory=args.memory)
    print(f"saved to {out}")


if __name__ == "__main__":
    sys.exit(main())
