"""One projection of all experts: the product with their own weights, and what adapts it, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .grouped import grouped_linear, grouped_outer
from .routes import Routes


@dataclass(frozen=True)
class Adapter:
    """What is added to a projection's output: scaling · up(down(dropout(x))), or up(x) with a scaling of 1.

    G is E, or E·S per sample.
    """

    down: Tensor | None  #: [G, r, in]
    up: Tensor  #: [G, out, r], or [G, out, in]
    scaling: float
    dtype: torch.dtype  #: it computes in
    per_sample: bool = False  #: a matrix for each expert and sample, rather than for each expert
    dropout: float = 0.0


@dataclass(frozen=True)
class Projection:
    """One of gate, up and down, of all experts."""

    #: [E, out, in]; where they are packed in 4 bit what unpacks them, which the backward pass does again.
    weight: Tensor | Callable[[], Tensor]
    dtype: torch.dtype  #: the product with it computes in
    adapters: Sequence[Adapter] = ()

    def under(self, adapter: Adapter) -> Projection:
        """With one adapter more."""
        return replace(self, adapters=[*self.adapters, adapter])

    def mapped(self, function: Callable[[Tensor], Any]) -> Projection:
        """With something else for all matrices that are there."""
        adapters = [
            replace(one, down=None if one.down is None else function(one.down), up=function(one.up))
            for one in self.adapters
        ]
        return replace(self, weight=self.weight if callable(self.weight) else function(self.weight), adapters=adapters)

    def detached(self) -> Projection:
        """As a constant."""
        return self.mapped(torch.Tensor.detach)


class ProjectionPass:
    """One projection in one pass, forward or backward.

    Args:
        projection: with the places of its matrices in `tensors` instead of them.
        dtype: of what goes in and comes out.
        tensors: of all projections.
    """

    def __init__(self, projection: Projection, dtype: torch.dtype, tensors: Sequence[Tensor]) -> None:
        self.computes_in, self.dtype = projection.dtype, dtype
        self.weight = _Placed(projection.weight, tensors)
        self.deltas = [_Delta(adapter, tensors) for adapter in projection.adapters]
        #: Whether a gradient of any of its matrices is wanted, which takes its inputs.
        self.trains = self.weight.trains or any(delta.down.trains or delta.up.trains for delta in self.deltas)

    def forward(self, x: Tensor, routes: Routes) -> tuple[Tensor, list[Tensor | None]]:
        """x [T, in] → [T, out], and what the backward pass wants to have back."""
        kept: list[Tensor | None] = []
        output = grouped_linear(x.to(self.computes_in), self.weight.values, routes.offsets).to(self.dtype)
        for delta in self.deltas:
            kept += delta.add(x, routes, output)
        return output, kept

    def backward(
        self,
        d_output: Tensor,
        x: Tensor | None,
        routes: Routes,
        kept: Sequence[Tensor | None],
        wanted: bool = True,
        weights: Tensor | None = None,
    ) -> Tensor | None:
        """The gradient of x [T, in] if wanted; those of matrices are kept.

        `weights` [T, 1] are what the outputs are multiplied by afterwards, if they are: d_output and the gradient of x
        are without them.
        """
        own = d_output.to(self.computes_in)
        d_x = grouped_linear(own, self.weight.values.mT, routes.offsets).to(self.dtype) if wanted else None
        if self.weight.trains:
            self.weight.gradient = _outer(own, x.to(own.dtype), routes.offsets, weights, len(self.weight.values))
        for number, delta in enumerate(self.deltas):
            delta.backward(d_output, x, routes, kept[2 * number], kept[2 * number + 1], d_x, weights)
        return d_x

    def give_gradients(self, gradients: list[Tensor | None]) -> None:
        """Put those of its matrices in the places of the matrices."""
        for matrices in (self.weight, *(part for delta in self.deltas for part in (delta.down, delta.up))):
            if matrices.trains:
                gradients[matrices.place] = matrices.gradient


class _Delta:
    """One adapter in one pass."""

    def __init__(self, adapter: Adapter, tensors: Sequence[Tensor]) -> None:
        self.scaling, self.dtype, self.dropout = adapter.scaling, adapter.dtype, adapter.dropout
        self.per_sample = adapter.per_sample
        self.down, self.up = _Placed(adapter.down, tensors), _Placed(adapter.up, tensors)

    def add(self, x: Tensor, routes: Routes, output: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Add to the projection's output, in place. Returns down(x) [T, r], and what survived dropout."""
        offsets = self._offsets(routes)
        x, low, survivors = x.to(self.dtype), None, None
        if self.dropout > 0:
            x, survivors = self._drop(x, routes)
        if self.down.values is not None:
            x = low = grouped_linear(x, self.down.values, offsets)
        output.add_(grouped_linear(x, self.up.values, offsets), alpha=self.scaling)
        return low, survivors

    def backward(
        self,
        d_output: Tensor,
        x: Tensor | None,
        routes: Routes,
        low: Tensor | None,
        survivors: Tensor | None,
        d_x: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        """The gradients of the matrices are kept; what comes to that of x is added to it in place."""
        offsets = self._offsets(routes)
        d_output = d_output.to(self.dtype)
        first, d_first = self.up.values, d_output
        if low is not None:
            first, d_first = self.down.values, grouped_linear(d_output, first.mT, offsets).mul_(self.scaling)
        if self.down.trains:
            dropped = self._dropped(x.to(self.dtype), survivors)
            self.down.gradient = _outer(d_first, dropped, offsets, weights, len(first))
        if self.up.trains:
            given = self._dropped(x.to(self.dtype), survivors) if low is None else low * self.scaling
            self.up.gradient = _outer(d_output, given, offsets, weights, len(first))
        if d_x is not None:
            through = grouped_linear(d_first, first.mT, offsets)
            if survivors is None:
                d_x += through
            else:  # dropout's backward pass and the sum in one
                d_x.addcmul_(through, survivors, value=1 / (1 - self.dropout))

    def _offsets(self, routes: Routes) -> Tensor | None:
        return routes.fast_offsets if self.per_sample else routes.offsets

    def _drop(self, x: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
        """Dropout, and what survived. Fillers draw nothing: the numbers are those of rows without them."""
        if routes.places is None:
            return torch.native_dropout(x, self.dropout, True)
        drawn = torch.empty_like(x[: len(routes.places)], dtype=torch.bool).bernoulli_(1 - self.dropout)
        survivors = torch.zeros_like(x, dtype=torch.bool).index_copy_(0, routes.places, drawn)
        return self._dropped(x, survivors), survivors

    def _dropped(self, x: Tensor, survivors: Tensor | None) -> Tensor:
        if survivors is None:
            return x
        return torch.ops.aten.native_dropout_backward(x, survivors, 1 / (1 - self.dropout))


class _Placed:
    """Matrices that went in with others, by their place, and their gradient."""

    def __init__(self, place: int | Callable[[], Tensor] | None, tensors: Sequence[Tensor]) -> None:
        self.place = place
        self.given = tensors[place] if isinstance(place, int) else None
        self.trains = self.given is not None and self.given.requires_grad
        self.gradient: Tensor | None = None

    @property
    def values(self) -> Tensor | None:
        return self.place() if callable(self.place) else self.given


def _outer(d_output: Tensor, x: Tensor, offsets: Tensor | None, weights: Tensor | None, groups: int) -> Tensor:
    """`grouped_outer`, each row by its weight [T, 1] if given."""
    if weights is not None and d_output.shape[1] < x.shape[1]:  # there is less to multiply
        d_output = d_output * weights.to(d_output.dtype)
    elif weights is not None:
        x = x * weights.to(x.dtype)
    return grouped_outer(d_output, x, offsets, groups)
