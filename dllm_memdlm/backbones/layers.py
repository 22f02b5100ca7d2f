"""What the bundled backbones share: attention over chosen queries, rotary positions, the gated MLP."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import LlamaConfig, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.models.llama.modeling_llama import eager_attention_forward

_constant: ContextVar[bool] = ContextVar("weights_are_constant", default=False)


@contextmanager
def switched_on(flag: ContextVar[bool]) -> Iterator[None]:
    """Set a flag until the block ends."""
    token = flag.set(True)
    try:
        yield
    finally:
        flag.reset(token)


def frozen_weights() -> AbstractContextManager[None]:
    """The backward pass of what is computed within ends at the fast weights: see `constant`."""
    return switched_on(_constant)


def constant(weight: Tensor) -> Tensor:
    """A weight of an autograd function of ours, which computes its gradient only outside of `frozen_weights`."""
    return weight.detach() if _constant.get() else weight


class BundledConfig(PretrainedConfig):
    """A config of plain dimensions.

    Args:
        named: the dimensions; of the local variables of a subclass's `__init__`, those that it names.
        kwargs: what transformers' configs take.
    """

    rope_scaling: dict[str, Any] | None = None  # no property, which transformers 5 has

    def __init__(self, named: dict[str, Any], **kwargs: Any) -> None:
        for name, value in named.items():
            # Without a scaling it is not in config.json, where transformers 5 would remark on it.
            if name not in ("self", "kwargs", "__class__") and (name, value) != ("rope_scaling", None):
                setattr(self, name, value)
        given = {name: named[name] for name in ("eos_token_id", "pad_token_id", "tie_word_embeddings") if name in named}
        super().__init__(**given, **kwargs)


def remade(cls: type[nn.Module], module: Any, **parts: Any) -> nn.Module:
    """A module of this class with the parts of another, but for these."""
    own = cls.__new__(cls)
    vars(own).update(vars(module))
    for name, part in parts.items():
        setattr(own, name, part)
    return own


def parts(config: Any, whole: str, number: str) -> int:
    """The size of each of so many equal parts of a dimension. Raises ValueError where that leaves a rest."""
    size, count = getattr(config, whole), getattr(config, number)
    if count < 1 or size < count or size % count:
        raise ValueError(f"{whole} {size} is no multiple of {number} {count}")
    return size // count


def take(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of each sample. x [B, L, D], positions [B, M] → [B, M, D]."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def additive_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to attention scores: 0 to see, the lowest number of `dtype` not to. [B, L] becomes [B, 1, 1, L]."""
    if attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None, :].bool()
    if attention_mask.dtype == torch.bool:
        hidden = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)  # in which attention may be computed
        return torch.zeros_like(attention_mask, dtype=dtype).masked_fill_(~attention_mask, hidden)
    return attention_mask.to(dtype)


