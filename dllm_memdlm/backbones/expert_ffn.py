"""The feed-forward networks of all experts at once, forward and backward.

    y[t] = Σ over the experts e that token t is sent to of  w[t, e] · down_e(act(gate_e(x[t])) · up_e(x[t]))

Every projection is one grouped product over rows sorted by expert (one batched product if they are padded), and every
adapter of one (the outer LoRA, the fast weights) two thin ones. The backward pass is written out, so that next to
nothing is kept for it: what gate and up gave, and the low-rank products. Sorting the rows again, and the activation,
cost little beside the products.

What goes in `d_x` is the gradient of the loss by `x`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from .projection import Projection, ProjectionPass
from .routes import Routes


class Experts(NamedTuple):
    """What all experts are made of."""

    gate: Projection
    up: Projection
    down: Projection
    act: Callable[[Tensor], Tensor]


def expert_ffn(x: Tensor, weights: Tensor, routes: Routes, experts: Experts, dtype: torch.dtype) -> Tensor:
    """x [N, D], weights of each token's experts [N, k] → [N, D] in `dtype`, which is also that of what lies between."""
    # Tensors go in one by one: autograd and its hooks see them nowhere else, and would not free them in time.
    tensors: list[Tensor] = []

    def put_in(matrices: Tensor) -> int:
        tensors.append(matrices)
        return len(tensors) - 1

    places = Experts(*(projection.mapped(put_in) for projection in experts[:3]), experts.act)
    return _ExpertFFN.apply(places, dtype, x, weights, *routes, *tensors)


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, experts: Experts, dtype: torch.dtype, x: Tensor, weights: Tensor, *rest: Tensor | None
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # every product says what it computes in
            output, kept = _Pass(experts, dtype, x, weights, rest).forward()
        ctx.structure, ctx.number_kept = (experts, dtype), len(kept)
        ctx.save_for_backward(x, weights, *kept, *rest)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, *rest = ctx.saved_tensors
        kept, rest = rest[: ctx.number_kept], rest[ctx.number_kept :]
        with torch.autocast(x.device.type, enabled=False):
            gradients = _Pass(*ctx.structure, x, weights, rest).backward(d_output, kept, ctx.needs_input_grad[2])
        return None, None, *gradients


class _Pass:
    """Through all experts, forward or backward.

    Args:
        experts: with the places of their matrices among `rest` after the routes.
        dtype: of what lies between.
        x: [N, D].
        weights: [N, k].
        rest: the routes, and the matrices.
    """

    def __init__(
        self, experts: Experts, dtype: torch.dtype, x: Tensor, weights: Tensor, rest: Sequence[Tensor | None]
    ) -> None:
        self.routes, tensors = Routes(*rest[: len(Routes._fields)]), rest[len(Routes._fields) :]
        self.act, self.dtype, self.x, self.weights = experts.act, dtype, x.to(dtype), weights
        self.gate, self.up, self.down = (ProjectionPass(part, dtype, tensors) for part in experts[:3])
        self.number = len(rest)

    def forward(self) -> tuple[Tensor, list[Tensor | None]]:
        """What comes out [N, D], and what the backward pass wants to have back."""
        rows = self.x.index_select(0, self.routes.tokens)
        gates, of_gate = self.gate.forward(rows, self.routes)
        ups, of_up = self.up.forward(rows, self.routes)
        del rows
        output, of_down = self.down.forward(self.act(gates) * ups, self.routes)
        return self._summed(output, self.weights), [gates, ups, *of_gate, *of_up, *of_down]

    def backward(self, d_output: Tensor, kept: Sequence[Tensor | None], wanted: bool) -> tuple[Tensor | None, ...]:
        """The gradients of the input [N, D] if wanted, of the weights [N, k], and of all that came as `rest`."""
        gates, ups, *kept = kept
        first, second = 2 * len(self.gate.deltas), 2 * (len(self.gate.deltas) + len(self.up.deltas))
        weights = self.routes.weights(self.weights).to(self.dtype)
        activated = self.act(gates)
        gated = activated * ups
        d_rows = d_output.to(self.dtype).index_select(0, self.routes.tokens)
        d_gated = self.down.backward(d_rows, gated, self.routes, kept[second:], weights=weights)
        d_weights = (d_gated * gated).sum(-1)[self.routes.back].to(self.weights.dtype)
        d_gated.mul_(weights)
        d_ups = d_gated * activated
        d_gates = _through(self.act, gates, d_gated.mul_(ups))
        del d_rows, gated, d_gated, activated
        rows = self.x.index_select(0, self.routes.tokens) if self.gate.trains or self.up.trains else None
        d_x = self.gate.backward(d_gates, rows, self.routes, kept[:first], wanted)
        of_up = self.up.backward(d_ups, rows, self.routes, kept[first:second], wanted)
        gradients: list[Tensor | None] = [None] * (self.number - len(self.routes))
        for part in (self.gate, self.up, self.down):
            part.give_gradients(gradients)
        return self._summed(d_x.add_(of_up)) if wanted else None, d_weights, *[None] * len(self.routes), *gradients

    def _summed(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Over the rows of each token, by its weights if given [T, D] → [N, D]."""
        weights = None if weights is None else weights.to(rows.dtype)
        return F.embedding_bag(self.routes.back, rows, mode="sum", per_sample_weights=weights)


def _through(act: Callable[[Tensor], Tensor], x: Tensor, d_output: Tensor) -> Tensor:
    """The gradient of an activation's input."""
    if isinstance(act, SiLUActivation):
        return torch.ops.aten.silu_backward(d_output, x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(act(leaf), leaf, d_output)[0]
