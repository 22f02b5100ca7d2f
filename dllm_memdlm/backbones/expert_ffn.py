"""The feed-forward networks of all experts at once, forward and backward.

    y[t] = Σ over the experts e that token t is sent to of  w[t, e] · down_e(act(gate_e(x[t])) · up_e(x[t]))

Every projection is one grouped product over rows sorted by expert, and every adapter of one (the outer LoRA, the fast
weights) two thin ones; on a CPU a product for each expert. The backward pass is written out, so that next to nothing is
kept for it: what gate and up gave, and the low-rank products. Sorting the rows again, and the activation, cost little
beside the products.

What goes in `d_x` is the gradient of the loss by `x`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from ..grouped import Alone, AtOnce, InTurn, Matrices, ends
from .projection import Block, Projection, ProjectionPass


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
    x: Tensor, weights: Tensor, routes: Routes, experts: Experts, dtype: torch.dtype, in_turn: bool = False
) -> Tensor:
    """Weights of the rows [T, 1], x [N, D] → [N, D] in `dtype`, which is also that of what lies between.

    `in_turn`: expert after expert, their matrices one by one, so that all of an expert's rows stay in a CPU's cache. It
    asks where they end; on a GPU that would be a wait.
    """
    # Tensors go in one by one: autograd and its hooks see them nowhere else, and would not free them in time.
    tensors: list[Tensor] = []

    def put_in(matrices: Matrices) -> int | slice:
        tensors.extend([matrices] if isinstance(matrices, Tensor) else matrices)
        return len(tensors) - 1 if isinstance(matrices, Tensor) else slice(len(tensors) - len(matrices), len(tensors))

    places = Experts(*(projection.mapped(put_in) for projection in experts[:3]), experts.act)
    blocks = _one_by_one(routes) if in_turn else _whole(routes)
    return _ExpertFFN.apply(places, *blocks, dtype, x, weights, *routes, *tensors)


def _whole(routes: Routes) -> tuple[list[Block], list[int]]:
    return [Block(AtOnce(routes.offsets), AtOnce(routes.fast_offsets))], [len(routes.tokens)]


def _one_by_one(routes: Routes) -> tuple[list[Block], list[int]]:
    set_ends, sets = ends(routes.fast_offsets, len(routes.tokens)), len(routes.fast_offsets) // len(routes.offsets)
    blocks, sizes, first = [], [], 0
    for expert in range(len(routes.offsets)):
        own = range(expert * sets, (expert + 1) * sets)
        counted = [set_ends[number] - first for number in own]
        alone = Alone(expert)
        blocks.append(Block(alone, alone if sets == 1 else InTurn(own, counted)))
        sizes.append(counted[-1])
        first += counted[-1]
    return blocks, sizes


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        experts: Experts,
        blocks: list[Block],
        sizes: list[int],
        dtype: torch.dtype,
        x: Tensor,
        weights: Tensor,
        *rest: Tensor,
    ) -> Tensor:
        given, kept = _Pass(experts, dtype, x, weights, sizes, rest), []
        with torch.autocast(x.device.type, enabled=False):  # every product says what it computes in
            output, parts = given.rows()
            for number, block in enumerate(blocks):
                of_block, wanted_back = given.forward(number, block, parts[number])
                kept += wanted_back
            output = F.embedding_bag(given.routes.back, of_block if output is None else output, mode="sum")
        ctx.structure, ctx.blocks, ctx.number_kept = (experts, dtype), (blocks, sizes), len(kept)
        ctx.save_for_backward(x, weights, *kept, *rest)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, *rest = ctx.saved_tensors
        kept, rest = iter(rest[: ctx.number_kept]), rest[ctx.number_kept :]
        (experts, dtype), (blocks, sizes) = ctx.structure, ctx.blocks
        given, d_weights = _Pass(experts, dtype, x, weights, sizes, rest), torch.empty_like(weights)
        of_weights, wanted = d_weights.split(sizes), ctx.needs_input_grad[4]
        with torch.autocast(x.device.type, enabled=False):
            d_output = d_output.to(dtype)
            d_x, parts = given.rows() if wanted else (None, [None] * len(blocks))
            for number, block in enumerate(blocks):
                of_block = given.backward(number, block, kept, d_output, of_weights[number], parts[number], wanted)
            if wanted:
                d_x = F.embedding_bag(given.routes.back, of_block if d_x is None else d_x, mode="sum")
        return None, None, None, None, d_x, d_weights, *given.gradients(len(rest))


class _Pass:
    """Through all experts, forward or backward.

    Args:
        experts: with the places of their matrices among `rest` after the routes.
        dtype: of what lies between.
        x: [N, D].
        weights: of the rows [T, 1].
        sizes: rows of each block.
        rest: the routes, and the matrices.
    """

    def __init__(
        self,
        experts: Experts,
        dtype: torch.dtype,
        x: Tensor,
        weights: Tensor,
        sizes: list[int],
        rest: Sequence[Tensor],
    ) -> None:
        self.routes, tensors = Routes(*rest[: len(Routes._fields)]), rest[len(Routes._fields) :]
        self.act, self.dtype, self.x, self.sizes = experts.act, dtype, x.to(dtype), sizes
        self.tokens, self.weights = self.routes.tokens.split(sizes), weights.split(sizes)
        self.gate, self.up, self.down = (ProjectionPass(part, dtype, tensors) for part in experts[:3])

    def rows(self) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """A place for what goes into or comes out of each row [T, D], and its parts for each of several blocks."""
        if len(self.sizes) == 1:
            return None, [None]
        rows = self.x.new_empty(len(self.routes.tokens), self.x.shape[1])
        return rows, rows.split(self.sizes)

    def forward(self, number: int, block: Block, output: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
        """What comes out of a block [rows, D], in `output` if given, and what its backward pass wants to have back."""
        rows = self.x.index_select(0, self.tokens[number])
        gates, of_gate = self.gate.forward(rows, block)
        ups, of_up = self.up.forward(rows, block)
        # Weighted here rather than after `down`, where there is more to multiply.
        gated = (self.act(gates) * ups).mul_(self.weights[number])
        output, of_down = self.down.forward(gated, block, output)
        return output, [gates, ups, *of_gate, *of_up, *of_down]

    def backward(
        self,
        number: int,
        block: Block,
        kept: Iterator[Tensor | None],
        d_output: Tensor,
        d_weights: Tensor,
        d_x: Tensor | None,
        wanted: bool,
    ) -> Tensor | None:
        """The gradient of a block's input [rows, D] if wanted, in `d_x` if given; those of matrices are kept.

        Fills that of the weights [rows, 1].
        """
        gates, ups = next(kept), next(kept)
        of_gate, of_up, of_down = (
            [next(kept) for _ in range(2 * len(part.deltas))] for part in (self.gate, self.up, self.down)
        )
        tokens, weights = self.tokens[number], self.weights[number]
        activated = self.act(gates)
        gated = activated * ups
        went_down = (gated * weights).to(self.dtype) if self.down.trains else None
        d_gated = self.down.backward(d_output.index_select(0, tokens), went_down, block, of_down)
        d_weights.copy_((d_gated * gated).sum(-1, keepdim=True))
        d_gated.mul_(weights)
        d_ups = d_gated * activated
        d_gates = _through(self.act, gates, d_gated.mul_(ups))
        del gated, went_down, d_gated, activated
        rows = self.x.index_select(0, tokens) if self.gate.trains or self.up.trains else None
        d_x = self.gate.backward(d_gates, rows, block, of_gate, d_x, wanted=wanted)
        return self.up.backward(d_ups, rows, block, of_up, d_x, add=True, wanted=wanted)

    def gradients(self, number: int) -> list[Tensor | None]:
        """Of all that came as `rest`."""
        of_matrices: list[Tensor | None] = [None] * (number - len(self.routes))
        for part in (self.gate, self.up, self.down):
            part.give_gradients(of_matrices)
        return [*[None] * len(self.routes), *of_matrices]


def _through(act: Callable[[Tensor], Tensor], x: Tensor, d_output: Tensor) -> Tensor:
    """The gradient of an activation's input."""
    if isinstance(act, SiLUActivation):
        return torch.ops.aten.silu_backward(d_output, x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(act(leaf), leaf, d_output)[0]
