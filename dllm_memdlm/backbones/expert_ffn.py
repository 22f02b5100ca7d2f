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

from ..grouped import ends, grouped_linear, grouped_outer

#: What a block of rows takes, in bytes.
BLOCK = 2**20


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

    def under(self, adapter: Adapter) -> Projection:
        """With one adapter more."""
        return replace(self, adapters=[*self.adapters, adapter])

    def detached(self) -> Projection:
        """As a constant."""
        weight = self.weight.detach() if isinstance(self.weight, Tensor) else self.weight
        adapters = [replace(one, down=one.down.detach(), up=one.up.detach()) for one in self.adapters]
        return replace(self, weight=weight, adapters=adapters)


class Experts(NamedTuple):
    """What all experts are made of."""

    gate: Projection
    up: Projection
    down: Projection
    act: Callable[[Tensor], Tensor]


def expert_ffn(
    x: Tensor, weights: Tensor, routes: Routes, experts: Experts, dtype: torch.dtype, in_blocks: bool = False
) -> Tensor:
    """Weights of the rows [T, 1], x [N, D] → [N, D] in `dtype`, which is also that of what lies between.

    `in_blocks`: a few experts at a time, so that all of theirs stays in a CPU's cache. It asks where their rows end; on
    a GPU that would be a wait.
    """
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
    whole = [(slice(0, len(routes.offsets)), slice(0, len(routes.tokens)))]
    rows = BLOCK // (x.shape[1] * dtype.itemsize)
    blocks = _blocks(ends(routes.offsets, len(routes.tokens)), rows) if in_blocks else whole
    return _ExpertFFN.apply(Experts(*plans, experts.act), blocks, dtype, x, weights, *routes, *tensors)


def _blocks(row_ends: list[int], rows: int) -> list[tuple[slice, slice]]:
    """Runs of experts with `rows` rows or a little more, and which rows are theirs."""
    blocks, expert, row = [], 0, 0
    for number, end in enumerate(row_ends, start=1):
        if end - row >= rows or number == len(row_ends):
            blocks.append((slice(expert, number), slice(row, end)))
            expert, row = number, end
    return blocks


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        experts: Experts,
        blocks: list[tuple[slice, slice]],
        dtype: torch.dtype,
        x: Tensor,
        weights: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        routes, kept = Routes(*tensors[: len(Routes._fields)]), []
        with torch.autocast(x.device.type, enabled=False):  # every product says what it computes in
            output = x.new_empty(len(routes.tokens), x.shape[1], dtype=dtype)
            for block in (_Block(experts, dtype, *at, tensors) for at in blocks):
                block.forward(x, weights, output)
                kept += block.kept
            output = F.embedding_bag(routes.back, output, mode="sum")
        ctx.experts, ctx.blocks, ctx.dtype, ctx.number_kept = experts, blocks, dtype, len(kept)
        ctx.save_for_backward(x, weights, *kept, *tensors)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, *tensors = ctx.saved_tensors
        kept, tensors = iter(tensors[: ctx.number_kept]), tensors[ctx.number_kept :]
        routes = Routes(*tensors[: len(Routes._fields)])
        with torch.autocast(x.device.type, enabled=False):
            d_rows = x.new_empty(len(routes.tokens), x.shape[1], dtype=ctx.dtype) if ctx.needs_input_grad[3] else None
            d_weights, gradients = torch.empty_like(weights), []
            for at in ctx.blocks:
                block = _Block(ctx.experts, ctx.dtype, *at, tensors, kept)
                block.backward(d_output, x, weights, d_rows, d_weights)
                gradients.append(block.gradients)
            d_x = None if d_rows is None else F.embedding_bag(routes.back, d_rows, mode="sum")
        by_matrix = zip(*gradients, strict=True)
        matrices = (parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts) for parts in by_matrix)
        return None, None, None, d_x, d_weights, *[None] * len(routes), *matrices


class _Block:
    """A run of experts, and their rows, in one pass."""

    def __init__(
        self,
        experts: Experts,
        dtype: torch.dtype,
        own: slice,
        rows: slice,
        tensors: Sequence[Tensor | None],
        kept: Iterator[Tensor | None] | None = None,
    ) -> None:
        routes, rest = Routes(*tensors[: len(Routes._fields)]), iter(tensors[len(Routes._fields) :])
        self.act, self.dtype, self.rows, self.tokens = experts.act, dtype, rows, routes.tokens[rows]
        self.gates, self.ups = (None, None) if kept is None else (next(kept), next(kept))
        self.parts = [_Part(projection, dtype, routes, own, rows.start, rest, kept) for projection in experts[:3]]

    @property
    def kept(self) -> list[Tensor | None]:
        return [self.gates, self.ups, *(tensor for part in self.parts for tensor in part.kept)]

    @property
    def gradients(self) -> list[Tensor | None]:
        return [gradient for part in self.parts for gradient in part.gradients]

    def forward(self, x: Tensor, weights: Tensor, output: Tensor) -> None:
        """Fills the block's rows of `output`."""
        gate, up, down = self.parts
        rows = x.to(self.dtype).index_select(0, self.tokens)
        self.gates, self.ups = gate.forward(rows), up.forward(rows)
        # Weighted here rather than after `down`, where there is more to multiply.
        output[self.rows] = down.forward((self.act(self.gates) * self.ups).mul_(weights[self.rows]))

    def backward(self, d_output: Tensor, x: Tensor, weights: Tensor, d_rows: Tensor | None, d_weights: Tensor) -> None:
        """Fills the block's rows of `d_rows` and `d_weights`; gradients of matrices are in `gradients` afterwards."""
        gate, up, down = self.parts
        weights, x_wanted = weights[self.rows], d_rows is not None
        d_output = d_output.to(self.dtype).index_select(0, self.tokens)
        activated = self.act(self.gates)
        gated = activated * self.ups
        d_gated = down.backward(d_output, (gated * weights).to(self.dtype) if down.trains else None)
        d_weights[self.rows] = (d_gated * gated).sum(-1, keepdim=True)
        d_gated.mul_(weights)
        d_ups = d_gated * activated
        d_gates = _through(self.act, self.gates, d_gated.mul_(self.ups))
        del d_output, gated, d_gated, activated
        rows = x.to(self.dtype).index_select(0, self.tokens) if gate.trains or up.trains else None
        of_gate, of_up = gate.backward(d_gates, rows, x_wanted), up.backward(d_ups, rows, x_wanted)
        if x_wanted:
            torch.add(of_gate, of_up, out=d_rows[self.rows])


