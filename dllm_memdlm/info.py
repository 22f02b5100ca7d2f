"""What is installed here and which settings exist: `python -m dllm_memdlm.info [--keys | --arguments]`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from .config import DataConfig, LoraConfig, MemoryConfig, ModelConfig, describe_type
from .machine import devices, package_versions

#: Recipe sections and the dataclasses that declare their keys.
SECTIONS: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "lora": LoraConfig, "memory": MemoryConfig}


class Key(NamedTuple):
    """One recipe key, `section.name`, as `--keys` prints it."""

    name: str
    type: str
    default: str
    help: str


def recipe_keys() -> list[Key]:
    """Every key of the sections in SECTIONS, in the order of declaration."""
    return [key for section, config in SECTIONS.items() for key in _keys(f"{section}.", config)]


def model_arguments() -> list[Key]:
    """What `lm_eval --model memdlm --model_args` takes, and `memdlm generate` as name=value."""
    from .inference.arguments import TRAINING_ONLY, EvalArguments
    from .inference.decoding import ONE_BLOCK, SAMPLERS, sampler_settings  # imports torch and transformers

    keys = _keys("", EvalArguments)
    for name, sampler in SAMPLERS.items():
        for key in _keys("", sampler.CONFIG, sampler_settings(name)):
            default = "tokens of the answer" if name == "mdlm" and key.name in ONE_BLOCK else key.default
            keys.append(key._replace(default=default, help=f"{name}: {key.help}"))
    return keys + _keys("memory_", MemoryConfig, {f.name for f in dataclasses.fields(MemoryConfig)} - TRAINING_ONLY)


def _keys(prefix: str, config: type, among: set[str] | None = None) -> list[Key]:
    hints = typing.get_type_hints(config)
    fields = [f for f in dataclasses.fields(config) if among is None or f.name in among]
    return [Key(prefix + f.name, describe_type(hints[f.name]), _default(f), f.metadata["help"]) for f in fields]


def _default(field: dataclasses.Field) -> str:
    """A field's default as a recipe would write it; JSON is a subset of YAML."""
    has_factory = field.default_factory is not dataclasses.MISSING
    value: Any = field.default_factory() if has_factory else field.default
    return json.dumps(value, ensure_ascii=False)


def keys_table(keys: list[Key], title: str = "Recipe keys") -> Table:
    """The keys as a table, a line between sections."""
    table = Table(title=title)
    table.add_column("key", no_wrap=True)  # to be copied into a recipe, so never cut
    for name in ("type", "default", "meaning"):
        table.add_column(name)
    for i, key in enumerate(keys):
        section, _, _ = key.name.rpartition(".")
        ends_section = i + 1 < len(keys) and keys[i + 1].name.rpartition(".")[0] != section
        table.add_row(*key, end_section=ends_section)
    return table


def main(argv: list[str] | None = None) -> int:
    """Entry point of `memdlm info`."""
    parser = argparse.ArgumentParser(prog="memdlm info", description="Show versions, devices and recipe keys.")
    parser.add_argument("--keys", action="store_true", help="list every key a recipe can set, with its default")
    parser.add_argument("--arguments", action="store_true", help="list what lm_eval's --model_args can set")
    # `markup=False`: brackets in help texts, such as "in [0, 1]", are text
    console = Console(markup=False, highlight=False)
    args = parser.parse_args(argv)
    if args.arguments:
        console.print(keys_table(model_arguments(), "Arguments of lm_eval --model memdlm, and of memdlm generate"))
        return 0
    if args.keys:
        console.print(keys_table(recipe_keys()))
        console.print("The `training` section takes the fields of dllm_memdlm.MemDLMConfig, documented there.")
        return 0

    from .compat.dllm_api import describe  # imports torch and, where it is installed, dllm

    for name, version in package_versions().items():
        console.print(f"{name:<13} {version}")
    console.print(f"{'using':<13} {describe()}", soft_wrap=True)
    for line in devices():
        console.print(f"{'device':<13} {line}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
