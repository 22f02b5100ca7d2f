"""The feed-forward networks of all experts at once, forward and backward.

    y[t] = Σ over the experts e that token t is sent to of  w[t, e] · down_e(act(gate_e(x[t])) · up_e(x[t]))

Every projection is one grouped product over rows sorted by expert, and every adapter of one (the outer LoRA, the fast
weights) two thin ones. The backward pass is written out, so that next to nothing is kept for it: what gate and up gave,
and the low-rank products. Sorting the rows again, and the activation, cost little beside the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from ..grouped import grouped_linear, grouped_outer


class Routes(NamedTuple):
    """T rows, one for each of its k experts of each of N tokens, sorted by expert, and within an expert by sample."""

    order: Tensor  #: which of the N·k (token, choice) pairs stands in each row [T]
    tokens: Tensor  #: and which token [T]
    back: Tensor  #: the rows of each token [N, k]
    offsets: Tensor  #: where each expert's rows end [E] int32
    fast_offsets: Tensor  #: where each (expert, sample)'s rows end [E·S] int32


@dataclass(frozen=True)
class Adapter:
    """What is added to a projection's output: scaling · up(down(dropout(x))), or up(x)."""

    down: Tensor | None  #: [G, r, in]
    up: Tensor | None  #: [G, out, r], or [G, out, in]
    scaling: float
    dtype: torch.dtype  #: it computes in
    per_sample: bool = False  #: G is E·S, one matrix for each expert and sample, rather than E
    dropout: float = 0.0


@dataclass(frozen=True)
class Projection:
    """One of gate, up and down, of all experts."""

    #: [E, out, in], or where it is packed in 4 bit what unpacks it; the backward pass does so once more.
    weight: Tensor | Callable[[], Tensor] | None
    dtype: torch.dtype  #: the product with it computes in
    adapters: Sequence[Adapter] = ()


class Experts(NamedTuple):
    """What all experts are made of."""

    gate: Projection
    up: Projection
    down: Projection
    act: Callable[[Tensor], Tensor]


def expert_ffn(x: Tensor, weights: Tensor, routes: Routes, experts: Experts, dtype: torch.dtype) -> Tensor:
    """x [N, D], weights of the rows [T, 1] → [N, D] in `dtype`, which is also that of what lies between."""
    # Tensors go in one by one: autograd and its hooks see them nowhere else, and would not free them in time.
    tensors: list[Tensor | None] = []
    plans = []
    for projection in experts[:3]:
        given = projection.weight if isinstance(projection.weight, Tensor) else None
        tensors.append(given)
        for adapter in projection.adapters:
            tensors += [adapter.down, adapter.up]
        adapters = [replace(adapter, down=None, up=None) for adapter in projection.adapters]
        plans.append(replace(projection, weight=projection.weight if given is None else None, adapters=adapters))
    return _ExpertFFN.apply(Experts(*plans, experts.act), dtype, x, weights, *routes, *tensors)


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, experts: Experts, dtype: torch.dtype, x: Tensor, weights: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        routes, (gate, up, down) = _parts(experts, dtype, tensors)
        with torch.autocast(x.device.type, enabled=False):  # every product says what it computes in
            rows = x.to(dtype).index_select(0, routes.tokens)
            gates, ups = gate.forward(rows), up.forward(rows)
            # Weighted here rather than after `down`, where there is more to multiply.
            output = down.forward((experts.act(gates) * ups).mul_(weights))
            output = F.embedding_bag(routes.back, output, mode="sum")
        kept = [tensor for part in (gate, up, down) for tensor in part.kept]
        ctx.experts, ctx.dtype, ctx.number_kept = experts, dtype, len(kept)
        ctx.save_for_backward(x, weights, gates, ups, *kept, *tensors)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gates, ups, *tensors = ctx.saved_tensors
        kept, tensors = iter(tensors[: ctx.number_kept]), tensors[ctx.number_kept :]
        routes, (gate, up, down) = _parts(ctx.experts, ctx.dtype, tensors, kept)
        x_wanted = ctx.needs_input_grad[2]
        with torch.autocast(x.device.type, enabled=False):
            d_output = d_output.to(ctx.dtype).index_select(0, routes.tokens)
            activated = ctx.experts.act(gates)
            gated = activated * ups
            d_gated = down.backward(d_output, (gated * weights).to(ctx.dtype) if down.trains else None)
            d_weights = (d_gated * gated).sum(-1, keepdim=True)
            d_gated.mul_(weights)
            d_ups = d_gated * activated
            d_gates = _through(ctx.experts.act, gates, d_gated.mul_(ups))
            del gated, d_gated, activated
            rows = x.to(ctx.dtype).index_select(0, routes.tokens) if gate.trains or up.trains else None
            d_gate_rows = gate.backward(d_gates, rows, x_wanted)
            d_rows = up.backward(d_ups, rows, x_wanted)
            d_x = F.embedding_bag(routes.back, d_rows.add_(d_gate_rows), mode="sum") if x_wanted else None
        gradients = [gradient for part in (gate, up, down) for gradient in part.gradients]
        return None, None, d_x, d_weights, *[None] * len(routes), *gradients


