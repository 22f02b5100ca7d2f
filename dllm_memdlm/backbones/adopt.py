"""Models that dllm built, made ours where they are: the same modules, but for experts, in containers with our forward.

dllm's classes for LLaDA-MoE, LLaDA2.1 and the converted decoders hold their weights in modules of the same names as
ours. Only experts become new tensors, a layer after the other; what is saved has the names that it had. The model
itself, which its user holds, changes class.
"""

from __future__ import annotations

from collections.abc import Callable

import peft
from torch import nn

from ..config import ConfigError
from .decoder import DECODERS, bidirectional
from .llada2_moe import (
    LLaDA2MoeAttention,
    LLaDA2MoeDecoderLayer,
    LLaDA2MoeGate,
    LLaDA2MoeModelLM,
    LLaDA2MoeSparseMoeBlock,
)
from .llada_moe import LLaDAMoEAttention, LLaDAMoEDecoderLayer, LLaDAMoEModelLM, LLaDAMoESparseMoeBlock
from .moe import RoutedExperts
from .output import OutputLinear
from .staged import StagedForward, unwrapped
from .stock_peft import StockLoraConfig, StockPeftModel


def adopt(model: nn.Module) -> None:
    """Make a model of dllm's one of ours, in place; any other model is left alone.

    It may be wrapped by PEFT already. Its logits are the same up to rounding. An optimizer made before does not know
    the experts' new tensors.

    Raises:
        ConfigError: experts that differ in kind, in whether they train or in their adapters, or under other adapters
            than a plain LoRA.
    """
    inner = unwrapped(model)
    name = type(inner).__name__
    if isinstance(inner, StagedForward) or not type(inner).__module__.startswith("dllm.") or name not in _OURS:
        return
    for layer in inner.model.layers:
        experts = getattr(layer.mlp, "experts", None)
        if experts is not None:  # before anything is changed
            try:
                RoutedExperts.check(experts)
            except ValueError as error:
                raise ConfigError(f"model of dllm's: {error}") from error
    inner.__class__ = _OURS[name](inner)
    OutputLinear.put_into(inner)
    if isinstance(model, peft.PeftModel):
        for adapter, config in model.peft_config.items():
            if type(config) is peft.LoraConfig:  # PEFT would note our class as that of the base
                model.peft_config[adapter] = StockLoraConfig.of(config)
        model.__class__ = StockPeftModel


def _as(cls: type[nn.Module], module: nn.Module) -> nn.Module:
    """A module of this class with the parts of another."""
    own = cls.__new__(cls)
    vars(own).update(vars(module))
    return own


def _llada_moe(model: nn.Module) -> type[nn.Module]:
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = layer = _as(LLaDAMoEDecoderLayer, layer)
        layer.shared_expert = getattr(layer, "shared_expert", None)
        layer.self_attn = _as(LLaDAMoEAttention, layer.self_attn)
        if type(layer.mlp).__name__ == "LLaDAMoESparseMoeBlock":
            layer.mlp = _as(LLaDAMoESparseMoeBlock, layer.mlp)
            layer.mlp.config = model.config
            layer.mlp.experts = RoutedExperts.of(layer.mlp.experts)
    return LLaDAMoEModelLM


def _llada2_moe(model: nn.Module) -> type[nn.Module]:
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = layer = _as(LLaDA2MoeDecoderLayer, layer)
        layer.attention = _as(LLaDA2MoeAttention, layer.attention)
        if type(layer.mlp).__name__ == "LLaDA2MoeSparseMoeBlock":
            layer.mlp = _as(LLaDA2MoeSparseMoeBlock, layer.mlp)
            layer.mlp.gate = _as(LLaDA2MoeGate, layer.mlp.gate)
            layer.mlp.shared_experts = getattr(layer.mlp, "shared_experts", None)
            layer.mlp.experts = RoutedExperts.of(layer.mlp.experts)
    return LLaDA2MoeModelLM


def _decoder(model: nn.Module) -> type[nn.Module]:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return bidirectional(type(model).__name__)


#: What makes the parts of a model ours, and returns our class of it.
_OURS: dict[str, Callable[[nn.Module], type[nn.Module]]] = {
    "LLaDAMoEModelLM": _llada_moe,
    "LLaDA2MoeModelLM": _llada2_moe,
    **{name: _decoder for name in DECODERS if name.startswith("A2D")},
}
