"""The linear layers of all experts of a layer as one tensor each; files have a matrix an expert.

checkpoint (a matrix an expert) ─► nn.ModuleList of gated MLPs ─► `stack_experts` ─► ExpertLinear [E, out, in]
adapter (two matrices an expert) ─► `stack_names`, on loading ─► ExpertLora [E, r, in], [E, out, r]
`split_names` ─► what is saved, a matrix an expert again
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from transformers.integrations.deepspeed import deepspeed_config

from .projection import Adapter, Projection

#: Whether experts are to be built as modules.
are_apart: ContextVar[bool] = ContextVar("experts_apart", default=False)


class ExpertLinear(nn.Module):
    """A linear layer without bias for every expert. It is computed by `RoutedExperts`, for all of them at once."""

    computes_in: torch.dtype | None = None  #: the product, if not in the dtype of its input or autocast's

    def __init__(self, experts: int, in_features: int, out_features: int, weight: Tensor | None = None) -> None:
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features) if weight is None else weight)
        if weight is None:
            nn.init.uniform_(self.weight, -(in_features**-0.5), in_features**-0.5)  # as nn.Linear

    @property
    def matrices(self) -> Tensor | Callable[[], Tensor]:
        """[E, out, in], or what makes them."""
        return self.weight

    @torch.no_grad()
    def add(self, delta: Tensor) -> None:
        """Add to the weights, in place. delta [E, out, in] float32; the sum is rounded once."""
        self.weight += delta

    def extra_repr(self) -> str:
        return f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"


class PackedExpertLinear(ExpertLinear):
    """The same in 4 bit: bitsandbytes' bytes of every expert, one after the other, which one call unpacks.

    All its tensors are bytes, the float32 statistics too, so that no cast of a model rounds them.

    Args:
        packed: what bitsandbytes' `quantize_4bit` gives for each expert's matrix.
        compute_dtype: of the product.
    """

    def __init__(self, packed: Sequence[tuple[Tensor, Any]], compute_dtype: torch.dtype | None) -> None:
        nn.Module.__init__(self)
        weights, states = zip(*packed, strict=True)
        first = self._like = states[0]
        self.experts, (self.out_features, self.in_features) = len(packed), first.shape
        self.computes_in, self._blocks = compute_dtype, first.absmax.numel()
        # Where a matrix ends within a block, the next one begins with a block of its own all the same.
        self.weight = _frozen(_joined(weights, first.blocksize // 2))
        tables = [torch.cat([state.absmax for state in states])]
        if first.nested:
            self.scales = _frozen(_joined([state.absmax for state in states], first.state2.blocksize))
            absmax = torch.cat([state.state2.absmax for state in states])
            tables = [torch.stack([state.offset for state in states]), first.state2.code, absmax]
        self._table_sizes = [len(table) for table in tables]
        self.tables = _frozen(torch.cat(tables).view(torch.uint8))

    @property
    def matrices(self) -> Tensor | Callable[[], Tensor]:
        return self.unpack

    @torch.no_grad()
    def unpack(self) -> Tensor:
        """[E, out, in], in the dtype that they were packed from. The same bits as one by one."""
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        like = self._like
        scales, *rest = self.tables.view(torch.float32).split(self._table_sizes)
        if rest:
            offset, (code, absmax) = scales, rest
            scales = dequantize_blockwise(self.scales, absmax=absmax, code=code, blocksize=like.state2.blocksize)
            scales = (scales.view(self.experts, -1)[:, : self._blocks] + offset[:, None]).flatten()
        size = torch.Size((self.experts, self._blocks * like.blocksize))
        state = QuantState(scales, size, blocksize=like.blocksize, quant_type=like.quant_type, dtype=like.dtype)
        weights = dequantize_4bit(self.weight, state)[:, : self.out_features * self.in_features]
        return weights.reshape(self.experts, self.out_features, self.in_features)

    def add(self, delta: Tensor) -> None:
        """Raise ValueError: the sums would have to be packed anew."""
        raise ValueError("experts in 4 bit take no sum; merge the adapter into float weights")


class ExpertLora(nn.Module, LoraLayer):
    """PEFT's LoRA on an ExpertLinear: a pair of matrices for every expert, in two tensors [E, r, in] and [E, out, r].

    Only what PEFT calls a plain LoRA.
    """

    def __init__(
        self, base_layer: ExpertLinear, adapter_name: str, r: int = 0, lora_alpha: int = 1, **kwargs: Any
    ) -> None:
        self._set_up(base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, **kwargs)

    def _set_up(self, base_layer: ExpertLinear) -> None:
        nn.Module.__init__(self)
        with warnings.catch_warnings():  # PEFT's, of a layer that it does not know
            warnings.simplefilter("ignore", UserWarning)
            LoraLayer.__init__(self, base_layer)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any = None, **kwargs: Any) -> None:
        """Put a new LoRA there, as PEFT's method. Raises ValueError for one that is not plain."""
        asked = kwargs if config is None else vars(config)  # PEFT 0.17 gives the settings one by one
        for name in ("use_dora", "lora_bias"):
            if asked.get(name):
                raise ValueError(f"{name}=True: expected false for routed experts, whose LoRA is two tensors")
        start = asked.get("init_lora_weights", True)
        if start not in (True, False, "gaussian"):
            raise ValueError(f"init_lora_weights={start!r}: expected true, false or 'gaussian' for routed experts")
        if r <= 0:
            raise ValueError(f"r={r}: expected at least 1")
        base, rank_scaled = self.get_base_layer(), bool(asked.get("use_rslora"))
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (r**0.5 if rank_scaled else r)
        settings = {"use_rslora": rank_scaled, "use_dora": False, "lora_bias": False}
        for name in settings.keys() & set(self.other_param_names):  # those that this release notes
            getattr(self, name)[adapter_name] = settings[name]
        dropout = asked.get("lora_dropout", 0.0)
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        down = ExpertLinear(base.experts, base.in_features, r)
        up = ExpertLinear(base.experts, r, base.out_features)
        if start == "gaussian":
            nn.init.normal_(down.weight, std=1 / r)
        if start is not False:
            nn.init.zeros_(up.weight)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = down, up
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    @classmethod
    def of(cls, linears: Sequence[LoraLayer]) -> ExpertLora:
        """From PEFT's layers of every expert, which lose their weights."""
        first = linears[0]
        self = cls.__new__(cls)
        self._set_up(stacked([linear.base_layer for linear in linears]))
        for name in ("merged_adapters", *self.other_param_names):
            setattr(self, name, getattr(first, name))
        self._active_adapter, self._disable_adapters = first.active_adapters, first.disable_adapters
        for name in first.lora_A:
            self.lora_A[name] = stacked([linear.lora_A[name] for linear in linears])
            self.lora_B[name] = stacked([linear.lora_B[name] for linear in linears])
        return self.train(first.training)

    def adapters(self, dtype: torch.dtype) -> list[Adapter]:
        """What is added to the layer's output: in autocast's dtype; without it in its own, or in `dtype`, the input's,
        if that is narrower, as PEFT loads every adapter in float32, in which a GPU has no grouped product."""
        if self.disable_adapters and self.merged:  # as PEFT's layers do
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        adapters = []
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            down, up, dropout = self.lora_A[name].weight, self.lora_B[name].weight, self.lora_dropout[name]
            own = dtype
            if not torch.is_autocast_enabled(down.device.type):
                own = min(down.dtype, dtype, key=lambda one: one.itemsize)
            probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
            adapters.append(Adapter(down.to(own), up.to(own), self.scaling[name], own, dropout=probability))
        return adapters

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weights [E, out, in]."""
        return torch.bmm(self.lora_B[adapter].weight, self.lora_A[adapter].weight) * self.scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the weights. Raises ValueError, with `safe_merge`, if a sum would not be finite."""
        for name in check_adapters_to_merge(self, adapter_names):
            delta = self.get_delta_weight(name).detach().float()
            if safe_merge and not torch.isfinite(delta).all():
                raise ValueError(f"the adapter {name} is not finite")
            self.base_layer.add(delta)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take them away again."""
        while self.merged_adapters:
            self.base_layer.add(-self.get_delta_weight(self.merged_adapters.pop()).detach().float())


def projection(linear: ExpertLinear | ExpertLora, dtype: torch.dtype) -> Projection:
    """What `RoutedExperts` computes with: of inputs in `dtype`, or under autocast to it."""
    base, adapters = linear, []
    if isinstance(linear, ExpertLora):
        base, adapters = linear.base_layer, linear.adapters(dtype)
    return Projection(base.matrices, base.computes_in or dtype, adapters)


def without_adapters(linear: nn.Module) -> nn.Module:
    """The layer inside PEFT's, or the layer itself."""
    return linear.get_base_layer() if isinstance(linear, BaseTunerLayer) else linear


