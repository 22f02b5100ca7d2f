"""A trained model as it was saved: a full checkpoint, or an adapter on its base, with tokenizer and memory settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from .backbones import load_model, read_config
from .config import ConfigError, MemoryConfig, ModelConfig
from .data import load_tokenizer
from .recipe import FILE_NAME


@dataclass
class Pretrained:
    """What decoding needs. The model is in eval mode, on its device, and nothing of it is trainable."""

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    memory: MemoryConfig  #: as it was trained; the paper's settings where no recipe stands beside the weights
    right_shift_logits: bool


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
    if adapter is None and _is_adapter(pretrained):
        adapter, pretrained = pretrained, _base_of(pretrained)
    folders = [name for name in (adapter, pretrained) if name is not None]
    if tokenizer is None:
        tokenizer = next((f for f in folders if Path(f).is_dir() and any(Path(f).glob("tokenizer*"))), pretrained)
    try:
        config = read_config(pretrained)
        if dtype == "auto":
            dtype = str(config.dtype or torch.float32).removeprefix("torch.")
        model_config = ModelConfig(
            path=pretrained, dtype=dtype, load_in_4bit=load_in_4bit, attn_implementation=attn_implementation
        )
        loaded = load_tokenizer(tokenizer, f"tokenizer={tokenizer!r}")
        model = load_model(model_config, config)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.path=", "pretrained=").removeprefix("model.")) from None
    if adapter is not None:
        model = _with_adapter(model, adapter, merge_adapter and not load_in_4bit)
    if not load_in_4bit:  # those are put in place as they are loaded
        model = model.to(device)
    recipe = _recipe_beside(folders)
    return Pretrained(
        name=adapter or pretrained,
        model=model.eval().requires_grad_(False),
        tokenizer=loaded,
        memory=MemoryConfig(**recipe.get("memory", {})),
        right_shift_logits=recipe.get("training", {}).get("right_shift_logits", False),
    )


def _is_adapter(name: str) -> bool:
    folder = Path(name)
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _base_of(adapter: str) -> str:
    base = json.loads((Path(adapter) / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not base:
        raise ConfigError(
            f"pretrained={adapter!r}: an adapter that does not name its base; give pretrained=BASE,adapter={adapter}"
        )
    return base


def _with_adapter(model: nn.Module, adapter: str, merge: bool) -> nn.Module:
    try:
        model = peft.PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # not there; not an adapter; for another model
        raise ConfigError(f"adapter={adapter!r}: {' '.join(str(error).split())[:300]}") from error
    return model.merge_and_unload() if merge else model


def _recipe_beside(folders: list[str]) -> dict[str, Any]:
    """The first recipe.yaml in the folders, as plain values."""
    for folder in folders:
        path = Path(folder) / FILE_NAME
        if path.is_file():
            return yaml.safe_load(path.read_text(encoding="utf-8"))
    return {}
