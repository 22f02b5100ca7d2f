"""PEFT's LoRA on linear layers, with fewer kernels: two forward, and next to none that are no products backward.

As PEFT writes it, each pass also scales what goes up, adds it to a copy of the layer's output, and keeps both.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .experts import without_adapters
from .layers import autocast_dtype


class FusedLora:
    """PEFT's forward pass, where it is a plain LoRA in one dtype on a plain layer; PEFT's own where it is not."""

    trains = True  #: whether a backward pass goes on to the LoRA's weights

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's method."""
        dtype = None if x.is_meta else autocast_dtype(x)
        names = [name for name in self.active_adapters if name in self.lora_A]
        if kwargs or not self._is_plain(x, dtype, names):
            return super().forward(x, *args, **kwargs)
        x = x.to(dtype or x.dtype)
        output = self.base_layer(x)
        for name in names:
            down, up = self.lora_A[name].weight, self.lora_B[name].weight
            if not self.trains:
                down, up = down.detach(), up.detach()
            dropout = self.lora_dropout[name]
            probability = 0.0 if isinstance(dropout, nn.Identity) or not dropout.training else dropout.p
            output = _Addition.apply(output, x, down.to(x.dtype), up.to(x.dtype), self.scaling[name], probability)
        return output

    def _is_plain(self, x: Tensor, dtype: torch.dtype | None, names: list[str]) -> bool:
        base = self.base_layer
        # With a bias the output may be a view, to which nothing can be added in place.
        if x.is_meta or self.disable_adapters or self.merged or self.lora_variant or base.bias is not None:
            return False
        parts = [part for name in names for part in (self.lora_A[name], self.lora_B[name])]
        one_dtype = dtype is not None or all(part.weight.dtype == x.dtype for part in parts)
        return one_dtype and all(part.bias is None for part in parts) and all(map(_untouched, (base, *parts)))


class DenseLora(FusedLora, lora.Linear):
    """PEFT's layer."""


def dense_lora(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
    """The LoRA of a linear layer, for PEFT; none where PEFT has one of its own, such as for 8 bit."""
    base = without_adapters(target)
    settings = vars(kwargs["config"]) if "config" in kwargs else kwargs  # PEFT 0.17 gives them one by one
    if kwargs.get("parameter_name") or settings["fan_in_fan_out"]:
        return None
    if type(base) is nn.Linear or type(base).__module__.partition(".")[0] == __name__.partition(".")[0]:
        return DenseLora(target, adapter_name, **kwargs)
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is not None and type(base) is bitsandbytes.nn.Linear4bit:
        return _packed()(target, adapter_name, **kwargs)
    return None


@functools.cache
def _packed() -> type[nn.Module]:
    class PackedDenseLora(FusedLora, lora.Linear4bit):
        """PEFT's layer on one in 4 bit."""

    return PackedDenseLora


def _untouched(module: nn.Module) -> bool:
    """Whether nobody wants to know when it is called, as ZeRO-3 and accelerate do, which bring the weights then."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return not any(hooks) and "forward" not in vars(module)


class _Addition(torch.autograd.Function):
    """output + scaling · up(down(dropout(x))), in place. output [..., out], x [..., in], down [r, in], up [out, r]."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float, dropout: float
    ) -> Tensor:
        ctx.mark_dirty(output)
        ctx.scaling, ctx.dropout = scaling, dropout
        rows, survivors = x.reshape(-1, x.shape[-1]), None
        with torch.autocast(x.device.type, enabled=False):  # all are in one dtype already
            if dropout > 0:
                rows, survivors = torch.native_dropout(rows, dropout, True)
            low = rows @ down.T
            output.view(-1, output.shape[-1]).addmm_(low, up.T, alpha=scaling)
        _, _, of_down, of_up, *_ = ctx.needs_input_grad
        ctx.save_for_backward(rows if of_down else None, survivors, low if of_up else None, down, up)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        rows, survivors, low, down, up = ctx.saved_tensors
        given, d_x = d_output.reshape(-1, d_output.shape[-1]), None
        with torch.autocast(given.device.type, enabled=False):
            d_low = _scaled_product(given, up, ctx.scaling)
            d_up = None if low is None else _scaled_product(given.T, low, ctx.scaling)
            d_down = None if rows is None else d_low.T @ rows
            if ctx.needs_input_grad[1]:
                d_x = d_low @ down
                if survivors is not None:
                    scale = 1 / (1 - ctx.dropout) if ctx.dropout < 1 else 0.0
                    d_x = torch.ops.aten.native_dropout_backward(d_x, survivors, scale)
                d_x = d_x.view(*d_output.shape[:-1], down.shape[1])
        return d_output, d_x, d_down, d_up, None, None


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)
