"""LLaDA-8B and LLaDA-1.5 (GSAI-ML): parameter names as published, attention bidirectional."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layers import BundledConfig, DecoderLayer, RMSNorm, attend, in_heads, lowered, parts, rotary_embedding, take
from .output import OutputLinear
from .staged import StagedForward

#: Published fields that choose between models, with what is computed here.
COMPUTED: dict[str, Any] = {"block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms"}
COMPUTED |= {"layer_norm_with_affine": True, "bias_for_layer_norm": False, "attention_layer_norm": False}
COMPUTED |= {"rope": True, "rope_full_precision": True, "alibi": False, "multi_query_attention": None}
COMPUTED |= {"input_emb_norm": False, "weight_tying": False, "scale_logits": False, "block_group_size": 1}
COMPUTED |= {"residual_dropout": 0.0, "embedding_dropout": 0.0}


class LLaDAConfig(BundledConfig):
    """Dimensions by their published names, or by the usual ones; the defaults are those of LLaDA-8B.

    Raises:
        ValueError: a published field asks for what is not computed here.
    """

    model_type = "llada"
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "initializer_range": "init_std",
        "tie_word_embeddings": "weight_tying",
    }
    partial_rotary_factor = 1.0

    def __init__(
        self,
        d_model: int = 4096,
        n_layers: int = 32,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        mlp_hidden_size: int | None = 12288,
        mlp_ratio: int = 4,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        include_bias: bool = False,
        include_qkv_bias: bool = False,
        attention_dropout: float = 0.0,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 500000.0,
        rope_scaling: dict[str, Any] | None = None,
        max_sequence_length: int = 4096,
        init_std: float = 0.02,
        mask_token_id: int | None = 126336,
        eos_token_id: int | None = 126081,
        pad_token_id: int | None = 126081,
        **kwargs: Any,
    ) -> None:
        own = {**COMPUTED, **locals()}
        kwargs = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        own = {name: kwargs.pop(name, value) for name, value in own.items()}
        own["n_kv_heads"] = own["n_kv_heads"] or own["n_heads"]
        own["mlp_hidden_size"] = own["mlp_hidden_size"] or own["mlp_ratio"] * own["d_model"]
        own["embedding_size"] = own["embedding_size"] or own["vocab_size"]
        own["multi_query_attention"] = own["multi_query_attention"] or None
        if own["bias_for_layer_norm"] is None:
            own["bias_for_layer_norm"] = own["include_bias"]
        for name, computed in COMPUTED.items():
            if own[name] != computed:
                raise ValueError(f"{name}={own[name]!r}: expected {computed!r}")
        if own["embedding_size"] < vocab_size:
            raise ValueError(f"embedding_size={own['embedding_size']}: expected at least vocab_size {vocab_size}")
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            if isinstance(own[name], int) and own[name] >= vocab_size:  # the published ones, of another vocabulary
                own[name] = None
        super().__init__({**own, "tie_word_embeddings": False}, **kwargs)


class LLaDABlock(DecoderLayer):
    norms = ("attn_norm", "ff_norm")

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        width, inner, biased = config.d_model, config.mlp_hidden_size, config.include_bias
        self.attn_norm = RMSNorm(width, eps=config.rms_norm_eps)
        of_queries = {"bias": biased or config.include_qkv_bias}
        self.q_proj = nn.Linear(width, width, **of_queries)
        self.k_proj = nn.Linear(width, config.n_kv_heads * self.head_dim, **of_queries)
        self.v_proj = nn.Linear(width, config.n_kv_heads * self.head_dim, **of_queries)
        self.attn_out = nn.Linear(width, width, bias=biased)
        self.ff_norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, inner, bias=biased)
        self.up_proj = nn.Linear(width, inner, bias=biased)
        self.ff_out = nn.Linear(inner, width, bias=biased)

    @property
    def head_dim(self) -> int:
        return parts(self.config, "d_model", "n_heads")

    @property
    def num_key_value_groups(self) -> int:
        return parts(self.config, "n_heads", "n_kv_heads")

    def attended(self, x: Tensor, queries: Tensor | None, *context: Any) -> Tensor:
        """As `attend`. x [B, L, D] → [B, M, D]."""
        asked = x if queries is None else take(x, queries)
        query, key, value = in_heads(self, self.q_proj(asked), self.k_proj(x), self.v_proj(x))
        return self.attn_out(attend(self, query, key, value, queries, *context))

    def feed_forward(self, x: Tensor) -> Tensor:
        x = lowered(x)
        return self.ff_out(F.silu(self.ff_proj(x)) * self.up_proj(x))


class LLaDADecoder(nn.Module):
    """All of the model: its output layer, too, is published in here."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        width, tokens = config.d_model, config.embedding_size
        self.transformer = nn.ModuleDict()
        self.transformer["wte"] = nn.Embedding(tokens, width)
        self.transformer["blocks"] = nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers))
        self.transformer["ln_f"] = RMSNorm(width, eps=config.rms_norm_eps)
        self.transformer["ff_out"] = OutputLinear(width, tokens, bias=config.include_bias)
        self.rotary_emb = rotary_embedding(config)


class LLaDAModelLM(StagedForward, PreTrainedModel):
    """LLaDA with its language-model head. See `StagedForward.forward`."""

    config_class = LLaDAConfig
    layers_path = "transformer.blocks"
    own_names = {"gate_proj": "ff_proj", "down_proj": "ff_out"}
    layers_take_queries = True
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["LLaDABlock"]

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDADecoder(config)
        self.post_init()

    @property
    def final_norm(self) -> nn.Module:
        return self.model.transformer.ln_f

    def position_embeddings(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """In float32 at least, whatever the weights are in: far positions need it."""
        wide = hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        return self.model.rotary_emb(wide, position_ids)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.transformer.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer.ff_out

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.transformer.ff_out = value
