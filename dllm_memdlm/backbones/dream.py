"""Dream-7B, DiffuCoder and Dream-Coder: by its weights a Qwen2, bidirectional, with logits of the next position."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from .decoder import bidirectional


class DreamConfig(Qwen2Config):
    """Qwen2's fields; the defaults are those of Dream-7B."""

    model_type = "Dream"

    def __init__(
        self,
        vocab_size: int = 152064,
        hidden_size: int = 3584,
        intermediate_size: int = 18944,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = 4,
        max_position_embeddings: int = 131072,
        rope_theta: float = 1000000.0,
        mask_token_id: int = 151666,
        **kwargs: Any,
    ) -> None:
        named = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        super().__init__(**named, **kwargs)


class DreamModel(bidirectional("Qwen2ForCausalLM")):  # type: ignore[misc]
    """Dream's model under the name that its files give. See `StagedForward.forward`."""

    config_class = DreamConfig
    right_shift_logits = True


def dream_layer(theirs: Any, config: PretrainedConfig) -> Qwen2DecoderLayer:
    """Return one of transformers' layers with the modules of dllm's, adapters included; `config` is that of its model.

    dllm's hands over tuples, and its attention knows neither the kernels of transformers nor our cache.
    """
    with torch.device("meta"):  # of its own it keeps nothing that has weights
        ours = Qwen2DecoderLayer(DreamConfig.from_dict(config.to_dict()), theirs.self_attn.layer_idx)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(ours.self_attn, name, getattr(theirs.self_attn, name))
    for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
        setattr(ours, name, getattr(theirs, name))
    ours.self_attn.config, ours.self_attn.is_causal = config, False
    return ours.train(theirs.training)
