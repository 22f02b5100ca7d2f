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

from .layers import autocast_dtype


class _Fused:
    """PEFT's forward pass, where it is a plain LoRA in one dtype; PEFT's own where it is not."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's method."""
        if not self._is_plain(x, kwargs):
            return super().forward(x, *args, **kwargs)
        output = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.lora_A:
                dropout = self.lora_dropout[name]
                probability = dropout.p if dropout.training and not isinstance(dropout, nn.Identity) else 0.0
                down, up = self.lora_A[name].weight.to(x.dtype), self.lora_B[name].weight.to(x.dtype)
                output = _Addition.apply(output, x, down, up, self.scaling[name], probability)
        return output

    def _is_plain(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        if self.disable_adapters or self.merged or self.lora_variant or kwargs:
            return False
        cast = autocast_dtype(x)
        return all(
            x.dtype == (cast or layer.weight.dtype)
            and layer.bias is None
            and not hasattr(layer.weight, "ds_id")  # ZeRO-3 brings a weight when its own module is called
            for name in self.active_adapters
            if name in self.lora_A
            for layer in (self.lora_A[name], self.lora_B[name])
        )


class DenseLora(_Fused, lora.Linear):
    """PEFT's layer."""


def lora_layers() -> dict[type[nn.Module], type[nn.Module]]:
    """The kinds of linear layers, and the LoRA of each."""
    packed = {sys.modules["bitsandbytes"].nn.Linear4bit: _packed()} if "bitsandbytes" in sys.modules else {}
    return {**packed, nn.Linear: DenseLora}  # PEFT takes the first that fits, and a packed layer is a linear one


@functools.cache
def _packed() -> type[nn.Module]:
    class PackedDenseLora(_Fused, lora.Linear4bit):
        """PEFT's layer on one in 4 bit."""

    return PackedDenseLora


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
        ctx.save_for_backward(rows, survivors, low, down, up)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        rows, survivors, low, down, up = ctx.saved_tensors
        _, of_x, of_down, of_up, *_ = ctx.needs_input_grad
        given = d_output.reshape(-1, d_output.shape[-1])
        with torch.autocast(given.device.type, enabled=False):
            d_low = _scaled_product(given, up, ctx.scaling)
            d_up = _scaled_product(given.T, low, ctx.scaling) if of_up else None
            d_down = d_low.T @ rows if of_down else None
            d_x = d_low @ down if of_x else None
            if d_x is not None and survivors is not None:
                d_x = torch.ops.aten.native_dropout_backward(d_x, survivors, 1 / (1 - ctx.dropout))
        return d_output, None if d_x is None else d_x.view(*d_output.shape[:-1], -1), d_down, d_up, None, None


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)
