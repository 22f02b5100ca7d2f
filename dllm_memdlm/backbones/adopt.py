"""Models that dllm built, made ours where they are: the same modules, but for experts, in containers with our forward.

Its classes for LLaDA, LLaDA-MoE, LLaDA2.1, Dream, ModernBERT and converted decoders hold their weights in modules of
the same names. Only experts become new tensors, a layer after the other; what is saved has the names that it
had. The model itself, which its user holds, changes class.
"""

from __future__ import annotations

from typing import Any

import peft
from torch import nn

from ..config import ConfigError
from .decoder import DECODERS, bidirectional
from .dream import DreamModel, dream_layer
from .layers import remade, rotary_embedding
from .llada import LLaDABlock, LLaDAConfig, LLaDADecoder, LLaDAModelLM
from .llada2_moe import (
    LLaDA2MoeAttention,
    LLaDA2MoeDecoderLayer,
    LLaDA2MoeGate,
    LLaDA2MoeModelLM,
    LLaDA2MoeSparseMoeBlock,
)
from .llada_moe import LLaDAMoEAttention, LLaDAMoEDecoderLayer, LLaDAMoEModelLM, LLaDAMoESparseMoeBlock
from .modernbert import ModernBertForMaskedLM, take_layers
from .moe import stack_experts
from .output import OutputLinear
from .staged import StagedForward, unwrapped
from .stock_peft import StockLoraConfig, StockPeftModel

#: Our classes by the name of dllm's model: of the model, of a layer, of its attention and of its sparse block.
_SPARSE = {
    "LLaDAMoEModelLM": (LLaDAMoEModelLM, LLaDAMoEDecoderLayer, LLaDAMoEAttention, LLaDAMoESparseMoeBlock),
    "LLaDA2MoeModelLM": (LLaDA2MoeModelLM, LLaDA2MoeDecoderLayer, LLaDA2MoeAttention, LLaDA2MoeSparseMoeBlock),
}


#: Where the classes are: of ModernBERT dllm trains transformers' own.
_HOMES = ("dllm.", "transformers.models.modernbert.")


def adopt(model: nn.Module) -> None:
    """Make a model of dllm's one of ours, in place; any other model is left alone.

    It may be wrapped by PEFT already. Its logits are the same up to rounding. An optimizer made before does not know
    the experts' new tensors.

    Raises:
        ConfigError: experts that differ in kind, in whether they train or in their adapters, or under other adapters
            than a plain LoRA; or a LLaDA or ModernBERT that computes what ours does not.
    """
    inner: Any = unwrapped(model)
    name = type(inner).__name__
    if isinstance(inner, StagedForward) or not type(inner).__module__.startswith(_HOMES):
        return
    if name in _SPARSE:
        cls, *of_layers = _SPARSE[name]
        try:
            stack_experts(inner)  # or nothing is changed
        except ValueError as error:
            raise ConfigError(f"model of dllm's: {error}") from error
        for index, layer in enumerate(inner.model.layers):
            inner.model.layers[index] = _our_layer(layer, *of_layers)
    elif name == "LLaDAModelLM":
        cls = LLaDAModelLM
        _make_llada(inner)
    elif name.startswith("A2D") and name in DECODERS:
        cls = bidirectional(name)
        for layer in inner.model.layers:
            layer.self_attn.is_causal = False
    elif name == "DreamModel":
        cls = DreamModel
        for index, layer in enumerate(inner.model.layers):
            inner.model.layers[index] = dream_layer(layer, inner.config)
    elif name == "ModernBertForMaskedLM":
        cls = ModernBertForMaskedLM
        _make_modernbert(inner)
    else:
        return
    inner.__class__ = cls
    OutputLinear.put_into(inner)
    if isinstance(model, peft.PeftModel):
        for adapter, config in model.peft_config.items():
            if type(config) is peft.LoraConfig:  # PEFT would note our class as that of the base
                model.peft_config[adapter] = StockLoraConfig.of(config)
        model.__class__ = StockPeftModel


def _make_llada(model: Any) -> None:
    """Give a LLaDA our config, decoder and layers. Raises ConfigError, with nothing changed, for what ours is not."""
    try:
        config = LLaDAConfig.from_dict(model.config.to_dict())
    except ValueError as error:
        raise ConfigError(f"model of dllm's: {error}") from error
    config.name_or_path, config._attn_implementation = model.config.name_or_path, "sdpa"  # which dllm's layers call
    model.config = config
    rotary_emb = rotary_embedding(config).to(model.device)
    model.model = remade(LLaDADecoder, model.model, rotary_emb=rotary_emb)
    blocks = model.model.transformer["blocks"]
    for index, block in enumerate(blocks):
        blocks[index] = remade(LLaDABlock, block, config=config)


def _make_modernbert(model: Any) -> None:
    """Give a ModernBERT our layers. Raises ConfigError, with nothing changed, for what ours is not."""
    try:
        take_layers(model)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    if model.config._attn_implementation != "eager":  # transformers 4 chooses another wherever it is installed
        model.config._attn_implementation = "sdpa"


def _our_layer(layer: Any, layer_class: Any, attention_class: type, block_class: type) -> nn.Module:
    name, block = layer_class.attention_name, layer.mlp
    if hasattr(block, "experts"):
        block = remade(block_class, block, shared_experts=getattr(block, "shared_experts", None))
        if block_class is LLaDA2MoeSparseMoeBlock:
            block.gate = remade(LLaDA2MoeGate, block.gate)
    shared = getattr(layer, "shared_expert", None)
    attention = remade(attention_class, getattr(layer, name))
    return remade(layer_class, layer, shared_expert=shared, mlp=block, **{name: attention})
