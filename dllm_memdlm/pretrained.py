"""A trained model as it was saved: a full checkpoint, or an adapter on its base, with tokenizer and memory settings."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import yaml
from safetensors import SafetensorError
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
    if merge_adapter and load_in_4bit:
        raise ConfigError("merge_adapter=True: expected false with load_in_4bit; packed weights take no sum")
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
        raise ConfigError(_named(str(error), pretrained)) from None
    if adapter is not None:
        model = _with_adapter(model, adapter, merge_adapter)
    if not load_in_4bit:  # those are put in place as they are loaded
        model = model.to(device)
    memory, right_shift_logits = _settings_beside(folders)
    name = adapter or pretrained
    return Pretrained(
        name=os.path.realpath(name) if os.path.isdir(name) else name,
        model=model.eval().requires_grad_(False),
        tokenizer=loaded,
        memory=memory,
        right_shift_logits=right_shift_logits,
    )


def _is_adapter(name: str) -> bool:
    folder = Path(name)
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _base_of(adapter: str) -> str:
    try:
        base = json.loads((Path(adapter) / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:  # not JSON, or not a mapping
        raise ConfigError(f"pretrained={adapter!r}: no readable adapter_config.json ({_one_line(error)})") from None
    if not base:
        raise ConfigError(
            f"pretrained={adapter!r}: an adapter that does not name its base; give pretrained=BASE,adapter={adapter}"
        )
    return base


def _with_adapter(model: nn.Module, adapter: str, merge: bool) -> nn.Module:
    try:
        with warnings.catch_warnings():  # PEFT's, of missing keys, which are an error here
            warnings.simplefilter("ignore", UserWarning)
            model = peft.PeftModel.from_pretrained(model, adapter)
        saved = peft.load_peft_weights(adapter, device="cpu")
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(f"adapter={adapter!r}: no adapter for this model ({_one_line(error)})") from error
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    odd = sorted(name for name in own.keys() ^ saved.keys() if "lora_" in name)
    if odd:
        where = "the adapter" if odd[0] in saved else "the model"
        raise ConfigError(f"adapter={adapter!r}: made for another model; {odd[0]} is in {where} only")
    return model.merge_and_unload() if merge else model


def _settings_beside(folders: list[str]) -> tuple[MemoryConfig, bool]:
    """The memory and whether logits are shifted, of the first recipe.yaml in the folders."""
    path = next((path for folder in folders if (path := Path(folder) / FILE_NAME).is_file()), None)
    if path is None:
        return MemoryConfig(), False
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        memory, training = ({**(recipe.get(section) or {})} for section in ("memory", "training"))
        return MemoryConfig(**memory), bool(training.get("right_shift_logits", False))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a recipe of this version ({_one_line(error)})") from None


def _named(message: str, pretrained: str) -> str:
    """A message about a recipe's key, in terms of the arguments here."""
    if message.startswith("model.architecture="):
        return f"pretrained={pretrained!r}: {message.removeprefix('model.')}"
    message = message.replace("set model.tokenizer to it", "give tokenizer=FOLDER")
    return message.replace("model.path=", "pretrained=").removeprefix("model.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
