"""Models that dllm built, given our forward: the same modules, but for experts, and another class.

dllm's classes for LLaDA-MoE, LLaDA2.1 and the converted decoders hold their weights in modules of the same names as
ours. Changing the class of a few of them gives the model its stages. Only experts become new tensors, a layer after the
other; what is saved has the names that it had.
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
    """Give a model of dllm's our forward, in place; any other model is left alone.

    The model may be wrapped by PEFT already. Its logits are the same up to rounding. An optimizer made before does not
    know the experts' new tensors.

    Raises:
        ConfigError: experts that differ in kind, in whether they train or in their adapters, or under other adapters
            than a plain LoRA.
    """
    inner = unwrapped(model)
    name = type(inner).__name__
    if isinstance(inner, StagedForward) or not type(inner).__module__.startswith("dllm.") or name not in _ADOPTERS:
        return
    for layer in inner.model.layers:
        experts = getattr(layer.mlp, "experts", None)
        if experts is not None:  # before anything is changed
            try:
                RoutedExperts.check(experts)
            except ValueError as error:
                raise ConfigError(f"model of dllm's: {error}") from error
    _ADOPTERS[name](inner)
    OutputLinear.adopt(inner)
    if isinstance(model, peft.PeftModel):
        for config in model.peft_config.values():
            if type(config) is peft.LoraConfig:
                config.__class__ = StockLoraConfig  # PEFT would note our class as that of the base
        model.__class__ = StockPeftModel


def _llada_moe(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.__class__ = LLaDAMoEDecoderLayer
        layer.shared_expert = getattr(layer, "shared_expert", None)
        layer.self_attn.__class__ = LLaDAMoEAttention
        if type(layer.mlp).__name__ == "LLaDAMoESparseMoeBlock":
            layer.mlp.__class__ = LLaDAMoESparseMoeBlock
            layer.mlp.config = model.config
            layer.mlp.experts = RoutedExperts.of(layer.mlp.experts)
    model.__class__ = LLaDAMoEModelLM


def _llada2_moe(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.__class__ = LLaDA2MoeDecoderLayer
        layer.attention.__class__ = LLaDA2MoeAttention
        if type(layer.mlp).__name__ == "LLaDA2MoeSparseMoeBlock":
            layer.mlp.__class__ = LLaDA2MoeSparseMoeBlock
            layer.mlp.gate.__class__ = LLaDA2MoeGate
            layer.mlp.shared_experts = getattr(layer.mlp, "shared_experts", None)
            layer.mlp.experts = RoutedExperts.of(layer.mlp.experts)
    model.__class__ = LLaDA2MoeModelLM


def _decoder(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.__class__ = bidirectional(type(model).__name__)


_ADOPTERS: dict[str, Callable[[nn.Module], None]] = {
    "LLaDAMoEModelLM": _llada_moe,
    "LLaDA2MoeModelLM": _llada2_moe,
    **{name: _decoder for name in DECODERS if name.startswith("A2D")},
}
