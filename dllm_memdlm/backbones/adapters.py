"""PEFT adapters on a backbone: a new LoRA, one to go on training from, one to decode with; and how they are saved."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from ..config import ConfigError, LoraConfig
from .expert_names import split_names
from .experts import ExpertLinear
from .lora import ExpertLora
from .stock_peft import WEIGHTS, StockLoraConfig, StockPeftModel, on_stacked, own_state


def with_lora(backbone: PreTrainedModel, lora: LoraConfig) -> nn.Module:
    """Wrap in PEFT's LoRA, as dllm does: a new one, or that of `lora.path`. Only the adapters train afterwards.

    Raises:
        ConfigError: the targets match nothing; or the adapter of `lora.path` cannot be read, was made for another
            model, or with other settings.
    """
    if getattr(backbone, "is_loaded_in_4bit", False):
        backbone = peft.prepare_model_for_kbit_training(backbone, use_gradient_checkpointing=False)
    if lora.path is not None and backbone.device.type != "meta":  # where there are only shapes, those are the same
        return _go_on_from(backbone, lora, lora.path)
    targets: Collection[str] = lora.target_modules
    left_out = None
    if targets == "all-linear":
        targets = _own_names(backbone, lora.target_modules)
    if not isinstance(targets, str):
        paths = {path: module for path, module in backbone.named_modules() if path}
        output = next(path for path, module in paths.items() if module is backbone.get_output_embeddings())
        name = output.rpartition(".")[2]
        if name in targets and sum(path.endswith(f".{name}") for path in paths) > 1:  # LLaDA's blocks have such a layer
            left_out = [output]
        targets = sorted(targets)
    config = StockLoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, bias=lora.bias, target_modules=targets
    )
    config.exclude_modules = left_out
    config.base_model_name_or_path = backbone.name_or_path or None
    try:
        return StockPeftModel(backbone, config.on(backbone))
    except ValueError as error:
        raise ConfigError(f"lora.target_modules={lora.target_modules!r}: {_one_line(error)}") from error


def load_adapter(backbone: PreTrainedModel, name: str) -> peft.PeftModel:
    """Put a saved adapter on a model, to decode with.

    Args:
        backbone: the model it was made for.
        name: folder, or hub name.

    Raises:
        ConfigError: it cannot be read, or was made for another model. The message begins with `adapter=`.
    """
    where = f"adapter={name!r}"
    folder = adapter_folder(name)
    return _loaded(backbone, folder, read_adapter_config(folder, where), where)


def narrow(model: peft.PeftModel) -> None:
    """Round the experts' LoRA, which PEFT loads in float32, to what it computes in without autocast."""
    for module in model.modules():
        if isinstance(module, ExpertLora):
            module.lora_A.to(model.dtype)
            module.lora_B.to(model.dtype)


def merge(model: peft.PeftModel) -> nn.Module:
    """Add the adapter to the weights, in place, a layer at a time. The sums are taken in float32 and rounded once.

    Input and output embeddings that share a weight come apart where the adapter is on one of them.
    """
    backbone = model.get_base_model()
    ends = backbone.get_input_embeddings(), backbone.get_output_embeddings()
    if backbone.config.tie_word_embeddings and any(isinstance(e, (BaseTunerLayer, ModulesToSaveWrapper)) for e in ends):
        head = ends[1].get_base_layer() if isinstance(ends[1], BaseTunerLayer) else ends[1]
        if not isinstance(head, ModulesToSaveWrapper):  # which has a weight of its own already
            head.weight = nn.Parameter(head.weight.detach().clone())
        backbone.config.tie_word_embeddings = False
    return model.merge_and_unload()


def adapter_folder(name: str) -> str:
    """Where the files of an adapter are: the folder of this name, or the local copy of what the hub has.

    The name itself where there is neither.
    """
    if os.path.exists(name):
        return name
    try:  # without the checkpoints that a run's folder has inside
        files = ["*.json", "*.jinja", "*.model", "*.txt", "*.yaml", WEIGHTS]
        return huggingface_hub.snapshot_download(name, allow_patterns=files, ignore_patterns="*/*")
    except (OSError, ValueError):
        return name


