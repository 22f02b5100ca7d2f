"""Inputs of models: tokens, attention masks of every form, and a token that breaks what it touches."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dllm_memdlm.backbones import staged_backbone

BATCH, LENGTH = 3, 12


def tokens() -> Tensor:
    return torch.randint(3, 48, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def mask_of(form: str, dtype: torch.dtype) -> Tensor | None:
    """An attention mask; every query sees at least one key."""
    padding = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    padding[1, 8:] = 0
    padding[2, :2] = 0
    block_causal = (torch.arange(LENGTH)[:, None] // 4 >= torch.arange(LENGTH)[None] // 4).expand(BATCH, 1, -1, -1)
    additive = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=dtype).masked_fill(~block_causal, torch.finfo(dtype).min)
    return {
        "none": None,
        "2-D": padding,
        "2-D bool": padding.bool(),
        "4-D bool": block_causal,
        "4-D additive": additive,
        "4-D of zeros": torch.zeros(1, 1, LENGTH, LENGTH, dtype=dtype),
    }[form]


def second_norm(layer: nn.Module) -> nn.Module:
    """The norm before a layer's feed-forward network."""
    own = dict(layer.named_children())
    return next(own[name] for name in ("ff_norm", "mlp_norm", "post_attention_layernorm") if name in own)


def poisoned(model: nn.Module, token: int, value: float = math.nan) -> None:
    """Give a token an embedding that is not finite."""
    with torch.no_grad():
        staged_backbone(model).get_input_embeddings().weight[token] = value