def _through(act: Callable[[Tensor], Tensor], x: Tensor, d_output: Tensor) -> Tensor:
    """The gradient of an activation's input."""
    if isinstance(act, SiLUActivation):
        return torch.ops.aten.silu_backward(d_output, x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(act(leaf), leaf, d_output)[0]


def _parts(
    experts: Experts, dtype: torch.dtype, tensors: Sequence[Tensor | None], kept: Iterator[Tensor | None] | None = None
) -> tuple[Routes, list[_Part]]:
    """What went in one by one, put together again; in the backward pass with what was kept for it."""
    routes, rest = Routes(*tensors[: len(Routes._fields)]), iter(tensors[len(Routes._fields) :])
    return routes, [_Part(projection, dtype, routes, rest, kept) for projection in experts[:3]]


class _Part:
    """One projection in one pass."""

    def __init__(
        self,
        projection: Projection,
        dtype: torch.dtype,
        routes: Routes,
        tensors: Iterator[Tensor | None],
        kept: Iterator[Tensor | None] | None,
    ) -> None:
        self.projection, self.dtype, self.offsets, self.weight = projection, dtype, routes.offsets, next(tensors)
        self.deltas = [_Delta(adapter, routes, next(tensors), next(tensors)) for adapter in projection.adapters]
        for delta in self.deltas if kept is not None else ():
            delta.low, delta.survivors = next(kept), next(kept)
        self.d_weight: Tensor | None = None

    @property
    def kept(self) -> list[Tensor | None]:
        return [tensor for delta in self.deltas for tensor in (delta.low, delta.survivors)]

    @property
    def gradients(self) -> list[Tensor | None]:
        return [self.d_weight, *(gradient for delta in self.deltas for gradient in (delta.d_down, delta.d_up))]

    @property
    def trains(self) -> bool:
        """Whether a gradient of any of its matrices is wanted, which takes its inputs."""
        return _trains(self.weight) or any(_trains(delta.down) or _trains(delta.up) for delta in self.deltas)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in] → [T, out]."""
        output = grouped_linear(x.to(self.projection.dtype), self._weight(), self.offsets).to(self.dtype)
        for delta in self.deltas:
            delta.add(x, output)
        return output

    def backward(self, d_output: Tensor, x: Tensor | None, x_wanted: bool = True) -> Tensor | None:
        """The gradient of x, if wanted; the others are in `gradients` afterwards."""
        own = d_output.to(self.projection.dtype)
        d_x = grouped_linear(own, self._weight().mT, self.offsets).to(self.dtype) if x_wanted else None
        if _trains(self.weight):
            self.d_weight = grouped_outer(own, x.to(own.dtype), self.offsets)
        for delta in self.deltas:
            delta.backward(d_output, x, d_x)
        return d_x

    def _weight(self) -> Tensor:
        weight = self.projection.weight() if self.weight is None else self.weight
        return weight.to(self.projection.dtype)


class _Delta:
    """One adapter in one pass."""

    def __init__(self, adapter: Adapter, routes: Routes, down: Tensor | None, up: Tensor) -> None:
        self.adapter, self.down, self.up = adapter, down, up
        self.offsets = routes.fast_offsets if adapter.per_sample else routes.offsets
        self.low: Tensor | None = None  #: scaling · down(x) [T, r]
        self.survivors: Tensor | None = None  #: of dropout [T, in] bool
        self.d_down: Tensor | None = None
        self.d_up: Tensor | None = None

    def add(self, x: Tensor, output: Tensor) -> None:
        """Add to the projection's output, in place."""
        x = x.to(self.adapter.dtype)
        if self.adapter.dropout > 0:
            x, self.survivors = torch.native_dropout(x, self.adapter.dropout, True)
        if self.down is not None:
            x = self.low = grouped_linear(x, self.down, self.offsets).mul_(self.adapter.scaling)
        output.add_(grouped_linear(x, self.up, self.offsets))

    def backward(self, d_output: Tensor, x: Tensor | None, d_x: Tensor | None) -> None:
        """The gradients of the matrices; what comes to that of x is added to it in place."""
        d_output = d_output.to(self.adapter.dtype)
        x = None if x is None else self._dropped(x.to(self.adapter.dtype))
        if self.down is None:
            first, d_first = self.up, d_output
        else:
            first, d_first = self.down, grouped_linear(d_output, self.up.mT, self.offsets).mul_(self.adapter.scaling)
            if _trains(self.down):
                self.d_down = grouped_outer(d_first, x, self.offsets)
        if _trains(self.up):
            self.d_up = grouped_outer(d_output, x if self.down is None else self.low, self.offsets)
        if d_x is not None:
            d_x.add_(self._dropped(grouped_linear(d_first, first.mT, self.offsets)))

    def _dropped(self, x: Tensor) -> Tensor:
        return x if self.survivors is None else x * self.survivors / (1 - self.adapter.dropout)


def _trains(matrices: Tensor | None) -> bool:
    return matrices is not None and matrices.requires_grad
