"""The feed-forward networks of all experts at once, forward and backward.

    y[t] = Σ over the experts e that token t is sent to of  w[t, e] · down_e(act(gate_e(x[t])) · up_e(x[t]))

Each of gate, up and down is a sum of terms: its own weights, and what adapts it (the outer LoRA, the fast weights). A
term is one or two grouped products over rows sorted by expert, or batched ones if the rows are padded. The backward
pass is written out: autograd would keep every row of every step in between. This keeps what gate and up gave, and the
low-rank products; to sort the rows again, and the activation, cost little beside the products.

`d_x` is the gradient of the loss by `x`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from .grouped import grouped_linear, grouped_outer
from .routes import Routes


class Term(NamedTuple):
    """A summand of a projection's output: scaling · up(down(dropout(x))), or up(x).

    G is the number of experts, or of experts times samples.
    """

    dtype: torch.dtype  #: it computes in
    up: Tensor | None  #: [G, out, r], or [G, out, in] without `down`
    down: Tensor | None = None  #: [G, r, in]
    scaling: float = 1.0  #: 1 without `down`
    dropout: float = 0.0
    per_sample: bool = False  #: whether there is a matrix for each expert and sample
    unpack: Any = None  #: () → `up` where it is packed in 4 bit; the backward pass asks again


Projections = Sequence[list[Term]]  #: gate, up and down, the own weights first in each


def expert_ffn(
    x: Tensor, weights: Tensor, routes: Routes, projections: Projections, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """x [N, D], weights of each token's experts [N, k] → [N, D]. All between is in the dtype of x, too."""
    # Matrices go in one by one: autograd and its hooks see them nowhere else, and would not free them in time.
    matrices = [matrix for terms in projections for term in terms for matrix in (term.up, term.down)]
    without = [[term._replace(up=None, down=None) for term in terms] for terms in projections]
    return _ExpertFFN.apply((without, act), x, weights, *routes, *matrices)


def _together(without: Projections, given: Sequence[Any]) -> tuple[Routes, Projections]:
    routes, matrices = Routes(*given[: len(Routes._fields)]), iter(given[len(Routes._fields) :])
    return routes, [[t._replace(up=next(matrices), down=next(matrices)) for t in terms] for terms in without]


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, structure: tuple, x: Tensor, weights: Tensor, *given: Tensor | None) -> Tensor:
        without, act = structure
        routes, (gate, up, down) = _together(without, given)
        with torch.autocast(x.device.type, enabled=False):  # every product says what it computes in
            rows = x.index_select(0, routes.tokens)
            gates, of_gate = _project(gate, rows, routes)
            ups, of_up = _project(up, rows, routes)
            del rows
            output, of_down = _project(down, act(gates) * ups, routes)
            output = _summed(output, routes, weights.to(output.dtype))
        kept = [gates, ups, *of_gate, *of_up, *of_down]
        ctx.structure, ctx.kept = structure, len(kept)
        ctx.save_for_backward(x, weights, *kept, *given)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        (without, act), wanted = ctx.structure, ctx.needs_input_grad[1]
        x, weights, gates, ups, *saved = ctx.saved_tensors
        kept, given = saved[: ctx.kept - 2], saved[ctx.kept - 2 :]
        routes, (gate, up, down) = _together(without, given)
        of_gate, of_up = kept[: 2 * len(gate)], kept[2 * len(gate) : 2 * len(gate + up)]
        with torch.autocast(x.device.type, enabled=False):
            row_weights = routes.weights(weights).to(x.dtype)
            activated = act(gates)
            gated = activated * ups
            d_rows = d_output.index_select(0, routes.tokens)
            d_gated, of_down = _backward(down, kept[2 * len(gate + up) :], d_rows, gated, routes, True, row_weights)
            d_weights = (d_gated * gated).sum(-1)[routes.back].to(weights.dtype)
            d_gated.mul_(row_weights)
            d_ups = d_gated * activated
            d_gates = _through(act, gates, d_gated.mul_(ups))
            del d_rows, gated, d_gated, activated
            trains = any(m is not None and m.requires_grad for term in (*gate, *up) for m in (term.up, term.down))
            rows = x.index_select(0, routes.tokens) if trains else None
            d_x, of_gate = _backward(gate, of_gate, d_gates, rows, routes, wanted)
            more, of_up = _backward(up, of_up, d_ups, rows, routes, wanted)
            d_x = _summed(d_x.add_(more), routes) if wanted else None
        return None, d_x, d_weights, *[None] * len(routes), *of_gate, *of_up, *of_down


