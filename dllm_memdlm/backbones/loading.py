"""From a name, a folder or dimensions to a model: config.json read by its architecture, no remote code."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.utils import find_adapter_config_file

from ..config import ConfigError, LoraConfig, ModelConfig
from ..versions import MODERNBERT, config_values
from .adapters import with_lora
from .decoder import DECODERS, bidirectional
from .dream import DreamModel
from .llada import LLaDAModelLM
from .llada2_moe import LLaDA2MoeModelLM
from .llada_moe import LLaDAMoEModelLM
from .modernbert import ModernBertForMaskedLM
from .staged import StagedForward, unwrapped

#: How a config or a model refuses a value: transformers 5 checks some in dataclasses of the hub's library.
REFUSED = (StrictDataclassError, ArithmeticError, AssertionError, AttributeError, KeyError, TypeError, ValueError)

#: Bundled definitions, by the architecture that a checkpoint's config.json names.
BUNDLED: dict[str, type[PreTrainedModel]] = {
    "LLaDAMoEModelLM": LLaDAMoEModelLM,
    "LLaDAMoEModel": LLaDAMoEModelLM,
    "LLaDA2MoeModelLM": LLaDA2MoeModelLM,
    "DreamModel": DreamModel,
    "LLaDAModelLM": LLaDAModelLM,
    "ModernBertForMaskedLM": ModernBertForMaskedLM,
}


def model_class(architecture: str | None, where: str = "model.architecture") -> type[PreTrainedModel]:
    """Return the class for an architecture name. Raises ConfigError: `where`, and the known names."""
    if architecture in BUNDLED:
        return BUNDLED[architecture]
    if architecture in DECODERS:
        return bidirectional(architecture)
    known = ", ".join([*BUNDLED, *DECODERS])
    raise ConfigError(f"{where}={architecture!r}: no backbone for it; known: {known}")


def read_config(path: str, architecture: str | None = None, where: str | None = None) -> PretrainedConfig:
    """config.json of a hub name or a local folder, as the class that its `architectures` entry asks for.

    `model_type` and `auto_map` are not looked at: the published LLaDA checkpoints carry a `model_type` that other
    libraries use for other models. `architecture` stands in where config.json names none; the config then names it.

    Raises:
        ConfigError: there is no such folder, hub name or network; or the architecture is not known. The message
            begins with `where`, which is model.path by default.
    """
    named = "model.architecture" if where is None else f"{where}: architecture"
    setting = "model.architecture" if where is None else "model.architecture in a recipe"
    where = where or f"model.path={path!r}"
    values: Any = {}
    if not os.path.isfile(path):
        with _refusing(where, {OSError: _missing(path), TypeError: _missing(path)}):  # or not JSON, not a mapping
            values, _ = PretrainedConfig.get_config_dict(path)
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{where}: {_missing(path)}")
    names = values.get("architectures") or [architecture]
    if not isinstance(names, list):
        raise ConfigError(f"{where}: its config.json has architectures={names!r}; expected a list")
    if names[0] is None:
        raise ConfigError(f"{where}: its config.json names no architecture; expected one, or {setting}")
    cls = model_class(names[0], named)
    values = {name: value for name, value in values.items() if name not in ("auto_map", "model_type")}
    with _refusing(where, dict.fromkeys(REFUSED, f"a config.json that makes no {cls.__name__} ({{}})")):
        return cls.config_class.from_dict(config_values({**values, "architectures": names[:1]}, cls.config_class))


def _missing(path: str) -> str:
    if os.path.isdir(path):
        return "a folder without a readable config.json"
    if os.path.isfile(path):
        return "a file; expected the folder of a model"
    if os.path.isabs(path) or path.startswith((".", "~")):
        return "no such folder"
    return "no such folder, and no local copy or network to get it from the hub"


def config_of(model: ModelConfig, vocab_size: int | None = None) -> PretrainedConfig:
    """The config of a model to train: read from `path`, or built from `architecture` and `dimensions`."""
    if model.path is not None:
        config = read_config(model.path, model.architecture)
        if quantised := getattr(config, "quantization_config", None):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
            raise ConfigError(
                f"model.path={model.path!r}: its weights are quantised already ({method}); expected float weights, "
                "which model.load_in_4bit can pack"
            )
        return config
    cls = model_class(model.architecture)
    dimensions = dict(model.dimensions)
    if vocab_size is not None:
        dimensions.setdefault("vocab_size", vocab_size)
    return build_config(cls.config_class, dimensions)


def build_config(cls: type[PretrainedConfig], dimensions: dict[str, Any]) -> PretrainedConfig:
    """A config from dimensions; a name that it does not know is refused (transformers would keep it silently)."""
    defaults = cls().to_dict()
    known = {*defaults, *cls.attribute_map}
    known |= {"rope_theta", "rope_scaling", "rope_parameters", "layer_types", *MODERNBERT}  # of either release
    for name in dimensions:
        if name not in known:
            raise ConfigError(f"model.dimensions.{name}: not a field of {cls.__name__}")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for name in (*sizes, *(cls.attribute_map.get(name, name) for name in sizes)):
        size = dimensions.get(name, 1)
        if type(size) is not int or size < 1:
            raise ConfigError(f"model.dimensions.{name}={size!r}: expected a whole number, at least 1")
    ids = {name: value for name, value in defaults.items() if name.endswith("_token_id") and isinstance(value, int)}
    of_others = {name: None for name, value in ids.items() if value >= dimensions.get("vocab_size", value + 1)}
    with _refusing("model.dimensions", dict.fromkeys(REFUSED, f"they make no {cls.__name__} ({{}})")):
        return cls(**config_values({**of_others, **dimensions}, cls))


def load_model(
    model: ModelConfig,
    config: PretrainedConfig,
    lora: LoraConfig | None = None,
    seed: int = 0,
    where: str | None = None,
) -> nn.Module:
    """The backbone, with its outer LoRA if enabled: weights from `model.path`, or drawn from `seed`.

    Raises:
        ConfigError: the weights cannot be had, or do not fit the config. The message begins with `where`, which is
            model.path by default.
    """
    cls = model_class((config.architectures or [model.architecture])[0])
    dtype = getattr(torch, model.for_training(lora or LoraConfig(enabled=False)).dtype)
    settings = {"config": config, "dtype": dtype, "attn_implementation": model.attn_implementation}
    if model.path is None:
        backbone = _drawn(cls, model, settings, seed)
    else:
        backbone = _read(cls, model, settings, where or f"model.path={model.path!r}")
    return with_lora(backbone, lora) if lora is not None and lora.enabled else backbone


def _drawn(cls: type[PreTrainedModel], model: ModelConfig, settings: dict[str, Any], seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), _whole():
        torch.manual_seed(seed)
        no_kernel = _refusing(f"model.attn_implementation={model.attn_implementation!r}", {ImportError: "{}"})
        reasons = dict.fromkeys((*REFUSED, RuntimeError), f"they make no {cls.__name__} ({{}})")
        with no_kernel, _refusing("model.dimensions", reasons):
            return cls._from_config(**settings)  # not `.to(dtype)`, which would round the rotary frequencies too


def _read(cls: type[PreTrainedModel], model: ModelConfig, settings: dict[str, Any], where: str) -> PreTrainedModel:
    if find_adapter_config_file(model.path) is not None:  # transformers would put it on its base, unasked
        raise ConfigError(
            f"{where}: holds an adapter (adapter_config.json); expected weights alone, and the adapter by its own name"
        )
    reasons = {ImportError: "{}", OSError: "no weights ({})", SafetensorError: "no weights ({})"}  # a kernel is missing
    reasons |= {RuntimeError: "weights of another shape ({})"}
    with _refusing(where, reasons | dict.fromkeys(REFUSED, f"a config.json that makes no {cls.__name__} ({{}})")):
        packing = _nf4(settings["dtype"]) if model.load_in_4bit else None
        more = {"use_safetensors": True, "quantization_config": packing, "output_loading_info": True}
        backbone, report = cls.from_pretrained(model.path, **settings, **more)
    if model.load_in_4bit:
        keep_4bit_weights_as_packed(backbone)
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(f"{where}: {len(missing)} weights are missing, {missing[0]} the first")
    return backbone


@contextmanager
def _refusing(where: str, reasons: dict[type[Exception], str]) -> Iterator[None]:
    """Make a ConfigError of exceptions of these kinds: where, and the reason, `{}` in it being the first line."""
    try:
        yield
    except tuple(reasons) as error:
        reason = next(text for kind, text in reasons.items() if isinstance(error, kind))
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        raise ConfigError(f"{where}: {reason.format(first)}") from error


@contextmanager
def _whole() -> Iterator[None]:
    """Build a model whole under ZeRO-3 too: drawn in parts its weights would be others than in one process."""
    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if held is not None and held() is not None:
            deepspeed.set_hf_deepspeed_config(held())


def staged_backbone(model: nn.Module) -> StagedForward:
    """The language model inside PEFT's wrapper. Raises TypeError for a model without a staged forward."""
    inner = unwrapped(model)
    if not isinstance(inner, StagedForward):
        known = ", ".join([*BUNDLED, *DECODERS])
        raise TypeError(
            f"no backbone adapter for {type(inner).__name__}; load the model with dllm_memdlm.backbones.load_model "
            f"(architectures: {known})"
        )
    return inner


def keep_4bit_weights_as_packed(backbone: PreTrainedModel) -> None:
    """Forward passes without gradient would repack them on CPUs with AVX512-BF16, and later gradients be zero."""
    from bitsandbytes.nn import Linear4bit

    for module in backbone.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4"
    )


def weights_digest(folder: str) -> str | None:
    """What tells the weights of a folder from others, wherever it lies: of an adapter its own; none for a hub name.

    The files' sizes and 64 pieces of each are looked at, as those of a large model take minutes to read.
    """
    files = sorted(Path(folder).glob("adapter_model*.safetensors")) or sorted(Path(folder).glob("model*.safetensors"))
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name} {size}".encode())
            for piece in range(64):
                file.seek(size * piece // 64)
                digest.update(file.read(4096))
    return digest.hexdigest() if files else None