# === from a module an expert ===


@contextmanager
def experts_apart() -> Iterator[None]:
    """Models that are built here get a module an expert, as their files have them, for `stack_experts`."""
    token = are_apart.set(True)
    try:
        yield
    finally:
        are_apart.reset(token)


def check_alike(linears: Sequence[nn.Module]) -> None:
    """Raise ValueError for layers of experts that have biases, or differ in kind, in whether they train or in the LoRA
    that they are under, and for adapters that are no plain LoRA."""
    first = linears[0]
    if any(isinstance(linear, BaseTunerLayer) for linear in linears):
        same = all(type(linear) is type(first) and _is_plain(linear) for linear in linears)
        if not same or any(_state_of(linear) != _state_of(first) for linear in linears):
            raise ValueError("experts under adapters that differ or are no plain LoRA; expected one LoRA for all")
        check_alike([linear.base_layer for linear in linears])
    elif any(type(linear) is not type(first) or linear.bias is not None for linear in linears) or not (
        type(first) is nn.Linear or _is_packed(first)
    ):
        raise ValueError(f"experts of {type(first).__name__}: expected linear layers without bias, in 16, 32 or 4 bit")
    elif len({linear.weight.requires_grad for linear in linears}) > 1:
        raise ValueError("experts of which some train: expected all or none")


def _is_plain(linear: nn.Module) -> bool:
    return isinstance(linear, LoraLayer) and not (
        linear.lora_variant or any(linear.lora_bias.values()) or linear.lora_magnitude_vector
    )


def _is_packed(linear: nn.Module) -> bool:
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(linear, bitsandbytes.nn.Linear4bit)


def stacked(linears: Sequence[nn.Module]) -> ExpertLinear | ExpertLora:
    """The same linear layer of every expert, as one. The layers, which must be alike, lose their weights."""
    first = linears[0]
    if isinstance(first, LoraLayer):
        return ExpertLora.of(linears)
    if _is_packed(first):
        packed = [(linear.weight.data, linear.weight.quant_state) for linear in linears]
        whole = PackedExpertLinear(packed, first.compute_dtype)
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


def _state_of(linear: LoraLayer) -> tuple:
    dropout = {name: getattr(part, "p", 0.0) for name, part in linear.lora_dropout.items()}
    adapters = linear.active_adapters, linear.disable_adapters, linear.merged_adapters, set(linear.lora_A)
    return *adapters, linear.r, linear.scaling, dropout


def _joined(parts: Sequence[Tensor], block: int) -> Tensor:
    """One after the other, each filled up to whole blocks [E·n]."""
    return torch.cat([F.pad(part.flatten(), (0, -part.numel() % block)) for part in parts])


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
