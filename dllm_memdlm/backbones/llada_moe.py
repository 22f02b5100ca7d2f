"""LLaDA-MoE (inclusionAI/LLaDA-MoE-7B-A1B): parameter names as published, attention bidirectional."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from ..versions import tied_weights
from .layers import GatedMLP, RMSNorm, attend, lowered, parts, rotary_embedding, take
from .moe import SparseModel, routed_experts
from .output import OutputLinear
from .staged import StagedForward


class LLaDAMoEConfig(PretrainedConfig):
    """Dimensions; the defaults are those of LLaDA-MoE-7B-A1B. `moe_layer_freq[i]` is 0 where layer i is dense."""

    rope_scaling: dict[str, Any] | None = None  # no property, which transformers 5 has
    model_type = "lladamoe"

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        dense_intermediate_size: int = 8192,
        expert_intermediate_size: int = 1024,
        shared_expert_intermediate_size: int | None = None,
        num_experts: int = 64,
        num_experts_per_tok: int = 8,
        moe_layer_freq: list[int] | None = None,
        moe_router_enable_expert_bias: bool = False,
        qk_layernorm: bool = True,
        clip_qkv: float | None = None,
        hidden_act: str = "silu",
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 50000.0,
        rope_scaling: dict[str, Any] | None = None,
        partial_rotary_factor: float = 1.0,
        max_position_embeddings: int = 8192,
        initializer_range: float = 0.02,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.dense_intermediate_size = dense_intermediate_size
        self.expert_intermediate_size = expert_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_layer_freq = moe_layer_freq or [1] * num_hidden_layers
        self.moe_router_enable_expert_bias = moe_router_enable_expert_bias
        self.qk_layernorm = qk_layernorm
        self.clip_qkv = clip_qkv
        self.hidden_act = hidden_act
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        if rope_scaling is not None:  # otherwise not in config.json, where transformers 5 would remark on it
            self.rope_scaling = rope_scaling
        self.partial_rotary_factor = partial_rotary_factor
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)


class LLaDAMoEAttention(nn.Module):
    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = parts(config, "hidden_size", "num_attention_heads")
        self.num_key_value_groups = parts(config, "num_attention_heads", "num_key_value_heads")
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        if config.qk_layernorm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        queries: Tensor | None,
        cache: Any,
    ) -> Tensor:
        asked = x if queries is None else take(x, queries)
        query, key, value = (
            projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projected in (self.q_proj(asked), self.k_proj(x), self.v_proj(x))
        )
        if self.config.qk_layernorm:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.config.clip_qkv is not None:
            limit = self.config.clip_qkv
            query, key, value = (part.clamp(-limit, limit) for part in (query, key, value))
        return self.o_proj(attend(self, query, key, value, position_embeddings, attention_mask, queries, cache))


class LLaDAMoESparseMoeBlock(nn.Module):
    """Softmax router over all experts; the top k keep their probabilities as weights, not renormalised."""

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = routed_experts(config, config.expert_intermediate_size)
        if config.moe_router_enable_expert_bias:
            self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.gate(x).softmax(dim=-1, dtype=torch.float32)
        if self.config.moe_router_enable_expert_bias:
            probabilities = probabilities + self.expert_bias
        weights, chosen = probabilities.topk(self.config.num_experts_per_tok, dim=-1)
        return self.experts(x, chosen, weights.to(x.dtype))


class LLaDAMoEDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LLaDAMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LLaDAMoEAttention(config)
        sparse = config.moe_layer_freq[layer_idx] != 0
        if sparse:
            self.mlp = LLaDAMoESparseMoeBlock(config)
        else:
            self.mlp = GatedMLP(config.hidden_size, config.dense_intermediate_size, config.hidden_act)
        self.shared_expert = None
        if sparse and config.shared_expert_intermediate_size is not None:
            self.shared_expert = GatedMLP(config.hidden_size, config.shared_expert_intermediate_size, config.hidden_act)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        normed = lowered(self.input_layernorm(hidden))
        attended = self.self_attn(normed, position_embeddings, attention_mask, queries, cache)
        hidden = attended + (hidden if queries is None else take(hidden, queries))
        normed = lowered(self.post_attention_layernorm(hidden))
        output = self.mlp(normed)
        if self.shared_expert is not None:
            output = output + self.shared_expert(normed)
        return hidden + output


class LLaDAMoEPreTrainedModel(SparseModel):
    config_class = LLaDAMoEConfig
    _no_split_modules = ["LLaDAMoEDecoderLayer"]


class LLaDAMoEModel(LLaDAMoEPreTrainedModel):
    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDAMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = rotary_embedding(config)
        self.post_init()


class LLaDAMoEModelLM(StagedForward, LLaDAMoEPreTrainedModel):
    """LLaDA-MoE with its language-model head. See `StagedForward.forward`."""

    layers_take_queries = True
    _tied_weights_keys = tied_weights({"lm_head.weight": "model.embed_tokens.weight"})

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__(config)
        self.model = LLaDAMoEModel(config)
        self.lm_head = OutputLinear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
