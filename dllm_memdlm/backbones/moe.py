"""Routed experts over sorted tokens: one grouped product a projection, instead of a Python loop over experts.

Experts that cannot be stacked, such as quantised ones, run one by one on their rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from ..fast_weights import SiteWeights
from ..grouped import grouped_linear, split


class Routes(NamedTuple):
    """Tokens sorted by expert, and within an expert by sample."""

    order: Tensor  #: which of the T·k (token, choice) pairs stands in each sorted row [T·k]
    offsets: Tensor  #: where each expert's rows end [E] int32
    fast_offsets: Tensor  #: where each (expert, sample)'s rows end [E·S] int32


class RoutedExperts(nn.ModuleList):
    """The expert list of a sparse layer, called with the router's choice.

    The experts stay ordinary modules (names, checkpoints, PEFT and quantisation as ever). Fast weights of their
    projections are put into `fast` for the time of a forward pass.
    """

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__(experts)
        self._reset()

    def _reset(self) -> None:
        self.packs = True  #: whether frozen weights may move into one buffer; not where an engine moves them itself
        self.fast: dict[str, SiteWeights] = {}
        self._packed: dict[str, Tensor] = {}

    @classmethod
    def adopt(cls, experts: nn.ModuleList) -> None:
        """Make a plain list of experts one of these, in place."""
        experts.__class__ = cls
        experts._reset()

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Σ over the chosen experts of weight · expert(x). x [B, M, D]; chosen, weights [B, M, k] → [B, M, D]."""
        top_k = chosen.shape[-1]
        routes = self._route(chosen)
        rows = x.flatten(0, 1).repeat_interleave(top_k, dim=0).index_select(0, routes.order)
        gated = self[0].act_fn(self._project("gate_proj", rows, routes)) * self._project("up_proj", rows, routes)
        output = self._project("down_proj", gated, routes)
        back = torch.empty_like(routes.order).scatter_(0, routes.order, torch.arange(len(output), device=x.device))
        output = output.index_select(0, back).unflatten(0, chosen.shape)
        return (output * weights[..., None]).sum(-2).to(x.dtype)

    def _route(self, chosen: Tensor) -> Routes:
        samples = max((site.samples for site in self.fast.values()), default=1)
        if samples > 1 and len(chosen) != samples:
            raise ValueError(f"fast weights of {samples} samples on a batch of {len(chosen)}")
        group = chosen * samples
        if samples > 1:
            group = group + torch.arange(len(chosen), device=chosen.device)[:, None, None]
        group = group.flatten()
        counts = torch.zeros(len(self) * samples, dtype=torch.int64, device=group.device)
        fast_offsets = counts.scatter_add_(0, group, torch.ones_like(group)).cumsum(0).to(torch.int32)
        return Routes(group.argsort(stable=True), fast_offsets[samples - 1 :: samples], fast_offsets)

    def _project(self, name: str, rows: Tensor, routes: Routes) -> Tensor:
        linears = [getattr(expert, name) for expert in self]
        if _are_groupable(linears):
            output = self._grouped(name, linears, rows, routes.offsets)
        else:  # quantised experts, and adapters other than plain LoRA, compute for themselves
            output = torch.cat(
                [linear(part) for linear, part in zip(linears, split(rows, routes.offsets), strict=True)]
            )
        if name in self.fast:
            output = output + self.fast[name].grouped(rows, routes.fast_offsets).to(output.dtype)
        return output

    def _grouped(self, name: str, linears: list[nn.Module], rows: Tensor, offsets: Tensor) -> Tensor:
        adapted = isinstance(linears[0], LoraLinear)
        bases = [linear.base_layer for linear in linears] if adapted else linears
        output = grouped_linear(rows, self._stack(name, [base.weight for base in bases]), offsets)
        if adapted and not linears[0].disable_adapters and not linears[0].merged:
            adapter = linears[0].active_adapters[0]
            down = torch.stack([linear.lora_A[adapter].weight for linear in linears])
            up = torch.stack([linear.lora_B[adapter].weight for linear in linears])
            dropped = linears[0].lora_dropout[adapter](rows.to(down.dtype))
            lora = grouped_linear(grouped_linear(dropped, down, offsets), up, offsets)
            output = output + (lora * linears[0].scaling[adapter]).to(output.dtype)
        return output

    def _stack(self, name: str, weights: list[Tensor]) -> Tensor:
        """[E, out, in]. Frozen weights become views of one buffer, so that stacking them costs nothing afterwards."""
        if not self.packs or any(weight.requires_grad for weight in weights):
            return torch.stack(weights)
        packed = self._packed.get(name)
        if packed is None or any(w.data_ptr() != p.data_ptr() for w, p in zip(weights, packed, strict=True)):
            packed = torch.stack([weight.detach() for weight in weights])
            for weight, view in zip(weights, packed, strict=True):
                weight.data = view
            self._packed[name] = packed
        return packed


@contextmanager
def without_backward_hooks(experts: Iterable[RoutedExperts]) -> Iterator[None]:
    """Forward passes whose backward pass the experts' backward hooks do not see.

    ZeRO-3 takes the first backward pass through such a module for the one that brings its parameters' gradients. The
    inner loop's brings none: it ends at the fast weights.
    """
    held = [(module, module._backward_hooks) for module in experts]
    for module, _ in held:
        module._backward_hooks = OrderedDict()
    try:
        yield
    finally:
        for module, hooks in held:
            module._backward_hooks = hooks


def _are_groupable(linears: list[nn.Module]) -> bool:
    """Whether all are plain linear layers without bias, or all such layers under the same single plain LoRA."""
    first = type(linears[0])
    if first is nn.Linear:
        return all(type(linear) is nn.Linear and linear.bias is None for linear in linears)
    return first is LoraLinear and all(_has_plain_lora(linear, linears[0]) for linear in linears)


def _has_plain_lora(linear: nn.Module, first: LoraLinear) -> bool:
    active = first.active_adapters
    if type(linear) is not LoraLinear or linear.active_adapters != active or len(active) != 1:
        return False
    if linear.scaling != first.scaling:
        return False
    if active[0] not in linear.lora_A or active[0] in linear.lora_variant or linear.lora_bias[active[0]]:
        return False
    return type(linear.base_layer) is nn.Linear and linear.base_layer.bias is None
