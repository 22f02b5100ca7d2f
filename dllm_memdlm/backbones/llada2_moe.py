"""LLaDA2.1 (inclusionAI/LLaDA2.1-mini): parameter names as published, attention as the mask says."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..versions import tied_weights
from .layers import BundledConfig, GatedMLP, RMSNorm, attend, in_heads, lowered, parts, take
from .moe import routed_experts
from .sparse import SparseLayer, SparseModel


class LLaDA2MoeConfig(BundledConfig):
    """Dimensions; the defaults are those of LLaDA2.1-mini. The first `first_k_dense_replace` layers are dense."""

    model_type = "llada21_moe"

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        intermediate_size: int = 5120,
        num_hidden_layers: int = 20,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 4,
        head_dim: int | None = None,
        num_experts: int | None = 256,
        num_experts_per_tok: int = 8,
        num_shared_experts: int | None = 1,
        moe_intermediate_size: int = 512,
        n_group: int = 8,
        topk_group: int = 4,
        routed_scaling_factor: float = 2.5,
        first_k_dense_replace: int = 1,
        use_qk_norm: bool = True,
        use_qkv_bias: bool = False,
        use_bias: bool = False,
        hidden_act: str = "silu",
        attention_dropout: float = 0.0,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 600000.0,
        rope_scaling: dict[str, Any] | None = None,
        partial_rotary_factor: float = 0.5,
        max_position_embeddings: int = 32768,
        initializer_range: float = 0.02,
        pad_token_id: int | None = 156892,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        num_key_value_heads = num_key_value_heads or num_attention_heads
        head_dim = head_dim or hidden_size // num_attention_heads
        super().__init__(locals(), **kwargs)


class LLaDA2MoeAttention(nn.Module):
    """Grouped-query attention with one fused projection for queries, keys and values."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.num_key_value_groups = parts(config, "num_attention_heads", "num_key_value_heads")
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.query_key_value = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.use_qkv_bias)
        self.dense = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=config.use_bias)
        if config.use_qk_norm:
            self.query_layernorm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.key_layernorm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, queries: Tensor | None, *context: Any) -> Tensor:
        """As `attend`. x [B, L, D] → [B, M, D]."""
        config = self.config
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        sizes = [number * self.head_dim for number in heads]
        query, key, value = self.query_key_value(x).split(sizes, dim=-1)
        if queries is not None:
            query = take(query, queries)
        query, key, value = in_heads(self, query, key, value)
        if config.use_qk_norm:
            query, key = self.query_layernorm(query), self.key_layernorm(key)
        return self.dense(attend(self, query, key, value, queries, *context))


class LLaDA2MoeGate(nn.Module):
    """Sigmoid router: a bias steers the choice (the best groups first), the unbiased scores are the weights."""

    expert_bias: Tensor

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.config = config
        parts(config, "num_experts", "n_group")
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, L, D] → chosen experts [B, L, k] int64 and their weights [B, L, k] float32."""
        config = self.config
        # A router in low precision sends tokens to other experts, so it stays float32 under autocast too.
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
        biased = (scores + self.expert_bias).unflatten(-1, (config.n_group, -1))
        best_groups = biased.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
        barred = torch.ones_like(biased[..., 0], dtype=torch.bool).scatter_(-1, best_groups, False)
        chosen = biased.masked_fill(barred[..., None], -torch.inf).flatten(-2)
        chosen = chosen.topk(config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if config.num_experts_per_tok > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * config.routed_scaling_factor


class LLaDA2MoeSparseMoeBlock(nn.Module):
    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.gate = LLaDA2MoeGate(config)
        self.experts = routed_experts(config, config.moe_intermediate_size)
        if config.num_shared_experts:
            width = config.moe_intermediate_size * config.num_shared_experts
            self.shared_experts = GatedMLP(config.hidden_size, width, config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        routes, x = self.gate(x), lowered(x)  # the router computes in float32
        output = self.experts(x, *routes)
        return output + self.shared_experts(x) if hasattr(self, "shared_experts") else output


class LLaDA2MoeDecoderLayer(SparseLayer):
    attention_name = "attention"

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int) -> None:
        attention = LLaDA2MoeAttention(config)
        if config.num_experts is not None and layer_idx >= config.first_k_dense_replace:
            mlp: nn.Module = LLaDA2MoeSparseMoeBlock(config)
        else:
            mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        super().__init__(config, attention=attention, mlp=mlp)


class LLaDA2MoeModelLM(SparseModel):
    """LLaDA2.1 with its language-model head. See `StagedForward.forward`."""

    config_class = LLaDA2MoeConfig
    layer_class = LLaDA2MoeDecoderLayer
    embeddings_name = "word_embeddings"
    _no_split_modules = ["LLaDA2MoeDecoderLayer"]
    _tied_weights_keys = tied_weights({"lm_head.weight": "model.word_embeddings.weight"})

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LLaDA2MoeGate):
            module.reset_parameters()