class BlockCausal:
    """Who sees whom where blocks of positions are causal and tokens within one are not, without a mask of all pairs.

    Some queries at a time attend to the keys that the last of them sees. Parts begin where a block does, so that who
    sees whom, counted from a part's first query, is the same in every part: one narrow mask serves all, in every layer.
    """

    QUERIES = 1024  #: at a time, about

    def __init__(self, block_size: int, x: Tensor) -> None:
        """For hidden states of the length, dtype and device of x [B, L, D]."""
        self.block_size, self.length = block_size, x.shape[1]
        self.queries = max(1, self.QUERIES // block_size) * block_size
        self.width = -(-self.length // self.queries) * self.queries
        keys = torch.arange(self.queries - self.width, self.queries, device=x.device)  # from the part's first query
        rows = torch.arange(self.queries, device=x.device)
        self.mask = self._additive(rows[:, None][None, None], keys, x.dtype)  # [1, 1, queries, width]

    def attend(self, attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, at: Any) -> Tensor:
        """`attention(query, key, value, mask)` in parts. Queries are at positions `at` [B, M], or in order if none."""
        parts = []
        for start in range(0, query.shape[2], self.queries):
            rows = slice(start, min(start + self.queries, query.shape[2]))
            if at is None:
                first = self.width - start - self.queries
                mask = self.mask[:, :, : rows.stop - start, first : first + rows.stop]
                parts.append(attention(query[:, :, rows], key[:, :, : rows.stop], value[:, :, : rows.stop], mask))
            else:
                keys = torch.arange(self.length, device=key.device)
                mask = self._additive(at[:, None, rows, None], keys, self.mask.dtype)
                parts.append(attention(query[:, :, rows], key, value, mask))
        return torch.cat(parts, dim=1)

    def _additive(self, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        blocks = (part.div(self.block_size, rounding_mode="floor") for part in (keys, queries))
        return additive_mask(torch.le(*blocks), dtype)


def rotary_embedding(config: Any) -> nn.Module:
    """Cosine and sine of every position, for the first `partial_rotary_factor` of each head's features.

    The module is GLM's, the one of transformers that turns a part of them; it reads a config as transformers' own are.
    """
    names = ("rope_theta", "rope_scaling", "partial_rotary_factor", "max_position_embeddings")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    settings = {name: copy.deepcopy(getattr(config, name)) for name in names}  # transformers 5 writes into them
    heads = {"num_attention_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
    return GlmRotaryEmbedding(LlamaConfig(head_dim=head_dim, **heads, **settings))


class RMSNorm(nn.RMSNorm):
    """Root mean square norm, computed in float32 and rounded to the dtype of its input. One kernel on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # which would give it a float32 copy
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes in on the device of x; none without it."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def lowered(x: Tensor) -> Tensor:
    """In the dtype that autocast computes in, once for all layers that x goes into; as it is without autocast.

    On a base in 4 bit the norms are float32, and each layer would cast for itself and widen what it puts out.
    """
    return x.to(autocast_dtype(x) or x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on the first cos.shape[-1] features. x [B, H, L, d], cos and sin [1 or B, L, d'].

    Feature i turns with feature i + d'/2, by the same angle. Under autocast the result is in its dtype, rounded once:
    attention would round it.
    """
    half = cos.shape[-1] // 2
    dtype = autocast_dtype(x) or torch.promote_types(x.dtype, cos.dtype)
    return _Rotation.apply(x, cos[:, None], sin[:, None, :, :half], dtype)


class _Rotation(torch.autograd.Function):
    """The result in two passes. As a sum of products with turned copies it takes five."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _turned(x, cos, sin, 1, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, -1, ctx.dtype), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int, dtype: torch.dtype) -> Tensor:
    width = cos.shape[-1]
    output = torch.empty_like(x, dtype=dtype)
    turned, (first, second) = (x[..., :width] * cos).chunk(2, dim=-1), x[..., :width].chunk(2, dim=-1)
    half, other = output[..., :width].chunk(2, dim=-1)
    torch.addcmul(turned[0], second, sin, value=-sign, out=half)
    torch.addcmul(turned[1], first, sin, value=sign, out=other)
    if x.shape[-1] > width:
        output[..., width:].copy_(x[..., width:])
    return output


def in_heads(module: Any, *projected: Tensor) -> Iterator[Tensor]:
    """Queries, keys or values by head. Each [B, L, H·d] → [B, H, L, d]."""
    return (part.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for part in projected)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | BlockCausal | None,
    cache: Any = None,
) -> Tensor:
    """Bidirectional attention. query [B, H, M, d], key and value [B, H_kv, L, d] → [B, M, H·d].

    `queries` [B, M] names those of the L tokens whose output is wanted; none means all, in order. With a layer's part
    of a `CanvasCache` the L keys are stored there, and all visible ones are attended to.
    """
    cos, sin = position_embeddings
    key = rotate(key, cos, sin).to(value.dtype)
    if cache is not None:
        key, value = cache.update(key, value)
    if queries is not None:
        batch = len(queries)
        cos, sin = (take(part.expand(batch, -1, -1), queries) for part in (cos, sin))
        if isinstance(attention_mask, Tensor) and attention_mask.shape[-2] > 1:
            rows = queries[:, None, :, None].expand(-1, attention_mask.shape[1], -1, attention_mask.shape[-1])
            attention_mask = attention_mask.expand(batch, -1, -1, -1).gather(2, rows)
    query = rotate(query, cos, sin).to(value.dtype)
    implementation = module.config._attn_implementation
    attention = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    dropout = module.config.attention_dropout if module.training else 0.0

    def attended(*given: Tensor | None) -> Tensor:
        return attention(module, *given, dropout=dropout, scaling=module.head_dim**-0.5, is_causal=False)[0]

    if isinstance(attention_mask, BlockCausal):
        return attention_mask.attend(attended, query, key, value, queries).flatten(2)
    return attended(query, key, value, attention_mask).flatten(2)


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        x = lowered(x)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(GradientCheckpointingLayer):
    """Attention and a feed-forward network, each on a norm of what comes in, and added to it.

    A subclass has `attended(x, queries, position_embeddings, attention_mask, cache)`, as `attend`, and `feed_forward`.
    """

    attended: Callable[..., Tensor]
    feed_forward: Callable[[Tensor], Tensor]
    norms = ("input_layernorm", "post_attention_layernorm")  #: names of the norm before either

    def forward(
        self,
        hidden: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | BlockCausal | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """hidden [B, L, D] → [B, L, D], or [B, M, D] of the positions `queries` [B, M]."""
        first, second = (getattr(self, name) for name in self.norms)
        attended = self.attended(lowered(first(hidden)), queries, position_embeddings, attention_mask, cache)
        hidden = attended + (hidden if queries is None else take(hidden, queries))
        return hidden + self.feed_forward(second(hidden))
