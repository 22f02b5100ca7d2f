"""A recipe: one YAML file that names a model, its LoRA, the data, the memory and the training arguments.

    extends: llada2_mini.yaml        # optional: start from another recipe, relative to this one
    memory: {inner_lr: 0.05}         # and change what differs

Command-line overrides (`memory.inner_lr=0.05`) come last. An unknown key is refused with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config import ConfigError, DataConfig, LoraConfig, MemoryConfig, ModelConfig, describe_type
from .trainer import MemDLMConfig

#: The file that stands beside every checkpoint.
FILE_NAME = "recipe.yaml"


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
        """Every section with every value; of `training` what the recipe sets. Loading it gives the same recipe."""
        sections = ("model", "lora", "data", "memory")
        full = {name: _plain(dataclasses.asdict(getattr(self, name))) for name in sections}
        return OmegaConf.to_yaml(OmegaConf.create({**full, "training": self.values["training"]}))

    def save(self, folder: str | os.PathLike) -> None:
        """Write recipe.yaml into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / FILE_NAME).write_text(self.to_yaml(), encoding="utf-8")


def load_recipe(path: str | os.PathLike, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file, what it extends, and command-line overrides.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, a value is of the wrong type or out of range. The message
            names the file.
    """
    try:
        return build_recipe(resolve(path, overrides), default_output_dir=f"runs/{Path(path).stem}")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def resolve(path: str | os.PathLike, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """The plain values of a recipe, with `extends` followed and overrides applied."""
    merged = _read(Path(path), seen=())
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r}: expected section.key=value, such as memory.inner_lr=0.05")
        try:
            change = OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"override {override!r}: {' '.join(str(error).split())}") from None
        merged = _merge(merged, change)
    try:
        return OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None


def _merge(base: DictConfig, change: DictConfig) -> DictConfig:
    for section, value in change.items():
        if isinstance(base.get(section), DictConfig) and not (value is None or isinstance(value, DictConfig)):
            plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            raise ConfigError(f"{section}={plain!r}: expected a mapping")
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
        raise ConfigError(f"no such recipe file: {path}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"not a readable YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"expected a mapping of sections ({', '.join(_sections())})")
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str):
        plain = OmegaConf.to_container(base) if OmegaConf.is_config(base) else base
        raise ConfigError(f"extends={plain!r}: expected a file name")
    return _merge(_read(path.parent / base, (*seen, path)), content)


def _sections() -> dict[str, type]:
    hints = typing.get_type_hints(Recipe)
    return {f.name: hints[f.name] for f in dataclasses.fields(Recipe) if f.name != "values"}


def build_recipe(values: dict[str, Any], default_output_dir: str | None = None) -> Recipe:
    """A recipe from plain values. Raises ConfigError for whatever does not fit."""
    sections = _sections()
    _refuse_unknown(values, list(sections), "")
    values = {name: {} if values.get(name) is None else values[name] for name in sections}
    for name, section in values.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{name}={section!r}: expected a mapping")
        known = [f.name for f in dataclasses.fields(sections[name]) if f.init]
        _refuse_unknown(section, known, f"{name}.")
    values["training"].setdefault("output_dir", default_output_dir)
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if values["training"].get(name) is False:  # a bare `no`, which YAML reads as false
            values["training"][name] = "no"
    _check_training(values["training"])
    built = {name: cls(**values[name]) for name, cls in sections.items() if name != "training"}
    if built["lora"].path is not None and built["model"].path is None:
        raise ConfigError(f"lora.path={built['lora'].path!r}: expected a model.path, of the base that it was made for")
    if built["model"].load_in_4bit and not built["lora"].enabled:
        raise ConfigError("model.load_in_4bit=True: expected lora.enabled=true, as packed weights are not trained")
    try:
        training = MemDLMConfig(**values["training"])
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:  # transformers' own validation
        raise ConfigError(f"training: {' '.join(str(error).split())}") from None
    return Recipe(**built, training=training, values=values)


def _refuse_unknown(values: dict[str, Any], known: list[str], prefix: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            advice = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown key {prefix}{key}; {advice}")


def _check_training(values: dict[str, Any]) -> None:
    """Check the plain types among transformers' arguments, which transformers itself takes as they come."""
    hints = typing.get_type_hints(MemDLMConfig)
    for name, value in values.items():
        plain = _plain_types(hints[name])
        if plain and not _fits(value, plain):
            raise ConfigError(f"training.{name}={value!r}: expected {describe_type(hints[name])}")


def _plain_types(hint: Any) -> set[type]:
    """The types a hint allows if they are all plain ones; empty where it says more than that."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    plain = {bool, int, float, str, type(None)}
    return set(options) if set(options) <= plain else set()


def _fits(value: Any, plain: set[type]) -> bool:
    if type(value) is int and float in plain:
        return True
    return type(value) in plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
