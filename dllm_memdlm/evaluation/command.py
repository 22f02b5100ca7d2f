"""What the evaluations of a run share as commands: their arguments, the run's data, the report."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..cli import check_writable
from ..config import ConfigError, DataConfig
from ..machine import package_versions

if TYPE_CHECKING:
    from ..inference.arguments import Parsed
    from ..inference.decoding import Decoder


#: The memory that is in place when a model is asked: none, that of another text, which is the control, or its own.
WHOSE = ("none", "other", "own")


def of_a_run(prog: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments of every evaluation; to be read with `parse_intermixed_args`."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--model", required=True, metavar="DIR", help="a run's folder")
    parser.add_argument("--memory", action="store_true", help="adapt to each prompt")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("settings", nargs="*", metavar="name=value", help="as memdlm generate takes them")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(adapter=None, save_memory=None, load_memory=None)  # for `from_command_line`
    return parser


def read(args: argparse.Namespace, **defaults: Any) -> tuple[Parsed, DataConfig]:
    """Return what was asked for, as the arguments of lm-eval's model, and the data of the run's recipe.

    Raises:
        ConfigError: an argument that does not exist or fit; no recipe beside the model; `--output` cannot be written.
    """
    # Here, not above: these imports take seconds.
    from ..inference.arguments import from_command_line
    from ..training.recipe import FILE_NAME, load_recipe

    check_writable("--output", args.output, make_folder=True)
    parsed = from_command_line(args, **defaults)
    folder = parsed.arguments.adapter or parsed.arguments.pretrained
    return parsed, load_recipe(Path(folder) / FILE_NAME).data


def finish(path: Path, report: dict[str, Any], decoder: Decoder, table: Table, console: Console) -> None:
    """Write the report with the versions that made it and what became of memories; show the table and what went wrong.

    It is written aside and renamed: who looks sees a whole file. Raises ConfigError if it cannot be written.
    """
    if decoder.memory is not None:
        report = report | {"memory_tally": dataclasses.asdict(decoder.memory.tally)}
    text = json.dumps(report | {"versions": package_versions()}, indent=2) + "\n"
    aside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror or error}") from error
    console.print(table)
    console.print(str(path), soft_wrap=True)
    if decoder.memory is not None and (lost := decoder.memory.tally.failures()):
        console.print(f"without memory: {lost}", style="yellow")
    if left := decoder.unfinished():
        console.print(left, style="yellow", soft_wrap=True)
