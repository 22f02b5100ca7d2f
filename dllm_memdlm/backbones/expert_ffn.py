"""The feed-forward networks of all experts at once, forward and backward.

    y[t] = Σ over the experts e that token t is sent to of  w[t, e] · down_e(act(gate_e(x[t])) · up_e(x[t]))

Every projection is one grouped product over rows sorted by expert, and every adapter of one (the outer LoRA, the fast
weights) two thin ones. The backward pass is written out, so that next to nothing is kept for it: what gate and up gave,
and the low-rank products. Sorting the rows again, and the activation, cost little beside the products.

What goes in `d_x` is the gradient of the loss by `x`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from ..grouped import ends
from .projection import Projection, ProjectionPass

#: What a block of rows takes, in bytes.
BLOCK = 2**20


class Routes(NamedTuple):
    """T rows, one for each of its k experts of each of N tokens, sorted by expert, and within an expert by sample."""

    order: Tensor  #: which of the N·k (token, choice) pairs stands in each row [T]
    tokens: Tensor  #: and which token [T]
    back: Tensor  #: the rows of each token [N, k]
    offsets: Tensor  #: where each expert's rows end [E] int32
    fast_offsets: Tensor  #: where each (expert, sample)'s rows end [E·S] int32


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
            output, narrow = x.new_empty(len(routes.tokens), x.shape[1], dtype=dtype), x.to(dtype)
            for block in (_Block(experts, dtype, *at, tensors) for at in blocks):
                block.forward(narrow, weights, output)
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
            x, d_output = x.to(ctx.dtype), d_output.to(ctx.dtype)
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
        self.parts = [
            ProjectionPass(projection, dtype, routes.offsets, routes.fast_offsets, own, rows.start, rest, kept)
            for projection in experts[:3]
        ]

    @property
    def kept(self) -> list[Tensor | None]:
        return [self.gates, self.ups, *(tensor for part in self.parts for tensor in part.kept)]

    @property
    def gradients(self) -> list[Tensor | None]:
        return [gradient for part in self.parts for gradient in part.gradients]

    def forward(self, x: Tensor, weights: Tensor, output: Tensor) -> None:
        """Fills the block's rows of `output`."""
        gate, up, down = self.parts
        rows = x.index_select(0, self.tokens)
        self.gates, self.ups = gate.forward(rows), up.forward(rows)
        # Weighted here rather than after `down`, where there is more to multiply.
        output[self.rows] = down.forward((self.act(self.gates) * self.ups).mul_(weights[self.rows]))

    def backward(self, d_output: Tensor, x: Tensor, weights: Tensor, d_rows: Tensor | None, d_weights: Tensor) -> None:
        """Fills the block's rows of `d_rows` and `d_weights`; gradients of matrices are in `gradients` afterwards."""
        gate, up, down = self.parts
        weights, x_wanted = weights[self.rows], d_rows is not None
        d_output = d_output.index_select(0, self.tokens)
        activated = self.act(self.gates)
        gated = activated * self.ups
        d_gated = down.backward(d_output, (gated * weights).to(self.dtype) if down.trains else None)
        d_weights[self.rows] = (d_gated * gated).sum(-1, keepdim=True)
        d_gated.mul_(weights)
        d_ups = d_gated * activated
        d_gates = _through(self.act, self.gates, d_gated.mul_(self.ups))
        del d_output, gated, d_gated, activated
        rows = x.index_select(0, self.tokens) if gate.trains or up.trains else None
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
