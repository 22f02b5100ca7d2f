"""PEFT's LoRA and its wrapper on models whose experts are tensors; in files all is as stock PEFT has it."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import load, save_file
from torch import Tensor, nn

from .decoder import DECODERS
from .expert_names import is_stacked, split_name, split_names, stack_names
from .experts import ExpertLinear, outermost, without_adapters
from .lora import ExpertLora, custom_module

WEIGHTS = "adapter_model.safetensors"

#: Where others find the models that ours stand in for, by the name of the class.
STOCK_MODULES = {
    **dict.fromkeys(DECODERS.values(), "transformers"),
    "LLaDAModelLM": "dllm.pipelines.llada.models.modeling_llada",
    "LLaDAMoEModelLM": "dllm.pipelines.llada.models.modeling_lladamoe",
    "LLaDA2MoeModelLM": "dllm.pipelines.llada21.models.modeling_llada21_moe",
    "DreamModel": "dllm.pipelines.dream.models.modeling_dream",
    "ModernBertForMaskedLM": "transformers.models.modernbert.modeling_modernbert",
}


class StockLoraConfig(peft.LoraConfig):
    """A LoRA config that is saved without a trace of this package.

    PEFT notes the class of the base model beside the adapter, for `AutoPeftModel` to import. That is noted as
    transformers' or dllm's class of the same name and weights, since a user of the adapter need not have ours.
    """

    @classmethod
    def of(cls, config: peft.LoraConfig) -> StockLoraConfig:
        """One with the settings of PEFT's own."""
        own = cls()
        own.__dict__.update(vars(config))
        return own

    def on(self, backbone: nn.Module) -> StockLoraConfig:
        """Have our own layers: the LoRA of routed experts is tensors, wherever the targets mean them.

        Raises:
            ValueError: the targets, or the patterns of ranks, mean some experts of a layer and not others.
        """
        self._register_custom_module({ExpertLinear: ExpertLora, nn.Linear: custom_module})
        ways: dict[str, Any] = dict.fromkeys(("target_modules", "exclude_modules"), on_stacked)
        ways |= dict.fromkeys(("rank_pattern", "alpha_pattern"), _patterns_on_stacked)
        self._as_saved = {name: getattr(self, name) for name in ways}
        for name, way in ways.items():
            setattr(self, name, way(backbone, getattr(self, name)))
        return self

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's."""
        mapping = kwargs.get("auto_mapping_dict")
        if mapping is not None and mapping["base_model_class"] in STOCK_MODULES:
            module = STOCK_MODULES[mapping["base_model_class"]]
            kwargs["auto_mapping_dict"] = {**mapping, "parent_library": module}
        saved = copy.copy(self)
        saved.__dict__.update(getattr(self, "_as_saved", {}))
        super(StockLoraConfig, saved).save_pretrained(save_directory, **kwargs)


class StockPeftModel(peft.PeftModel):
    """PEFT's wrapper. In files it has two matrices an expert, as a stock adapter; PEFT itself knows of none of them."""

    def add_adapter(self, adapter_name: str, peft_config: peft.PeftConfig, *args: Any, **kwargs: Any) -> None:
        """As PEFT's method."""
        if type(peft_config) is peft.LoraConfig:
            peft_config = StockLoraConfig.of(peft_config).on(self.get_base_model())
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    def save_pretrained(self, save_directory: str, safe_serialization: bool = True, **kwargs: Any) -> None:
        """As PEFT's method. Raises ValueError for anything but safetensors."""
        if not safe_serialization:
            raise ValueError("safe_serialization=False: expected true; weights are saved as nothing else")
        # PEFT writes all but the experts' LoRA. At full size that LoRA is gigabytes, which are so written once.
        state = kwargs.pop("state_dict", None)
        state = self.state_dict() if state is None else state
        experts = {name: value for name, value in state.items() if "lora_" in name and is_stacked(name)}
        rest = {name: value for name, value in state.items() if name not in experts}
        super().save_pretrained(save_directory, state_dict=rest, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        for adapter in kwargs.get("selected_adapters") or self.peft_config:
            of_it = re.compile(rf"\.(lora_[AB])\.{re.escape(adapter)}\.(?=weight$)")
            own = {of_it.sub(r".\1.", name): value for name, value in experts.items() if of_it.search(name)}
            if own:
                path = Path(save_directory, "" if adapter == "default" else adapter, WEIGHTS)
                save_file(load(path.read_bytes()) | split_names(own), path, {"format": "pt"})

    def load_adapter(self, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's method."""
        with warnings.catch_warnings():  # PEFT's, of missing keys: those of the experts
            warnings.simplefilter("ignore", UserWarning)
            result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        where = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "key_mapping")
        saved = peft.load_peft_weights(model_id, device="cpu", **{k: kwargs[k] for k in where if k in kwargs})
        experts = {n: v for n, v in stack_names(saved).items() if n not in saved}
        own = {re.sub(r"\.(lora_[AB])\.", rf".\1.{adapter_name}.", name): value for name, value in experts.items()}
        found = self.load_state_dict(own, strict=False, assign=bool(kwargs.get("low_cpu_mem_usage")))
        result.missing_keys[:] = [name for name in result.missing_keys if name not in own]
        result.unexpected_keys[:] = [n for n in result.unexpected_keys if n not in experts] + found.unexpected_keys
        return result


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """What is to be saved of a model: all of it, or its adapter, whose name is left out."""
    state = model.state_dict()
    if isinstance(model, peft.PeftModel):
        return peft.get_peft_model_state_dict(model, state, save_embedding_layers=False)
    return state


def on_stacked(backbone: nn.Module, targets: str | Iterable[str] | None) -> str | Iterable[str] | None:
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
    for path, names in _layers(backbone):
        meant = {bool(means(name)) for name in names}
        if len(meant) > 1:
            raise ValueError(f"{targets} means some experts of {path} and not others; expected all or none")
        paths += [path] if True in meant else []
    return paths


def _patterns_on_stacked(backbone: nn.Module, patterns: dict[Any, int]) -> dict[str, int]:
    """PEFT's ranks, or alphas, by patterns of paths; those of the experts' layers by the paths that these have here.

    Of several patterns that fit a layer the first one counts.
    """
    own, of_others = {}, set()
    for path, names in _layers(backbone) if patterns else ():
        keys = {next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None) for name in names}
        if len({patterns.get(key) for key in keys}) > 1:
            raise ValueError(f"{patterns} differs between experts of {path}; expected one value for all")
        if names == [path]:
            of_others |= keys
        elif keys != {None}:
            own[re.escape(path)] = patterns[keys.pop()]
    return own | {key: value for key, value in patterns.items() if key in of_others}


def _layers(backbone: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Layers with weights of their own, by path; and what files call them, which is a name an expert."""
    for path, module in outermost(backbone):
        layer = without_adapters(module)
        if hasattr(layer, "weight"):
            yield path, split_name(path, layer.experts) if isinstance(layer, ExpertLinear) else [path]