def _project(terms: Sequence[Term], x: Tensor, routes: Routes) -> tuple[Tensor, list[Tensor | None]]:
    """x [T, in] → [T, out], and two tensors a term for the backward pass: down(x) [T, r], and what survived dropout."""
    output: Any = None
    kept: list[Tensor | None] = []
    for term in terms:
        given, offsets, low, survivors = x.to(term.dtype), routes.ends(term.per_sample), None, None
        if term.dropout > 0:
            given, survivors = _drop(given, term.dropout, routes)
        if term.down is not None:
            given = low = grouped_linear(given, term.down, offsets)
        part = grouped_linear(given, term.unpack() if term.up is None else term.up, offsets)
        output = part.to(x.dtype) if output is None else output.add_(part, alpha=term.scaling)
        kept += [low, survivors]
    return output, kept


def _backward(
    terms: Sequence[Term],
    kept: Sequence[Any],
    d_output: Tensor,
    x: Any,
    routes: Routes,
    wanted: bool,
    weights: Tensor | None = None,
) -> tuple[Any, list[Tensor | None]]:
    """The gradient of x [T, in] if wanted, and those of `up` and `down` of each term.

    `weights` [T, 1] are what the outputs are multiplied by afterwards, if they are: d_output and the gradient of x are
    without them.
    """
    d_x: Any = None
    gradients: list[Tensor | None] = []
    for term, low, survivors in zip(terms, kept[::2], kept[1::2], strict=True):
        offsets, d_up, d_down = routes.ends(term.per_sample), None, None
        first, d_first = term.up, d_output.to(term.dtype)
        if first is not None and term.down is not None:
            if first.requires_grad:
                d_up = _outer(d_first, low * term.scaling, offsets, weights, len(first))
            first, d_first = term.down, grouped_linear(d_first, first.mT, offsets).mul_(term.scaling)
        if first is not None and first.requires_grad:
            gradient = _outer(d_first, _kept_of(x.to(term.dtype), survivors, term), offsets, weights, len(first))
            d_up, d_down = (gradient, None) if term.down is None else (d_up, gradient)
        if wanted:
            through = grouped_linear(d_first, (term.unpack() if first is None else first).mT, offsets)
            if d_x is None:
                d_x = through.to(d_output.dtype)
            elif survivors is None:
                d_x += through
            else:  # dropout's backward pass and the sum in one
                d_x.addcmul_(through, survivors, value=1 / (1 - term.dropout))
        gradients += [d_up, d_down]
    return d_x, gradients


def _drop(x: Tensor, probability: float, routes: Routes) -> tuple[Tensor, Tensor]:
    """Dropout, and what survived. Fillers draw nothing: the numbers are those of rows without them."""
    if routes.places is None:
        return torch.native_dropout(x, probability, True)
    drawn = torch.empty_like(x[: len(routes.places)], dtype=torch.bool).bernoulli_(1 - probability)
    survivors = torch.zeros_like(x, dtype=torch.bool).index_copy_(0, routes.places, drawn)
    return torch.ops.aten.native_dropout_backward(x, survivors, 1 / (1 - probability)), survivors


def _kept_of(x: Tensor, survivors: Tensor | None, term: Term) -> Tensor:
    if survivors is None:
        return x
    return torch.ops.aten.native_dropout_backward(x, survivors, 1 / (1 - term.dropout))


def _outer(d_output: Tensor, x: Tensor, offsets: Tensor | None, weights: Tensor | None, groups: int) -> Tensor:
    """`grouped_outer`, each row by its weight [T, 1] if given."""
    if weights is not None and d_output.shape[1] < x.shape[1]:  # there is less to multiply
        d_output = d_output * weights.to(d_output.dtype)
    elif weights is not None:
        x = x * weights.to(x.dtype)
    return grouped_outer(d_output, x, offsets, groups)


def _summed(rows: Tensor, routes: Routes, weights: Tensor | None = None) -> Tensor:
    """Over the rows of each token, by its weights if given [T, D] → [N, D]."""
    return F.embedding_bag(routes.back, rows, mode="sum", per_sample_weights=weights)


def _through(act: Callable[[Tensor], Tensor], x: Tensor, d_output: Tensor) -> Tensor:
    """The gradient of an activation's input."""
    if isinstance(act, SiLUActivation):
        return torch.ops.aten.silu_backward(d_output, x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(act(leaf), leaf, d_output)[0]
