"""Models and adapters as transformers, dllm and PEFT save them, and the logits that two models are compared by."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from conftest import COMMON, DIMENSIONS, make_tokenizer, scale_up
from torch import Tensor, nn


def dllms(kind: str, config: dict[str, object]) -> nn.Module:
    """dllm's model of the same dimensions."""
    if kind == "llada_moe":
        from dllm.pipelines.llada.models.configuration_lladamoe import LLaDAMoEConfig
        from dllm.pipelines.llada.models.modeling_lladamoe import LLaDAMoEModelLM

        return LLaDAMoEModelLM(LLaDAMoEConfig(**config))
    if kind == "dream":
        from dllm.pipelines.dream.models import DreamConfig, DreamModel

        return DreamModel(DreamConfig(**config))
    if kind == "llada":
        return dllms_llada(config)
    if kind == "modernbert":  # dllm trains transformers' own
        return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**config))
    from dllm.pipelines.llada21 import LLaDA2MoeConfig, LLaDA2MoeModelLM

    return LLaDA2MoeModelLM(LLaDA2MoeConfig(**config))


def dllms_llada(config: dict[str, object]) -> nn.Module:
    """dllm's LLaDA on the CPU: its class asks for a GPU, here and whenever it is loaded from now on."""
    from dllm.pipelines.llada.models import modeling_llada as theirs
    from dllm.pipelines.llada.models.configuration_llada import LLaDAConfig

    if theirs.LLaDAModel.__module__ == theirs.__name__:

        class OnCPU(theirs.LLaDAModel):
            def __init__(self, config: Any, init_params: bool = True) -> None:
                config.init_device = None
                super().__init__(config, init_params)

        theirs.LLaDAModel = OnCPU
    names = {"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
    names |= {"num_key_value_heads": "n_kv_heads"}
    return theirs.LLaDAModelLM(LLaDAConfig(**{names.get(name, name): value for name, value in config.items()}))


#: What the published configs say and our defaults do not, or the other way round.
AS_PUBLISHED = {
    "llada_moe": {
        **{"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False, "norm_topk_prob": None},
        **{"qk_layernorm": True, "num_key_value_heads": 4, "shared_expert_intermediate_size": None},
    },
    "llada2": {
        **{"rms_norm_eps": 1e-6, "use_bias": False, "num_shared_experts": 1, "first_k_dense_replace": 1},
        **{"embedding_dropout": 0.0, "output_dropout": 0.0},
    },
    "dream": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 2},
    "modernbert": {},
    "llada": {
        **{"block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True},
        **{"weight_tying": False, "embedding_size": None, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    },
}
DENSE_ATTRIBUTES = ("vocab_size", "hidden_size", "rope_theta", "partial_rotary_factor", "attention_dropout")


def tokens() -> Tensor:
    return torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens(), **arguments).logits


def bidirectional_logits(model: nn.Module) -> Tensor:
    """A stock decoder's, with a mask that hides nothing."""
    return logits(model, attention_mask=torch.zeros(2, 1, 9, 9))


def save_stock(folder: Path, model: nn.Module, tokenizer: Any = None) -> str:
    torch.manual_seed(0)
    scale_up(model)
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


def stock_decoder(name: str, vocab_size: int = 48, **settings: Any) -> nn.Module:
    config_class = getattr(transformers, name.replace("ForCausalLM", "Config"))
    head = {} if name.startswith("Qwen2") else {"head_dim": 8}
    dimensions = {**COMMON, **DIMENSIONS["llama"], **head, "vocab_size": vocab_size, **settings}
    return getattr(transformers, name)(config_class(**dimensions))


def save_peft(folder: Path, model: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """Save an adapter as PEFT makes it. Returns the model with it."""
    adapted = peft.get_peft_model(model, copy.deepcopy(config))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
                parameter.data += "magnitude" in name  # DoRA's, which divides by them
    adapted.save_pretrained(folder)
    return adapted


def config_of(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "adapter_config.json").read_text())


def edit(folder: str | Path, **changes: Any) -> None:
    (Path(folder) / "adapter_config.json").write_text(json.dumps({**config_of(folder), **changes}))


def stock_llama(base: str) -> nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(base)


def dllms_model(kind: str, **changes: Any) -> nn.Module:
    """dllm's own model, as small as ours."""
    shared = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5 if kind == "llada2" else 1, "attention_dropout": 0.0}
    return dllms(kind, {**COMMON, **DIMENSIONS[kind], **AS_PUBLISHED[kind], **shared, **changes})


def a2d_llama() -> nn.Module:
    """The model that dllm makes of a Llama."""
    from dllm.pipelines.a2d import A2DLlamaConfig, A2DLlamaLMHeadModel

    return A2DLlamaLMHeadModel(A2DLlamaConfig(**COMMON, **DIMENSIONS["llama"]))
