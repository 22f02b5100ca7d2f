"""What is installed, whether a run would work, all settings: `python -m dllm_memdlm.info [--keys | --arguments]`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from .cli import hush
from .config import DataConfig, LoraConfig, MemoryConfig, ModelConfig, declared
from .machine import Finding, devices, hub, one_line, packages, step

#: Recipe sections and the dataclasses that declare their keys; those of `training` are for the most part transformers'.
SECTIONS: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "lora": LoraConfig, "memory": MemoryConfig}


class Key(NamedTuple):
    """One setting as it is printed."""

    name: str
    type: str
    default: str
    help: str


def recipe_keys() -> list[Key]:
    """Return every key of the sections in SECTIONS, in the order of declaration."""
    return [key for section, config in SECTIONS.items() for key in _keys(f"{section}.", config)]


def model_arguments() -> list[Key]:
    """Return what `lm_eval --model memdlm --model_args` takes, and `memdlm generate` as name=value."""
    from .inference.arguments import MEMORY, EvalArguments
    from .inference.decoding import ONE_BLOCK, SAMPLERS, sampler_settings  # imports torch and transformers

    keys = _keys("", EvalArguments)
    for name, sampler in SAMPLERS.items():
        for key in _keys("", sampler.CONFIG, sampler_settings(name)):
            default = "tokens of the answer" if name == "mdlm" and key.name in ONE_BLOCK else key.default
            keys.append(key._replace(default=default, help=f"{name}: {key.help}"))
    return keys + _keys("memory_", MemoryConfig, set(MEMORY.values()))


def _keys(prefix: str, config: type, among: set[str] | None = None) -> list[Key]:
    """Return the fields of a dataclass, with defaults as a recipe would write them; JSON is a subset of YAML."""
    keys = []
    for f in dataclasses.fields(config):
        if among is None or f.name in among:
            default: Any = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            written = json.dumps(default, ensure_ascii=False)
            keys.append(Key(prefix + f.name, declared(config)[f.name][1], written, f.metadata["help"]))
    return keys


def keys_table(keys: list[Key], title: str) -> Table:
    """Return the keys as a table, with a line between sections."""
    table = Table(title=title)
    table.add_column("key", no_wrap=True)  # to be copied into a recipe, so never cut
    for name in ("type", "default", "meaning"):
        table.add_column(name, overflow="fold")
    sections = [key.name.rpartition(".")[0] for key in keys]
    for key, section, following in zip(keys, sections, [*sections[1:], ""], strict=True):
        table.add_row(*key, end_section=section != following)
    return table


def findings() -> list[Finding]:
    """Return what is installed here, what is in use, what a step runs on, and the hub."""
    found = packages()
    try:
        from .compat.dllm_api import DLLM_COMMIT, commit, describe  # imports torch and, where it is installed, dllm

        used = Finding("using", describe(), f"commit {commit()}, tested with {DLLM_COMMIT}" if commit() else "")
        return [*found, used, *(Finding("device", line) for line in devices()), *step(), *hub()]
    except (AttributeError, ImportError, RuntimeError) as error:  # what is required is not there, or is too old
        return [*found, Finding("using", "nothing", f"mend what is above; {one_line(error)}", "✗")]


def show(found: list[Finding], console: Console) -> None:
    """Print a table on a terminal, and lines elsewhere."""
    table = Table("name", "found", "needed, or what to do")
    for name, what, note, mark in found:
        remark = " ".join(filter(None, (mark, note)))
        table.add_row(name, what, remark, style="red" if mark == "✗" else None)
        if not console.is_terminal:
            console.print(f"{name:<13} {what}{remark and f'  {remark}'}", soft_wrap=True)
    if console.is_terminal:
        console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `memdlm info` and return its exit code."""
    parser = argparse.ArgumentParser(prog="memdlm info", description="Show what is installed, or all settings.")
    parser.add_argument("--keys", action="store_true", help="list every key a recipe can set, with its default")
    parser.add_argument("--arguments", action="store_true", help="list what lm_eval's --model_args can set")
    args = parser.parse_args(argv)
    hush()
    # `markup=False`: brackets in help texts, such as "in [0, 1]", are text
    console = Console(markup=False, highlight=False)
    if args.arguments:
        console.print(keys_table(model_arguments(), "Arguments of lm_eval --model memdlm, and of memdlm generate"))
    elif args.keys:
        console.print(keys_table(recipe_keys(), "Recipe keys"))
        console.print("The `training` section takes the fields of dllm_memdlm.MemDLMConfig, documented there.")
    else:
        found = findings()
        show(found, console)
        if failing := [finding.name for finding in found if finding.mark == "✗"]:
            print(f"error: a run would fail; see ✗ above: {', '.join(failing)}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
