"""The models that are timed: the published architectures at an eighth of the width, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dllm_memdlm.backbones import LLaDA2MoeConfig, LLaDAMoEConfig, model_class
from dllm_memdlm.backbones.expert_names import split_names

#: Where a tokenizer is asked for, only these are.
TOKENIZER = SimpleNamespace(eos_token_id=0, bos_token_id=1, mask_token_id=2, padding_side="right")

#: LLaDA2.1-mini and LLaDA-MoE with hidden 256 for 2,048 and every other width divided likewise. Layers, heads, top-k
#: and groups are the published ones; LLaDA2.1 has 64 experts for 256.
FULL: dict[str, dict[str, Any]] = {
    "LLaDA2.1": {
        "num_hidden_layers": 20,
        "hidden_size": 256,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 640,
        "moe_intermediate_size": 64,
        "num_experts": 64,
        "vocab_size": 8192,
    },
    "LLaDA-MoE": {
        "num_hidden_layers": 16,
        "hidden_size": 256,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "dense_intermediate_size": 1024,
        "expert_intermediate_size": 128,
        "num_experts": 64,
        "vocab_size": 8192,
    },
}
#: Two layers of each, to try the benchmark itself.
QUICK: dict[str, dict[str, Any]] = {
    "LLaDA2.1": {**FULL["LLaDA2.1"], "num_hidden_layers": 2, "hidden_size": 64, "num_experts": 16, "vocab_size": 256},
    "LLaDA-MoE": {**FULL["LLaDA-MoE"], "num_hidden_layers": 2, "hidden_size": 64, "num_experts": 8, "vocab_size": 256},
}
_CLASSES = {"LLaDA2.1": ("LLaDA2MoeModelLM", LLaDA2MoeConfig), "LLaDA-MoE": ("LLaDAMoEModelLM", LLaDAMoEConfig)}


def build(name: str, dimensions: dict[str, Any], sharpness: float = 1.0) -> nn.Module:
    """A model in float32 with random weights, always the same ones.

    Every layer keeps the size of what it gets, the mask's embedding is small, so that a masked position predicts by
    where it looks, and queries are large, so that it looks at few positions: otherwise all of them would predict the
    same token. `sharpness` scales the logits, and with them how sure the model is of its tokens.
    """
    architecture, config_class = _CLASSES[name]
    config = config_class(pad_token_id=TOKENIZER.eos_token_id, **dimensions)
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(architecture)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
            for key, parameter in model.named_parameters():
                if key.endswith(("q_norm.weight", "query_layernorm.weight")):
                    parameter *= 4
            embeddings = model.get_input_embeddings().weight
            embeddings *= embeddings.shape[1] ** 0.5
            embeddings[TOKENIZER.mask_token_id] *= 0.1
            model.lm_head.weight *= sharpness
            model.lm_head.weight[TOKENIZER.mask_token_id] = 0
    return model.requires_grad_(False)


def prompt(length: int, vocabulary: int, seed: int = 1) -> Tensor:
    """Random tokens [length], none of them special."""
    return torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


def dllms(name: str, model: nn.Module) -> nn.Module:
    """dllm's model of the same weights. Raises ImportError without dllm."""
    if name == "LLaDA2.1":
        from dllm.pipelines.llada21 import LLaDA2MoeConfig as TheirConfig
        from dllm.pipelines.llada21 import LLaDA2MoeModelLM as TheirModel

        more = {"embedding_dropout": 0.0, "output_dropout": 0.0}
    else:
        from dllm.pipelines.llada.models.configuration_lladamoe import LLaDAMoEConfig as TheirConfig
        from dllm.pipelines.llada.models.modeling_lladamoe import LLaDAMoEModelLM as TheirModel

        more = {"use_cache": False}
    values = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "architectures")}
    config = TheirConfig(**{**values, **more})
    config._attn_implementation = "sdpa"
    theirs = TheirModel(config).eval()
    theirs.load_state_dict(split_names(model.state_dict()))
    return theirs.requires_grad_(False)


def dllms_sampler(model: nn.Module) -> Callable[..., Tensor]:
    """dllm's sampler for LLaDA2.1 on dllm's model of the same weights. Raises ImportError without dllm.

    It passes a mask in bfloat16, which torch's fused attention refuses beside float32; it is converted here, rather
    than leave dllm the slower eager attention.
    """
    from dllm.pipelines.llada21.sampler import LLaDA21Sampler

    theirs = dllms("LLaDA2.1", model)

    def in_float32(_: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return arguments, {**keywords, "attention_mask": keywords["attention_mask"].float()}

    theirs.register_forward_pre_hook(in_float32, with_kwargs=True)
    return LLaDA21Sampler(theirs, TOKENIZER).sample
