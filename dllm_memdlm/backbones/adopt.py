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
from .decoder import DECODERS
from .dream import dream_layer
from .layers import remade, rotary_embedding
from .llada import LLaDABlock, LLaDAConfig, LLaDADecoder
from .llada2_moe import LLaDA2MoeAttention, LLaDA2MoeDecoderLayer, LLaDA2MoeGate, LLaDA2MoeSparseMoeBlock
from .llada_moe import LLaDAMoEAttention, LLaDAMoEDecoderLayer, LLaDAMoESparseMoeBlock
from .loading import model_class
from .modernbert import take_layers
from .moe import stack_experts
from .output import OutputLinear
from .staged import StagedForward, unwrapped
from .stock_peft import StockLoraConfig, StockPeftModel

#: Parts of sparse models, by the name that they have in either library.
_PARTS = {
    cls.__name__: cls
    for cls in (
        *(LLaDAMoEAttention, LLaDAMoEDecoderLayer, LLaDAMoESparseMoeBlock),
        *(LLaDA2MoeAttention, LLaDA2MoeDecoderLayer, LLaDA2MoeGate, LLaDA2MoeSparseMoeBlock),
    )
}


def adopt(model: nn.Module) -> None:
    """Make a model of dllm's one of ours, in place; any other model is left alone.

    It may be wrapped by PEFT already. Its logits are the same up to rounding. An optimizer made before does not know
    the experts' new tensors.

    Raises:
        ConfigError: experts that differ in kind, in whether they train or in their adapters, or under other adapters
            than a plain LoRA; or a LLaDA or ModernBERT that computes what ours does not. Nothing is changed then.
    """
    inner: Any = unwrapped(model)
    name, home = type(inner).__name__, type(inner).__module__
    # Of ModernBERT dllm trains transformers' own
    of_dllm = name in _TAKE and home.startswith(("dllm.", "transformers.models.modernbert."))
    if not of_dllm or isinstance(inner, StagedForward):
        return
    try:
        _TAKE[name](inner)
    except ValueError as error:
        whose = " of dllm's" if home.startswith("dllm.") else ""
        raise ConfigError(f"model{whose}: {error}") from error
    inner.__class__ = model_class(name)
    OutputLinear.put_into(inner)
    if isinstance(model, peft.PeftModel):
        for adapter, config in model.peft_config.items():
            if type(config) is peft.LoraConfig:  # PEFT would note our class as that of the base
                model.peft_config[adapter] = StockLoraConfig.of(config)
        model.__class__ = StockPeftModel


def _take_sparse(model: Any) -> None:
    stack_experts(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kinds = (cls.__name__ for cls in type(child).__mro__)  # dllm derives its attention by sdpa from the other
            own = next((_PARTS[kind] for kind in kinds if kind in _PARTS), None)
            if own is not None:
                setattr(parent, name, remade(own, child))


def _take_llada(model: Any) -> None:
    config = LLaDAConfig.from_dict(model.config.to_dict())
    config.name_or_path, config._attn_implementation = model.config.name_or_path, "sdpa"  # which dllm's layers call
    model.config = config
    model.model = remade(LLaDADecoder, model.model, rotary_emb=rotary_embedding(config).to(model.device))
    blocks = model.model.transformer["blocks"]
    for index, block in enumerate(blocks):
        blocks[index] = remade(LLaDABlock, block, config=config)


def _take_decoder(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


def _take_dream(model: Any) -> None:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = dream_layer(layer, model.config)


def _take_modernbert(model: Any) -> None:
    take_layers(model)
    if model.config._attn_implementation != "eager":  # transformers 4 chooses another wherever it is installed
        model.config._attn_implementation = "sdpa"


#: How the parts of a model become ours, which raises ValueError before it changes any; by the name of the model.
_TAKE = {
    "LLaDAMoEModelLM": _take_sparse,
    "LLaDA2MoeModelLM": _take_sparse,
    "LLaDAModelLM": _take_llada,
    "DreamModel": _take_dream,
    "ModernBertForMaskedLM": _take_modernbert,
    **dict.fromkeys((name for name in DECODERS if name.startswith("A2D")), _take_decoder),
}