def _go_on_from(backbone: PreTrainedModel, lora: LoraConfig, path: str) -> peft.PeftModel:
    where = f"lora.path={path!r}"
    folder = adapter_folder(path)
    config = read_adapter_config(folder, where)
    if config.peft_type != peft.PeftType.LORA:
        raise ConfigError(f"{where}: an adapter of type {config.peft_type.value}, expected LORA")
    for name, made in (("r", config.r), ("alpha", config.lora_alpha), ("bias", config.bias)):
        if (own := getattr(lora, name)) != made:
            raise ConfigError(f"lora.{name}={own!r}: the adapter of lora.path was made with {made!r}; set it to that")
    wanted = _own_names(backbone, lora.target_modules)
    config.lora_dropout = lora.dropout
    config.base_model_name_or_path, config.revision = backbone.name_or_path, None  # not the path of who made it
    model = _loaded(backbone, folder, config, where, trainable=True)
    made = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    if made != wanted:
        raise ConfigError(
            f"lora.target_modules={lora.target_modules!r}: the adapter of lora.path is on {', '.join(sorted(made))}; "
            "set it to these"
        )
    return model


def read_adapter_config(folder: str, where: str) -> peft.PeftConfig:
    """The settings of an adapter of weights. Raises ConfigError, which begins with `where`, for any other."""
    try:
        with warnings.catch_warnings():  # PEFT's, of settings that a later release has
            warnings.simplefilter("ignore", UserWarning)
            config = peft.PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # not there, not JSON, not a config
        raise ConfigError(f"{where}: no readable adapter_config.json ({_one_line(error)})") from error
    kind = None if config.peft_type is None else config.peft_type.value
    if kind is None or config.is_prompt_learning or config.is_adaption_prompt:
        raise ConfigError(f"{where}: an adapter of type {kind}, expected one of weights, such as LORA")
    if not (Path(folder) / WEIGHTS).is_file():
        raise ConfigError(f"{where}: no {WEIGHTS}")
    # With a task PEFT would put a forward of its own, with arguments of its own, around that of the model.
    config.task_type = None
    return StockLoraConfig.of(config) if type(config) is peft.LoraConfig else config


def _loaded(
    backbone: PreTrainedModel, folder: str, config: peft.PeftConfig, where: str, trainable: bool = False
) -> peft.PeftModel:
    """The adapter on the model, every tensor of it in its place, or a ConfigError."""
    try:
        if isinstance(config, StockLoraConfig):
            config.on(backbone)
        config.inference_mode = not trainable
        with warnings.catch_warnings():  # PEFT's, of missing keys, which are an error below
            warnings.simplefilter("ignore", UserWarning)
            model = StockPeftModel(backbone, config)
            found = model.load_adapter(folder, "default", is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(f"{where}: no adapter for this model ({_one_line(error)})") from error
    missing = [name for name in found.missing_keys if "lora_" in name]
    if found.unexpected_keys or missing:
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
            saved = set(file.keys())
        own = split_names(own_state(model)).keys()
        odd = {name for name in own ^ saved if "lora_" in name} | (saved - own - model.state_dict().keys())
        first = min(odd or {*found.unexpected_keys, *missing})
        holder = "adapter" if first in saved else "model"
        raise ConfigError(f"{where}: made for another model; {first} is in the {holder} only")
    return model


def _own_names(backbone: PreTrainedModel, target_modules: str | tuple[str, ...]) -> set[str]:
    """The last names of the layers that LoRA is meant for; all-linear is every linear one but the output, as in PEFT.

    Those of experts, too.
    """
    paths: Any = target_modules
    if target_modules == "all-linear":
        output, linear = backbone.get_output_embeddings(), (nn.Linear, ExpertLinear)
        paths = [path for path, m in backbone.named_modules() if isinstance(m, linear) and m is not output]
    elif isinstance(target_modules, str):  # a pattern of whole paths, for PEFT
        paths = on_stacked(backbone, target_modules)
    return {path.rpartition(".")[2] for path in paths}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
