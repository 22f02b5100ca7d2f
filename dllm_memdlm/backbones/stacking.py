"""From a module an expert, as files, other libraries and bitsandbytes have them, to tensors of all experts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from torch import nn
from transformers.integrations.deepspeed import deepspeed_config

from .experts import ExpertLinear, PackedExpertLinear
from .layers import switched_on
from .lora import ExpertLora, is_plain

#: Whether experts are to be built as modules.
are_apart: ContextVar[bool] = ContextVar("experts_apart", default=False)


def experts_apart() -> AbstractContextManager[None]:
    """Models that are built within get a module an expert, as their files have them, for `moe.stack_experts`."""
    return switched_on(are_apart)


def check_alike(linears: Sequence[Any]) -> None:
    """Raise ValueError for layers of experts that have biases, or differ in kind, in whether they train or in the LoRA
    that they are under, and for adapters that are no plain LoRA."""
    first = linears[0]
    if any(isinstance(linear, BaseTunerLayer) for linear in linears):
        same = all(type(linear) is type(first) and is_plain(linear) for linear in linears)
        if not same or any(_state_of(linear) != _state_of(first) for linear in linears):
            raise ValueError("experts under adapters that differ or are no plain LoRA; expected one LoRA for all")
        check_alike([linear.base_layer for linear in linears])
    elif any(type(linear) is not type(first) or linear.bias is not None for linear in linears) or not (
        type(first) is nn.Linear or _is_packed(first)
    ):
        raise ValueError(f"experts of {type(first).__name__}: expected linear layers without bias, in 16, 32 or 4 bit")
    elif len({linear.weight.requires_grad for linear in linears}) > 1:
        raise ValueError("experts of which some train: expected all or none")


def stacked(linears: Sequence[Any]) -> ExpertLinear | ExpertLora:
    """The same linear layer of every expert, as one. The layers, which must be alike, lose their weights."""
    first = linears[0]
    if isinstance(first, LoraLayer):
        return _stacked_lora(linears)
    if _is_packed(first):
        packed = [(linear.weight.data, linear.weight.quant_state) for linear in linears]
        whole: ExpertLinear = PackedExpertLinear(packed, first.compute_dtype)
        for linear in linears:
            linear.weight = None
        return whole
    weights, trains = [linear.weight for linear in linears], first.weight.requires_grad
    with gather_params_ctx(weights, modifier_rank=None):  # ZeRO-3 has loaded them in parts
        weight = torch.stack([part.detach() for part in weights])
    for linear in linears:
        linear.weight = None
    whole = ExpertLinear(len(weight), first.in_features, first.out_features, weight).requires_grad_(trains)
    if hasattr(weights[0], "ds_id"):
        import deepspeed

        deepspeed.zero.Init(module=whole, config_dict_or_path=deepspeed_config())
    return whole


def _stacked_lora(linears: Sequence[LoraLayer]) -> ExpertLora:
    first = linears[0]
    whole = ExpertLora(stacked([linear.base_layer for linear in linears]))
    for name in first.lora_A:
        whole.lora_A[name] = stacked([linear.lora_A[name] for linear in linears])
        whole.lora_B[name] = stacked([linear.lora_B[name] for linear in linears])
    whole.take_over(first)
    return whole


def _is_packed(linear: Any) -> bool:
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(linear, bitsandbytes.nn.Linear4bit)


def _state_of(linear: LoraLayer) -> tuple:
    dropout = {name: getattr(part, "p", 0.0) for name, part in linear.lora_dropout.items()}
    adapters = linear.active_adapters, linear.disable_adapters, linear.merged_adapters, set(linear.lora_A)
    return *adapters, linear.r, linear.scaling, dropout