def _through(act: Callable[[Tensor], Tensor], x: Tensor, d_output: Tensor) -> Tensor:
    """The gradient of an activation's input."""
    if isinstance(act, SiLUActivation):
        return torch.ops.aten.silu_backward(d_output, x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(act(leaf), leaf, d_output)[0]


class _Part:
    """One projection in one pass."""

    def __init__(
        self,
        projection: Projection,
        dtype: torch.dtype,
        routes: Routes,
        own: slice,
        first_row: int,
        tensors: Iterator[Tensor | None],
        kept: Iterator[Tensor | None] | None,
    ) -> None:
        self.projection, self.dtype, self.own = projection, dtype, own
        self.offsets, self.weight = routes.offsets[own] - first_row, _Matrices(next(tensors), own)
        per_expert = len(routes.fast_offsets) // len(routes.offsets)
        sets = slice(own.start * per_expert, own.stop * per_expert)  # of fast weights
        fast_offsets = routes.fast_offsets[sets] - first_row
        self.deltas = []
        for adapter in projection.adapters:
            which, offsets = (sets, fast_offsets) if adapter.per_sample else (own, self.offsets)
            down, up = _Matrices(next(tensors), which), _Matrices(next(tensors), which)
            self.deltas.append(_Delta(adapter, offsets, down, up))
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
        return self.weight.train or any(delta.down.train or delta.up.train for delta in self.deltas)

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
        if self.weight.train:
            self.d_weight = grouped_outer(own, x.to(own.dtype), self.offsets)
        for delta in self.deltas:
            delta.backward(d_output, x, d_x)
        return d_x

    def _weight(self) -> Tensor:
        weight = self.projection.weight()[self.own] if self.weight.values is None else self.weight.values
        return weight.to(self.projection.dtype)


class _Delta:
    """One adapter in one pass."""

    def __init__(self, adapter: Adapter, offsets: Tensor, down: _Matrices, up: _Matrices) -> None:
        self.adapter, self.offsets, self.down, self.up = adapter, offsets, down, up
        self.low: Tensor | None = None  #: scaling · down(x) [T, r]
        self.survivors: Tensor | None = None  #: of dropout [T, in] bool
        self.d_down: Tensor | None = None
        self.d_up: Tensor | None = None

    def add(self, x: Tensor, output: Tensor) -> None:
        """Add to the projection's output, in place."""
        x = x.to(self.adapter.dtype)
        if self.adapter.dropout > 0:
            x, self.survivors = torch.native_dropout(x, self.adapter.dropout, True)
        if self.down.values is not None:
            x = self.low = grouped_linear(x, self.down.values, self.offsets).mul_(self.adapter.scaling)
        output.add_(grouped_linear(x, self.up.values, self.offsets))

    def backward(self, d_output: Tensor, x: Tensor | None, d_x: Tensor | None) -> None:
        """The gradients of the matrices; what comes to that of x is added to it in place."""
        d_output = d_output.to(self.adapter.dtype)
        x = None if x is None else self._dropped(x.to(self.adapter.dtype))
        if self.down.values is None:
            first, d_first = self.up.values, d_output
        else:
            first, d_first = (
                self.down.values,
                grouped_linear(d_output, self.up.values.mT, self.offsets).mul_(self.adapter.scaling),
            )
            if self.down.train:
                self.d_down = grouped_outer(d_first, x, self.offsets)
        if self.up.train:
            self.d_up = grouped_outer(d_output, x if self.down.values is None else self.low, self.offsets)
        if d_x is not None:
            d_x.add_(self._dropped(grouped_linear(d_first, first.mT, self.offsets)))

    def _dropped(self, x: Tensor) -> Tensor:
        return x if self.survivors is None else x * self.survivors / (1 - self.adapter.dropout)


class _Matrices:
    """A block's own of what went in for all experts."""

    def __init__(self, given: Tensor | None, own: slice) -> None:
        self.values = None if given is None else given[own]
        self.train = given is not None and given.requires_grad
