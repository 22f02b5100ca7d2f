"""PEFT adapters on a backbone: a new LoRA, one to go on training from, one to decode with; and how they are saved."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import ConfigError, LoraConfig
from .decoder import DECODERS
from .experts import ExpertLinear, ExpertLora, is_stacked, split_name, split_names, stack_names

WEIGHTS = "adapter_model.safetensors"

#: Where others find the models that ours stand in for, by the name of the class.
STOCK_MODULES = {
    **dict.fromkeys(DECODERS.values(), "transformers"),
    "LLaDAMoEModelLM": "dllm.pipelines.llada.models.modeling_lladamoe",
    "LLaDA2MoeModelLM": "dllm.pipelines.llada21.models.modeling_llada21_moe",
}


class StockLoraConfig(peft.LoraConfig):
    """A LoRA config that is saved without a trace of this package.

    PEFT notes the class of the base model beside the adapter, for `AutoPeftModel` to import. That is noted as
    transformers' or dllm's class of the same name and weights, since a user of the adapter need not have ours.
    """

    def on(self, backbone: nn.Module) -> StockLoraConfig:
        """Put the LoRA of routed experts into tensors, wherever the targets mean them.

        Raises:
            ValueError: the targets mean some experts of a layer and not others.
        """
        self._register_custom_module({ExpertLinear: ExpertLora})
        self._as_saved = {name: getattr(self, name) for name in ("target_modules", "exclude_modules")}
        for name, targets in self._as_saved.items():
            setattr(self, name, _on_stacked(backbone, targets))
        return self

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's."""
        mapping = kwargs.get("auto_mapping_dict")
        if mapping is not None and mapping["base_model_class"] in STOCK_MODULES:
            module = STOCK_MODULES[mapping["base_model_class"]]
            kwargs["auto_mapping_dict"] = {**mapping, "parent_library": module}
        saved = copy.copy(self)
        vars(saved).update(getattr(self, "_as_saved", {}))
        super(StockLoraConfig, saved).save_pretrained(save_directory, **kwargs)


