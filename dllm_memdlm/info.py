"""What is installed here and which settings exist: `python -m dllm_memdlm.info [--keys]`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import typing
from importlib import metadata
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from .config import DataConfig, LoraConfig, MemoryConfig, ModelConfig, describe_type

#: Recipe sections and the dataclasses that declare their keys.
SECTIONS: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "lora": LoraConfig, "memory": MemoryConfig}

#: The packages whose versions change results, then those that add a feature.
PACKAGES = (
    *("dllm-memdlm", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "omegaconf"),
    *("dllm", "trl", "deepspeed", "lm_eval", "bitsandbytes"),
)


class Key(NamedTuple):
    """One recipe key, `section.name`, as `--keys` prints it."""

    name: str
    type: str
    default: str
    help: str


def recipe_keys() -> list[Key]:
    """Every key of the sections in SECTIONS, in the order of declaration."""
    keys = []
    for section, config in SECTIONS.items():
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            help_text = field.metadata["help"]
            keys.append(Key(f"{section}.{field.name}", describe_type(hints[field.name]), _default(field), help_text))
    return keys


def _default(field: dataclasses.Field) -> str:
    """A field's default as a recipe would write it; JSON is a subset of YAML."""
    has_factory = field.default_factory is not dataclasses.MISSING
    value: Any = field.default_factory() if has_factory else field.default
    return json.dumps(value, ensure_ascii=False)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages among PACKAGES."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def devices() -> list[str]:
    """One line for each device torch can compute on: the accelerators first, then the CPU."""
    import torch  # seconds to import, and --keys does not need it

    lines = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index}: {card.name}, {card.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        lines.append("mps")
    return [*lines, f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"]


def keys_table(keys: list[Key]) -> Table:
    """The keys as a table, a line between sections."""
    table = Table(title="Recipe keys")
    table.add_column("key", no_wrap=True)  # to be copied into a recipe, so never cut
    for name in ("type", "default", "meaning"):
        table.add_column(name)
    for i, key in enumerate(keys):
        ends_section = i + 1 < len(keys) and keys[i + 1].name.split(".")[0] != key.name.split(".")[0]
        table.add_row(*key, end_section=ends_section)
    return table


def main(argv: list[str] | None = None) -> int:
    """Entry point of `memdlm-info`."""
    parser = argparse.ArgumentParser(prog="memdlm-info", description="Show versions, devices and recipe keys.")
    parser.add_argument("--keys", action="store_true", help="list every key a recipe can set, with its default")
    # `markup=False`: brackets in help texts, such as "in [0, 1]", are text
    console = Console(markup=False, highlight=False)
    if parser.parse_args(argv).keys:
        console.print(keys_table(recipe_keys()))
        console.print("The `training` section takes the fields of dllm_memdlm.trainer.MemDLMConfig, documented there.")
        return 0

    from .dllm_api import describe  # imports torch and, where it is installed, dllm

    for name, version in package_versions().items():
        console.print(f"{name:<13} {version}")
    console.print(f"{'using':<13} {describe()}", soft_wrap=True)
    for line in devices():
        console.print(f"{'device':<13} {line}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
