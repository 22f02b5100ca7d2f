"""A trained model as it was saved: a full checkpoint, or an adapter on its base, with tokenizer and memory settings."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import yaml
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..backbones import load_model, read_config
from ..backbones.adapters import adapter_folder, load_adapter, merge, narrow
from ..config import ConfigError, MemoryConfig, ModelConfig
from ..data import load_tokenizer
from ..training.recipe import FILE_NAME


@dataclass
class Pretrained:
    """What decoding needs. The model is in eval mode, on its device, and nothing of it is trainable."""

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    memory: MemoryConfig  #: as it was trained; the paper's settings where no recipe stands beside the weights
    right_shift_logits: bool


@dataclass
class Source:
    """What a model is made of, before any of its weights are read."""

    base: str  #: folder or hub name of the full model
    adapter: str | None  #: folder or hub name of what goes on it
    folders: list[str]  #: where to look for files beside the weights: the adapter's folder if there is one, the base
    config: PretrainedConfig  #: of the base


def find_source(pretrained: str, adapter: str | None = None) -> Source:
    """The base and the adapter that these names stand for; `pretrained` may be the adapter, and name its base.

    Raises:
        ConfigError: there is no such base, or its architecture is not known.
    """
    base = pretrained
    if adapter is None and _is_adapter(pretrained):
        adapter, base = pretrained, _base_of(pretrained)
    folders = [base] if adapter is None else [adapter_folder(adapter), base]
    _, recipe = _recipe_beside(folders)
    try:
        config = read_config(base, _section(recipe, "model").get("architecture"))
    except ConfigError as error:
        hint = f"; {adapter!r} names that base, for another give pretrained=BASE,adapter={adapter}"
        raise ConfigError(_named(str(error), base) + (hint if base != pretrained else "")) from None
    return Source(base, adapter, folders, config)


def file_beside(folder: str, name: str) -> Path | None:
    """A small file of a local folder, or of what the hub has under that name; none where it has none."""
    if os.path.exists(folder):
        path = Path(folder) / name
        return path if path.is_file() else None
    try:
        return Path(huggingface_hub.hf_hub_download(folder, name))
    except (OSError, ValueError):  # no such file, name, or network
        return None


def load_pretrained(
    pretrained: str,
    adapter: str | None = None,
    tokenizer: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    load_in_4bit: bool = False,
    attn_implementation: str = "sdpa",
    merge_adapter: bool = False,
) -> Pretrained:
    """Load a run's folder, a hub name, or an adapter.

    Args:
        pretrained: folder or hub name of a full model; or the folder of an adapter, whose base is then taken from it.
        adapter: folder or hub name of a PEFT adapter for it.
        tokenizer: folder or hub name; by default the adapter's or the model's own.
        device: where to put the model.
        dtype: of the weights; auto is the checkpoint's.
        load_in_4bit: NF4 with double quantisation.
        attn_implementation: sdpa, eager or flash_attention_2.
        merge_adapter: add the adapter to the weights: faster, and rounded to their dtype.

    Raises:
        ConfigError: something is not there, or does not fit; the message begins with the argument's name.
    """
    if merge_adapter and load_in_4bit:
        raise ConfigError("merge_adapter=True: expected false with load_in_4bit; packed weights take no sum")
    source = find_source(pretrained, adapter)
    if tokenizer is None:
        beside = (f for f in source.folders if os.path.isdir(f) and any(Path(f).glob("tokenizer*")))
        tokenizer = next(beside, source.base)
    if dtype == "auto":
        dtype = str(source.config.dtype or torch.float32).removeprefix("torch.")
    try:
        model_config = ModelConfig(
            path=source.base, dtype=dtype, load_in_4bit=load_in_4bit, attn_implementation=attn_implementation
        )
        loaded = load_tokenizer(tokenizer, f"tokenizer={tokenizer!r}")
        model = load_model(model_config, source.config)
    except ConfigError as error:
        raise ConfigError(_named(str(error), source.base)) from None
    if len(loaded) > source.config.vocab_size:
        raise ConfigError(
            f"tokenizer={tokenizer!r}: {len(loaded)} tokens, of which the model of pretrained={source.base!r} has "
            f"{source.config.vocab_size}; expected the tokenizer that it was trained with"
        )
    if source.adapter is not None:
        model = load_adapter(model, source.adapter)
        if merge_adapter:
            model = merge(model)
        else:
            narrow(model)
    if not load_in_4bit:  # those are put in place as they are loaded
        model = model.to(device)
    memory, right_shift_logits = _settings_beside(source.folders)
    name = source.adapter or source.base
    return Pretrained(
        name=os.path.realpath(name) if os.path.isdir(name) else name,
        model=model.eval().requires_grad_(False),
        tokenizer=loaded,
        memory=memory,
        right_shift_logits=right_shift_logits,
    )


def _is_adapter(name: str) -> bool:
    """Whether there is an adapter and, in a local folder, no full weights; some keep the base's config.json with it."""
    return file_beside(name, "adapter_config.json") is not None and not any(Path(name).glob("model*.safetensors"))


def _base_of(adapter: str) -> str:
    try:
        base = json.loads(file_beside(adapter, "adapter_config.json").read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:  # not JSON, or not a mapping
        raise ConfigError(f"pretrained={adapter!r}: no readable adapter_config.json ({_one_line(error)})") from None
    if not base:
        raise ConfigError(
            f"pretrained={adapter!r}: an adapter that does not name its base; give pretrained=BASE,adapter={adapter}"
        )
    return base


def _settings_beside(folders: list[str]) -> tuple[MemoryConfig, bool]:
    """The memory and whether logits are shifted, of the first recipe.yaml in the folders."""
    path, recipe = _recipe_beside(folders)
    settings = _section(recipe, "memory")
    if settings.get("layers") == "last":  # in runs of before, and the only choice now
        settings = {name: value for name, value in settings.items() if name != "layers"}
    try:
        memory = MemoryConfig(**settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not a recipe of this version ({_one_line(error)})") from None
    return memory, bool(_section(recipe, "training").get("right_shift_logits", False))


def _recipe_beside(folders: list[str]) -> tuple[Path | None, dict[str, Any]]:
    """The first recipe.yaml in the folders, and its sections; none where there is no such file."""
    path = next(filter(None, (file_beside(folder, FILE_NAME) for folder in folders)), None)
    if path is None:
        return None, {}
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable recipe ({_one_line(error)})") from None
    sections = [recipe] if not isinstance(recipe, dict) else recipe.values()
    for value in sections:
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{path}: not a recipe ({value!r}: expected a mapping)")
    return path, recipe


def _section(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    return recipe.get(name) or {}


def _named(message: str, pretrained: str) -> str:
    """A message about a recipe's key, in terms of the arguments here."""
    if message.startswith("model.architecture="):
        return f"pretrained={pretrained!r}: {message.removeprefix('model.')}"
    message = message.replace("set model.tokenizer to it", "give tokenizer=FOLDER")
    message = message.replace("set model.architecture", "expected one there, or model.architecture in the run's recipe")
    return message.replace("model.path=", "pretrained=").removeprefix("model.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
