"""A trained model as it was saved: a full checkpoint, or an adapter on its base, with tokenizer and memory settings."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import yaml
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..backbones import load_model, read_config, staged_backbone
from ..backbones.adapters import adapter_folder, load_adapter, merge, narrow
from ..config import Attention, ConfigError, DType, MemoryConfig, ModelConfig
from ..data import check_mask, load_tokenizer
from ..data.sources import reason_of
from ..training.recipe import FILE_NAME


@dataclass
class Pretrained:
    """What decoding needs. The model is in eval mode, on its device, and nothing of it is trainable."""

    name: str
    model: Any  #: a backbone, or PEFT's wrapper around one
    tokenizer: PreTrainedTokenizerBase
    memory: MemoryConfig  #: as it was trained; the paper's settings where no recipe stands beside the weights
    right_shift_logits: bool
    visible: int | None = None  #: `data.visible` of the training
    template: dict[str, Any] = field(default_factory=dict)  #: `data.template` of it: arguments of the chat template


@dataclass
class Source:
    """What a model is made of, before any of its weights are read."""

    base: str  #: folder or hub name of the full model
    adapter: str | None  #: folder or hub name of what goes on it
    folders: list[str]  #: where to look for files beside the weights: the adapter's folder if there is one, the base
    config: PretrainedConfig  #: of the base
    recipe_file: Path | None  #: the first recipe.yaml in the folders
    recipe: dict[str, Any]  #: its sections; empty where there is no such file
    memory: MemoryConfig

    @property
    def name(self) -> str:
        """What a saved memory calls the model."""
        name = self.adapter or self.base
        return os.path.realpath(name) if os.path.isdir(name) else name

    @property
    def dtype(self) -> Any:
        """The name of the base's dtype."""
        return str(self.config.dtype or torch.float32).removeprefix("torch.")


def find_source(pretrained: str, adapter: str | None = None) -> Source:
    """Find the base and the adapter that these names stand for; `pretrained` may be the adapter, and name its base.

    Raises:
        ConfigError: there is no such base, or its architecture is not known; or a file beside it cannot be read.
    """
    base, hint = pretrained, ""
    if adapter is None and _is_adapter(pretrained):
        adapter, base = pretrained, _base_of(pretrained)
        hint = f"; {adapter!r} names that base, for another give pretrained=BASE,adapter={adapter}"
    folders = [base] if adapter is None else [adapter_folder(adapter), base]
    recipe_file = next(filter(None, (file_beside(folder, FILE_NAME) for folder in folders)), None)
    recipe, memory = ({}, MemoryConfig()) if recipe_file is None else _read(recipe_file)
    try:
        config = read_config(base, recipe.get("model", {}).get("architecture"), f"pretrained={base!r}")
    except ConfigError as error:
        raise ConfigError(f"{error}{hint}") from None
    return Source(base, adapter, folders, config, recipe_file, recipe, memory)


def file_beside(folder: str, name: str) -> Path | None:
    """Return a small file of a local folder, or of what the hub has under that name; none where it has none."""
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
    dtype: DType = "auto",
    load_in_4bit: bool = False,
    attn_implementation: Attention = "sdpa",
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
    settings = ModelConfig(
        path=source.base,
        dtype=source.dtype if dtype == "auto" else dtype,
        load_in_4bit=load_in_4bit,
        attn_implementation=attn_implementation,
    )
    loaded = load_tokenizer(tokenizer, f"tokenizer={tokenizer!r}")
    check_mask(loaded, source.config, f"tokenizer={tokenizer!r}")
    model = load_model(settings, source.config, where=f"pretrained={source.base!r}")
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
    shifted = source.recipe.get("training", {}).get("right_shift_logits")
    return Pretrained(
        name=source.name,
        model=model.eval().requires_grad_(False),
        tokenizer=loaded,
        memory=source.memory,
        right_shift_logits=bool(shifted or staged_backbone(model).right_shift_logits),
        visible=source.recipe.get("data", {}).get("visible"),
        template=source.recipe.get("data", {}).get("template") or {},
    )


def _is_adapter(name: str) -> bool:
    """Whether there is an adapter and, in a local folder, no full weights; some keep the base's config.json with it."""
    return file_beside(name, "adapter_config.json") is not None and not any(Path(name).glob("model*.safetensors"))


def _base_of(adapter: str) -> str:
    try:
        path = file_beside(adapter, "adapter_config.json")
        base = None if path is None else json.loads(path.read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:  # not JSON, or not a mapping
        raise ConfigError(f"pretrained={adapter!r}: no readable adapter_config.json ({reason_of(error)})") from None
    if not base:
        raise ConfigError(
            f"pretrained={adapter!r}: an adapter that does not name its base; give pretrained=BASE,adapter={adapter}"
        )
    return base


def _read(recipe: Path) -> tuple[dict[str, Any], MemoryConfig]:
    """Return the non-empty sections of a recipe, and its memory. Settings of training alone are not checked.

    It is as a run has saved it, with nothing left to resolve: of a stranger's file no `${…}` is replaced.

    Raises ConfigError, which begins with the file.
    """
    try:
        sections = dict(yaml.safe_load(recipe.read_text(encoding="utf-8")) or {})
        sections = {name: section for name, section in sections.items() if section is not None}
        for name, section in sections.items():
            if not isinstance(section, dict):
                raise ConfigError(f"{name}={section!r}: expected a mapping")
        memory = dict(sections.get("memory", {}))
        if memory.get("layers") == "last":  # in runs of before, and the only choice now
            del memory["layers"]
        return sections, MemoryConfig(**memory)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:  # a ConfigError, too
        raise ConfigError(f"{recipe}: not a recipe of this version ({reason_of(error)})") from None
