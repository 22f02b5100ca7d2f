"""LLaDA-MoE (inclusionAI/LLaDA-MoE-7B-A1B): parameter names as published, attention bidirectional."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..versions import tied_weights
from .layers import BundledConfig, GatedMLP, RMSNorm, attend, in_heads, lowered, parts, take
from .moe import routed_experts
from .sparse import SparseLayer, SparseModel


class LLaDAMoEConfig(BundledConfig):
    """Dimensions; the defaults are those of LLaDA-MoE-7B-A1B. `moe_layer_freq[i]` is 0 where layer i is dense."""

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
        num_key_value_heads = num_key_value_heads or num_attention_heads
        moe_layer_freq = moe_layer_freq or [1] * num_hidden_layers
        super().__init__(locals(), **kwargs)


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

    def forward(self, x: Tensor, queries: Tensor | None, *context: Any) -> Tensor:
        """As `attend`. x [B, L, D] → [B, M, D]."""
        asked = x if queries is None else take(x, queries)
        query, key, value = in_heads(self, self.q_proj(asked), self.k_proj(x), self.v_proj(x))
        if self.config.qk_layernorm:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.config.clip_qkv is not None:
            limit = self.config.clip_qkv
            query, key, value = (part.clamp(-limit, limit) for part in (query, key, value))
        return self.o_proj(attend(self, query, key, value, queries, *context))


class LLaDAMoESparseMoeBlock(nn.Module):
    """Softmax router over all experts; the top k keep their probabilities as weights, not renormalised."""

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = routed_experts(config, config.expert_intermediate_size)
        bias = torch.zeros(config.num_experts) if config.moe_router_enable_expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        x = lowered(x)
        probabilities = self.gate(x).softmax(dim=-1, dtype=torch.float32)
        if self.expert_bias is not None:
            probabilities = probabilities + self.expert_bias
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        return self.experts(x, chosen, weights.to(x.dtype))


class LLaDAMoEDecoderLayer(SparseLayer):
    attention_name = "self_attn"

    def __init__(self, config: LLaDAMoEConfig, layer_idx: int) -> None:
        attention, width = LLaDAMoEAttention(config), config.shared_expert_intermediate_size
        if config.moe_layer_freq[layer_idx]:
            parts: dict[str, nn.Module] = {"mlp": LLaDAMoESparseMoeBlock(config)}
            if width is not None:
                parts["shared_expert"] = GatedMLP(config.hidden_size, width, config.hidden_act)
        else:
            parts = {"mlp": GatedMLP(config.hidden_size, config.dense_intermediate_size, config.hidden_act)}
        super().__init__(config, self_attn=attention, **parts)

    def feed_forward(self, x: Tensor) -> Tensor:
        x = lowered(x)
        output = self.mlp(x)
        return output + self.shared_expert(x) if hasattr(self, "shared_expert") else output


class LLaDAMoEModelLM(SparseModel):
    """LLaDA-MoE with its language-model head. See `StagedForward.forward`."""

    config_class = LLaDAMoEConfig
    layer_class = LLaDAMoEDecoderLayer
    embeddings_name = "embed_tokens"
    _no_split_modules = ["LLaDAMoEDecoderLayer"]
    _tied_weights_keys = tied_weights({"lm_head.weight": "model.embed_tokens.weight"})
