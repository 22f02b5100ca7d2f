"""A recipe: one YAML file that names a model, its LoRA, the data, the memory and the training arguments.

    extends: llada2_mini.yaml        # optional: start from another recipe, relative to this one, or recipe:llada2_mini
    memory: {inner_lr: 0.05}         # and change what differs

Command-line overrides (`memory.inner_lr=0.05`) come last. An unknown key is refused with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config import ConfigError, DataConfig, LoraConfig, MemoryConfig, ModelConfig, refuse_unknown
from . import shipped
from .arguments import MemDLMConfig

#: The file that stands beside every checkpoint.
FILE_NAME = "recipe.yaml"

#: The sections of a recipe and the dataclasses that declare their keys.
SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "lora": LoraConfig,
    "data": DataConfig,
    "memory": MemoryConfig,
    "training": MemDLMConfig,
}


@dataclass(kw_only=True)
class Recipe:
    """Everything that a run is made from."""

    model: ModelConfig
    data: DataConfig
    training: MemDLMConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    values: dict[str, Any] = field(default_factory=dict, repr=False)  #: as resolved: `extends` and overrides merged

    def __post_init__(self) -> None:
        self.model = self.model.for_training(self.lora)

    def to_yaml(self) -> str:
        """Return every section with every value, but `training` as given. Loading it gives the same recipe."""
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS if name != "training"}
        text: str = OmegaConf.to_yaml(OmegaConf.create({**sections, "training": self.values["training"]}))
        return text

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write recipe.yaml into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / FILE_NAME).write_text(self.to_yaml(), encoding="utf-8")


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or `recipe:NAME`, what it extends, and command-line overrides.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, a value is of the wrong type or out of range. The message
            names the file.
    """
    file = shipped.find(path)
    try:
        return build_recipe(resolve(file, overrides), default_output_dir=f"runs/{file.stem}")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def resolve(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the plain values of a recipe, with `extends` followed and overrides applied. Raises ConfigError."""
    merged = _read(shipped.find(path), seen=())
    for override in overrides:
        if not override.partition("=")[0] or "=" not in override:
            raise ConfigError(f"override {override!r}: expected section.key=value, such as memory.inner_lr=0.05")
        try:
            change = OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"override {override!r}: {' '.join(str(error).split())}") from None
        merged = _merge(merged, change)
    try:
        values: dict[str, Any] = OmegaConf.to_container(merged, resolve=True)
        return values
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None


def _merge(base: DictConfig, change: DictConfig) -> DictConfig:
    for section, value in change.items():
        if isinstance(base.get(section), DictConfig) and not (value is None or isinstance(value, DictConfig)):
            raise ConfigError(f"{section}={value}: expected a mapping")
    try:
        return OmegaConf.merge(base, change)
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(str(error).splitlines()[0]) from None


def _read(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"extends: {' → '.join(p.name for p in (*seen, path))} is a circle")
    try:
        content = OmegaConf.load(path)
    except FileNotFoundError:
        advice = f"; did you mean {shipped.PREFIX}{path.stem}?" if path.stem in shipped.names() else ""
        raise ConfigError(f"no such recipe file: {path}{advice}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"not a readable YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"expected a mapping of sections ({', '.join(SECTIONS)})")
    base = content.pop("extends", None)
    if not isinstance(base, str | None):
        raise ConfigError(f"extends={base}: expected a file name")
    return content if base is None else _merge(_read(shipped.find(base, path.parent), (*seen, path)), content)


def build_recipe(values: dict[str, Any], default_output_dir: str | None = None) -> Recipe:
    """Make a recipe of plain values. Raises ConfigError for whatever does not fit."""
    keys = {name: [f.name for f in dataclasses.fields(cls) if f.init] for name, cls in SECTIONS.items()}
    for name in values:
        if name not in SECTIONS and (within := [f"{section}.{name}" for section in keys if name in keys[section]]):
            raise ConfigError(f"unknown key {name!r}; did you mean {' or '.join(within)}?")
    refuse_unknown("key", values, SECTIONS)
    values = {name: {} if values.get(name) is None else values[name] for name in SECTIONS}
    for name, section in values.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{name}={section!r}: expected a mapping")
        refuse_unknown("key", section, keys[name], f"{name}.")
    values["training"].setdefault("output_dir", default_output_dir)
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if values["training"].get(name) is False:  # a bare `no`, which YAML reads as false
            values["training"][name] = "no"
    built = {name: cls(**values[name]) for name, cls in SECTIONS.items() if name != "training"}
    if built["lora"].path is not None and built["model"].path is None:
        raise ConfigError(f"lora.path={built['lora'].path!r}: expected a model.path, of the base that it was made for")
    if built["model"].load_in_4bit and not built["lora"].enabled:
        raise ConfigError("model.load_in_4bit=True: expected lora.enabled=true, as packed weights are not trained")
    memory = built["memory"]
    if not built["data"].mask_prompt and (memory.source == "prompt" or memory.prompt_loss > 0):
        raise ConfigError(
            "data.mask_prompt=False: expected true with memory.source: prompt, and with memory.prompt_loss, as nothing "
            "else says where a prompt ends"
        )
    try:
        training = MemDLMConfig(**values["training"])
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:  # transformers' own validation
        raise ConfigError(f"training: {' '.join(str(error).split())}") from None
    return Recipe(**built, training=training, values=values)
