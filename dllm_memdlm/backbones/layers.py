"""What the bundled backbones share: attention over chosen queries, rotary positions, the gated MLP."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half


def parts(config: Any, whole: str, number: str) -> int:
    """The size of each of so many equal parts of a dimension. Raises ValueError where that leaves a rest."""
    size, count = getattr(config, whole), getattr(config, number)
    if count < 1 or size < count or size % count:
        raise ValueError(f"{whole} {size} is no multiple of {number} {count}")
    return size // count


def take(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of each sample. x [B, L, D], positions [B, M] → [B, M, D]."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def additive_mask(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask to add to attention scores: 0 to see, the lowest number of `dtype` not to. [B, L] becomes [B, 1, 1, L]."""
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None, :].bool()
    if attention_mask.dtype == torch.bool:
        hidden = torch.finfo(dtype).min
        return torch.zeros_like(attention_mask, dtype=dtype).masked_fill_(~attention_mask, hidden)
    return attention_mask.to(dtype)


def rotary_embedding(config: Any) -> nn.Module:
    """Cosine and sine of every position, for the first `partial_rotary_factor` of each head's features.

    The module is GLM's, the one of transformers that turns a part of them; it reads a config as transformers' own are.
    """
    names = ("rope_theta", "rope_scaling", "partial_rotary_factor", "max_position_embeddings")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    settings = {name: copy.deepcopy(getattr(config, name)) for name in names}  # transformers 5 writes into them
    heads = {"num_attention_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
    return GlmRotaryEmbedding(LlamaConfig(head_dim=head_dim, **heads, **settings))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on the first cos.shape[-1] features. x [B, H, L, d], cos and sin [1 or B, L, d']."""
    cos, sin = cos[:, None], sin[:, None]
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([turned * cos + rotate_half(turned) * sin, kept], dim=-1)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    queries: Tensor | None,
    cache: Any = None,
) -> Tensor:
    """Bidirectional attention. query [B, H, M, d], key and value [B, H_kv, L, d] → [B, M, H·d].

    `queries` [B, M] names those of the L tokens whose output is wanted; none means all, in order. With a layer's part
    of a `CanvasCache` the L keys are stored there, and all visible ones are attended to.
    """
    cos, sin = position_embeddings
    key = rotate(key, cos, sin)
    if cache is not None:
        key, value = cache.update(key, value)
    if queries is not None:
        batch = len(queries)
        cos, sin = (take(part.expand(batch, -1, -1), queries) for part in (cos, sin))
        if attention_mask is not None and attention_mask.shape[-2] > 1:
            rows = queries[:, None, :, None].expand(-1, attention_mask.shape[1], -1, attention_mask.shape[-1])
            attention_mask = attention_mask.expand(batch, -1, -1, -1).gather(2, rows)
    query = rotate(query, cos, sin)
    implementation = module.config._attn_implementation
    attention = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    output, _ = attention(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=module.config.attention_dropout if module.training else 0.0,
        scaling=module.head_dim**-0.5,
        is_causal=False,
    )
    return output.flatten(2)


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