class StockPeftModel(peft.PeftModel):
    """PEFT's wrapper. In files it has two matrices an expert, as a stock adapter; PEFT itself knows of none of them."""

    def save_pretrained(
        self, save_directory: str, *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """As PEFT's method."""
        state = self.state_dict() if state_dict is None else state_dict
        experts = {name: value for name, value in state.items() if "lora_" in name and is_stacked(name)}
        rest = {name: value for name, value in state.items() if name not in experts}
        super().save_pretrained(save_directory, state_dict=rest, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        for adapter in kwargs.get("selected_adapters") or self.peft_config:
            own = {n.replace(f".{adapter}.", "."): v for n, v in experts.items() if f".{adapter}." in n}
            if own:
                path = Path(save_directory, "" if adapter == "default" else adapter, WEIGHTS)
                save_file(load_file(path) | split_names(own), path, {"format": "pt"})

    def load_adapter(self, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's method."""
        with warnings.catch_warnings():  # PEFT's, of missing keys: those of the experts
            warnings.simplefilter("ignore", UserWarning)
            result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        where = {name: kwargs[name] for name in ("subfolder", "revision", "cache_dir", "token") if name in kwargs}
        saved = peft.load_peft_weights(model_id, device="cpu", **where)
        experts = {n: v for n, v in stack_names(saved).items() if n not in saved}
        own = {re.sub(r"\.(lora_[AB])\.", rf".\1.{adapter_name}.", name): value for name, value in experts.items()}
        self.load_state_dict(own, strict=False)
        for keys in (result.missing_keys, result.unexpected_keys):
            keys[:] = [name for name in keys if name not in own and name not in experts]
        return result


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """What is to be saved of a model: all of it, or its adapter, whose name is left out."""
    state = model.state_dict()
    if isinstance(model, peft.PeftModel):
        return peft.get_peft_model_state_dict(model, state, save_embedding_layers=False)
    return state


def with_lora(backbone: PreTrainedModel, lora: LoraConfig) -> nn.Module:
    """Wrap in PEFT's LoRA, as dllm does: a new one, or that of `lora.path`. Only the adapters train afterwards.

    Raises:
        ConfigError: the targets match nothing; or the adapter of `lora.path` cannot be read, was made for another
            model, or with other settings.
    """
    if getattr(backbone, "is_loaded_in_4bit", False):
        backbone = peft.prepare_model_for_kbit_training(backbone, use_gradient_checkpointing=False)
    if lora.path is not None and backbone.device.type != "meta":  # where there are only shapes, those are the same
        return _go_on_from(backbone, lora)
    targets = _all_linear(backbone) if lora.target_modules == "all-linear" else lora.target_modules
    targets = targets if isinstance(targets, str) else list(targets)
    config = StockLoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, bias=lora.bias, target_modules=targets
    )
    try:
        model = peft.get_peft_model(backbone, config.on(backbone))
    except ValueError as error:
        raise ConfigError(f"lora.target_modules={lora.target_modules!r}: {_one_line(error)}") from error
    model.__class__ = StockPeftModel
    return model


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
    return _loaded(backbone, folder, _read_config(folder, where), where)


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


def _go_on_from(backbone: PreTrainedModel, lora: LoraConfig) -> peft.PeftModel:
    where = f"lora.path={lora.path!r}"
    folder = adapter_folder(lora.path)
    config = _read_config(folder, where)
    if config.peft_type != peft.PeftType.LORA:
        raise ConfigError(f"{where}: an adapter of type {config.peft_type.value}, expected LORA")
    for name, own, made in (
        ("r", lora.r, config.r),
        ("alpha", lora.alpha, config.lora_alpha),
        ("bias", lora.bias, config.bias),
    ):
        if own != made:
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


def _read_config(folder: str, where: str) -> peft.PeftConfig:
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
    if type(config) is peft.LoraConfig:
        config.__class__ = StockLoraConfig
    return config


def _loaded(
    backbone: PreTrainedModel, folder: str, config: peft.PeftConfig, where: str, trainable: bool = False
) -> peft.PeftModel:
    """The adapter on the model, every tensor of it in its place, or a ConfigError."""
    try:
        if isinstance(config, StockLoraConfig):
            config.on(backbone)
        with warnings.catch_warnings():  # PEFT's, of missing keys, which are an error here
            warnings.simplefilter("ignore", UserWarning)
            model = StockPeftModel.from_pretrained(backbone, folder, config=config, is_trainable=trainable)
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
            saved = set(file.keys())
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(f"{where}: no adapter for this model ({_one_line(error)})") from error
    own = split_names(own_state(model))
    odd = {name for name in own.keys() ^ saved if "lora_" in name}
    odd |= saved - own.keys() - model.state_dict().keys()  # embeddings may come along whole
    if odd:
        first = min(odd)
        holder = "the adapter" if first in saved else "the model"
        raise ConfigError(f"{where}: made for another model; {first} is in {holder} only")
    return model


def _own_names(backbone: PreTrainedModel, target_modules: str | tuple[str, ...]) -> set[str]:
    """The last names of the linear layers that LoRA is meant for."""
    if target_modules == "all-linear":
        return set(_all_linear(backbone))
    if isinstance(target_modules, str):  # a pattern of whole paths, for PEFT
        return {path.rpartition(".")[2] for path in _on_stacked(backbone, target_modules)}
    return {name.rpartition(".")[2] for name in target_modules}


def _on_stacked(backbone: nn.Module, targets: str | Iterable[str] | None) -> str | Iterable[str] | None:
    """PEFT's targets, which name a module an expert, on a model with tensors of all: the paths of what they mean.

    Names without dots mean the same on both, and are left as they are.
    """
    if targets is None or targets == "all-linear":
        return targets
    if isinstance(targets, str):
        means = re.compile(targets).fullmatch
    elif any("." in name for name in targets):
        means = re.compile(rf"(?:.*\.)?(?:{'|'.join(map(re.escape, targets))})").fullmatch
    else:
        return targets
    paths = []
    for path, module in backbone.named_modules():
        stock = split_name(path, module.experts) if isinstance(module, ExpertLinear) else [path]
        meant = {bool(means(name)) for name in stock if hasattr(module, "weight")}
        if len(meant) > 1:
            raise ValueError(f"{targets} means some experts of {path} and not others; expected all or none")
        paths += [path] if True in meant else []
    return paths


def _all_linear(backbone: PreTrainedModel) -> list[str]:
    """What PEFT means by all-linear, every linear layer but the output one, by own names.

    PEFT would compare the paths of thousands of expert layers pairwise to find the same names (minutes).
    """
    output = backbone.get_output_embeddings()
    paths = [
        path
        for path, module in backbone.named_modules()
        if isinstance(module, (nn.Linear, ExpertLinear)) and module is not output
    ]
    return sorted({path.rpartition(".")[2] for path in paths})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
