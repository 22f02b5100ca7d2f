"""LLaDA2.1 (inclusionAI/LLaDA2.1-mini): parameter names as published, attention as the mask says."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from ..versions import tied_weights
from .layers import GatedMLP, RMSNorm, attend, lowered, parts, rotary_embedding, take
from .moe import SparseModel, routed_experts
from .output import OutputLinear
from .staged import StagedForward


class LLaDA2MoeConfig(PretrainedConfig):
    """Dimensions; the defaults are those of LLaDA2.1-mini. The first `first_k_dense_replace` layers are dense."""

    rope_scaling: dict[str, Any] | None = None  # no property, which transformers 5 has
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
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.num_shared_experts = num_shared_experts
        self.moe_intermediate_size = moe_intermediate_size
        self.n_group = n_group
        self.topk_group = topk_group
        self.routed_scaling_factor = routed_scaling_factor
        self.first_k_dense_replace = first_k_dense_replace
        self.use_qk_norm = use_qk_norm
        self.use_qkv_bias = use_qkv_bias
        self.use_bias = use_bias
        self.hidden_act = hidden_act
        self.attention_dropout = attention_dropout
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        if rope_scaling is not None:  # otherwise not in config.json, where transformers 5 would remark on it
            self.rope_scaling = rope_scaling
        self.partial_rotary_factor = partial_rotary_factor
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)


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

    def forward(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        queries: Tensor | None,
        cache: Any,
    ) -> Tensor:
        config = self.config
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        sizes = [number * self.head_dim for number in heads]
        query, key, value = self.query_key_value(x).split(sizes, dim=-1)
        if queries is not None:
            query = take(query, queries)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (query, key, value))
        if config.use_qk_norm:
            query, key = self.query_layernorm(query), self.key_layernorm(key)
        return self.dense(attend(self, query, key, value, position_embeddings, attention_mask, queries, cache))


class LLaDA2MoeGate(nn.Module):
    """Sigmoid router: a bias steers the choice (the best groups first), the unbiased scores are the weights."""

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
        self.shared_experts = None
        if config.num_shared_experts:
            width = config.moe_intermediate_size * config.num_shared_experts
            self.shared_experts = GatedMLP(config.hidden_size, width, config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        routes, x = self.gate(x), lowered(x)  # the router computes in float32
        output = self.experts(x, *routes)
        return output if self.shared_experts is None else output + self.shared_experts(x)


class LLaDA2MoeDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = LLaDA2MoeAttention(config)
        if config.num_experts is not None and layer_idx >= config.first_k_dense_replace:
            self.mlp = LLaDA2MoeSparseMoeBlock(config)
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
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
        attended = self.attention(normed, position_embeddings, attention_mask, queries, cache)
        hidden = attended + (hidden if queries is None else take(hidden, queries))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class LLaDA2MoePreTrainedModel(SparseModel):
    config_class = LLaDA2MoeConfig
    _no_split_modules = ["LLaDA2MoeDecoderLayer"]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LLaDA2MoeGate):
            module.reset_parameters()


class LLaDA2MoeModel(LLaDA2MoePreTrainedModel):
    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDA2MoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = rotary_embedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value


class LLaDA2MoeModelLM(StagedForward, LLaDA2MoePreTrainedModel):
    """LLaDA2.1 with its language-model head. See `StagedForward.forward`."""

    layers_take_queries = True
    _tied_weights_keys = tied_weights({"lm_head.weight": "model.word_embeddings.weight"})

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = OutputLinear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
