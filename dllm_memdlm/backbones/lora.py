"""PEFT's LoRA as we compute it: on linear layers with fewer kernels, and on all experts of a layer at once.

As PEFT writes a LoRA, each pass also scales what goes up, adds it to a copy of the layer's output, and keeps both.
"""

from __future__ import annotations

import functools
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .expert_ffn import Term
from .experts import ExpertLinear, PackedExpertLinear, without_adapters
from .layers import autocast_dtype, constant


def custom_module(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
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


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is under a plain LoRA: two matrices, and nothing else."""
    return isinstance(layer, lora.LoraLayer) and not (
        layer.lora_variant or any(layer.lora_bias.values()) or layer.lora_magnitude_vector
    )


# === on a linear layer ===


#: What `FusedLora` is mixed into. As a base it would change how objects lie in memory.
if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer as _Layer
else:
    _Layer = object


class FusedLora(_Layer):
    """PEFT's forward pass, where it is a plain LoRA in one dtype on a plain layer; PEFT's own where it is not."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's method."""
        dtype = None if x.is_meta else autocast_dtype(x)
        names = [name for name in self.active_adapters if name in self.lora_A]
        if kwargs or not self._is_plain(x, dtype, names):
            return super().forward(x, *args, **kwargs)
        x = x.to(dtype or x.dtype)
        output = self.base_layer(x)
        for name in names:
            down, up = (constant(side[name].weight).to(x.dtype) for side in (self.lora_A, self.lora_B))
            output = _Addition.apply(output, x, down, up, self.scaling[name], _probability(self.lora_dropout[name]))
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


@functools.cache
def _packed() -> type[nn.Module]:
    class PackedDenseLora(FusedLora, lora.Linear4bit):
        """PEFT's layer on one in 4 bit."""

    return PackedDenseLora


def _untouched(module: nn.Module) -> bool:
    """Whether nobody wants to know when it is called, as ZeRO-3 and accelerate do, which bring the weights then."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return not any(hooks) and "forward" not in vars(module)


def _probability(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


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


# === on all experts of a layer ===


class ExpertLora(nn.Module, lora.LoraLayer):
    """PEFT's LoRA on an ExpertLinear: a pair of matrices for every expert, in two tensors [E, r, in] and [E, out, r].

    Only what PEFT calls a plain LoRA; without a name it has none yet.
    """

    if TYPE_CHECKING:  # what PEFT's class holds; nn.Module has a tensor or a module for every name

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, base_layer: ExpertLinear, adapter_name: str | None = None, **settings: Any) -> None:
        nn.Module.__init__(self)
        with warnings.catch_warnings():  # PEFT's, of a layer that it does not know
            warnings.simplefilter("ignore", UserWarning)
            lora.LoraLayer.__init__(self, base_layer)
        if adapter_name is not None:
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, **settings)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, **settings: Any) -> None:
        """Put a new LoRA there, as PEFT's method. Raises ValueError for one that is not plain."""
        asked = vars(settings["config"]) if "config" in settings else settings  # PEFT 0.17 gives them one by one
        start, base = asked["init_lora_weights"], self.get_base_layer()
        if start not in (True, False, "gaussian"):
            raise ValueError(f"init_lora_weights={start!r}: expected true, false or 'gaussian' for routed experts")
        with torch.device("meta"):  # nothing but its settings is kept
            one = nn.Linear(base.in_features, base.out_features, bias=False)
            like = lora.Linear(one, adapter_name, r=r, lora_alpha=lora_alpha, **settings)
        if not is_plain(like):
            odd = [f"{name}=True" for name in ("use_dora", "lora_bias") if asked.get(name)] or ["a variant"]
            raise ValueError(f"{odd[0]}: expected false for routed experts, whose LoRA is two tensors")
        for name in self.other_param_names:
            getattr(self, name).update(getattr(like, name))
        down = ExpertLinear(base.experts, base.in_features, r)
        up = ExpertLinear(base.experts, r, base.out_features)
        if start == "gaussian":
            nn.init.normal_(down.weight, std=1 / r)
        if start is not False:
            nn.init.zeros_(up.weight)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = down, up
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def take_over(self, other: lora.LoraLayer) -> None:
        """Have the settings of a layer of PEFT's."""
        for name in ("merged_adapters", *self.other_param_names):
            setattr(self, name, getattr(other, name))
        self._active_adapter, self._disable_adapters = other.active_adapters, other.disable_adapters
        self.train(other.training)

    def terms(self, dtype: torch.dtype) -> list[Term]:
        """What is added to the layer's output: in autocast's dtype; without it in its own, or in `dtype`, the input's,
        if that is narrower, as PEFT loads every adapter in float32, in which a GPU has no grouped product."""
        if self.disable_adapters and self.merged:  # as PEFT's layers do
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        terms = []
        for name in (name for name in self.active_adapters if name in self.lora_A):
            down, up = constant(self.lora_A[name].weight), constant(self.lora_B[name].weight)
            own = dtype
            if not torch.is_autocast_enabled(down.device.type):
                own = min(down.dtype, dtype, key=lambda one: one.itemsize)
            probability = _probability(self.lora_dropout[name])
            terms.append(Term(own, up.to(own), down.to(own), self.scaling[name], probability))
        return terms

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weights [E, out, in]."""
        return torch.bmm(self.lora_B[adapter].weight, self.lora_A[adapter].weight) * self.scaling[adapter]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the weights; each sum is rounded once.

        Raises:
            ValueError: weights in 4 bit; or, with `safe_merge`, a sum that would not be finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if isinstance(self.base_layer, PackedExpertLinear):
                raise ValueError("experts in 4 bit take no sum; merge the adapter into float weights")
            delta = self.get_delta_weight(name).float()
            if safe_merge and not torch.isfinite(delta).all():
                raise ValueError(f"the adapter {name} is not finite")
            self.base_layer.weight += delta
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take them away again."""
        while self.merged_adapters:
            self.base_layer.weight -= self.get_delta_weight(self.merged_adapters.pop()).float()


def terms_of(linear: ExpertLinear | ExpertLora, dtype: torch.dtype) -> list[Term]:
    """What `expert_ffn` sums up, of inputs in `dtype`, or under autocast to it: the own weights, and the adapters."""
    base = without_adapters(linear)
    matrices, own = base.matrices, base.computes_in or dtype
    first = Term(own, None, unpack=matrices) if callable(matrices) else Term(own, constant(matrices))
    return [first, *(linear.terms(dtype) if isinstance(linear, ExpertLora) else ())]
