"""One projection of all experts: the product with their own weights, and what adapts it, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..grouped import Alone, AtOnce, InTurn, Matrices


@dataclass(frozen=True)
class Adapter:
    """What is added to a projection's output: scaling · up(down(dropout(x))), or up(x)."""

    down: Matrices | None  #: [r, in]
    up: Matrices | None  #: [out, r], or [out, in]
    scaling: float
    dtype: torch.dtype  #: it computes in
    per_sample: bool = False  #: a matrix for each expert and sample, rather than for each expert
    dropout: float = 0.0


@dataclass(frozen=True)
class Projection:
    """One of gate, up and down, of all experts."""

    weight: Matrices  #: [out, in]; where they are packed in 4 bit what unpacks them, which the backward pass does again
    dtype: torch.dtype  #: the product with it computes in
    adapters: Sequence[Adapter] = ()

    def under(self, adapter: Adapter) -> Projection:
        """With one adapter more."""
        return replace(self, adapters=[*self.adapters, adapter])

    def mapped(self, function: Callable[[Matrices], Any]) -> Projection:
        """With something else for all matrices."""
        adapters = [
            replace(one, down=None if one.down is None else function(one.down), up=function(one.up))
            for one in self.adapters
        ]
        return replace(self, weight=self.weight if callable(self.weight) else function(self.weight), adapters=adapters)

    def detached(self) -> Projection:
        """As a constant."""
        return self.mapped(lambda one: one.detach() if isinstance(one, Tensor) else [part.detach() for part in one])


class Block(NamedTuple):
    """Products over the rows of all experts, or of one alone."""

    of_expert: AtOnce | Alone
    of_set: AtOnce | Alone | InTurn  #: with fast weights, one set for each expert and sample


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

    def forward(self, x: Tensor, block: Block, out: Tensor | None = None) -> tuple[Tensor, list[Tensor | None]]:
        """x [T, in] → [T, out], in `out` if given, and what the backward pass wants to have back."""
        kept: list[Tensor | None] = []
        output = block.of_expert.linear(_cast(x, self.computes_in), self.weight.values, out)
        if out is None:
            output = _cast(output, self.dtype)
        for delta in self.deltas:
            kept += delta.add(x, block, output)
        return output, kept

    def backward(
        self,
        d_output: Tensor,
        x: Tensor | None,
        block: Block,
        kept: Sequence[Tensor | None],
        d_x: Tensor | None = None,
        add: bool = False,
        wanted: bool = True,
    ) -> Tensor | None:
        """The gradient of x [T, in] if wanted, in `d_x` if given, or added to it; those of matrices are kept."""
        own = _cast(d_output, self.computes_in)
        if wanted:
            product = block.of_expert.linear_back(own, self.weight.values, d_x, add)
            d_x = _cast(product, self.dtype) if d_x is None else d_x
        if self.weight.trains:
            self.weight.gradients.append(block.of_expert.outer(own, _cast(x, own.dtype)))
        for number, delta in enumerate(self.deltas):
            delta.backward(d_output, x, block, kept[2 * number], kept[2 * number + 1], d_x)
        return d_x

    def give_gradients(self, gradients: list[Tensor | None]) -> None:
        """Put those of its matrices in the places of the matrices."""
        for matrices in (self.weight, *(part for delta in self.deltas for part in (delta.down, delta.up))):
            matrices.give_gradients(gradients)


class _Delta:
    """One adapter in one pass."""

    def __init__(self, adapter: Adapter, tensors: Sequence[Tensor]) -> None:
        self.scaling, self.dtype, self.dropout = adapter.scaling, adapter.dtype, adapter.dropout
        self.per_sample = adapter.per_sample
        self.down, self.up = _Placed(adapter.down, tensors), _Placed(adapter.up, tensors)

    def add(self, x: Tensor, block: Block, output: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Add to the projection's output, in place. Returns scaling · down(x) [T, r], and what survived dropout."""
        products = block.of_set if self.per_sample else block.of_expert
        x, low, survivors = _cast(x, self.dtype), None, None
        if self.dropout > 0:
            x, survivors = torch.native_dropout(x, self.dropout, True)
        if self.down.values is not None:
            x = low = products.linear(x, self.down.values).mul_(self.scaling)
        products.linear(x, self.up.values, output, add=True)
        return low, survivors

    def backward(
        self,
        d_output: Tensor,
        x: Tensor | None,
        block: Block,
        low: Tensor | None,
        survivors: Tensor | None,
        d_x: Tensor | None,
    ) -> None:
        """The gradients of the matrices; what comes to that of x is added to it in place."""
        products = block.of_set if self.per_sample else block.of_expert
        d_output = _cast(d_output, self.dtype)
        x = None if x is None else self._dropped(_cast(x, self.dtype), survivors)
        first, d_first = self.up.values, d_output
        if low is not None:
            first, d_first = self.down.values, products.linear_back(d_output, first).mul_(self.scaling)
            if self.down.trains:
                self.down.gradients.append(products.outer(d_first, x))
        if self.up.trains:
            self.up.gradients.append(products.outer(d_output, x if low is None else low))
        if d_x is not None and survivors is None:
            products.linear_back(d_first, first, d_x, add=True)
        elif d_x is not None:
            d_x.add_(self._dropped(products.linear_back(d_first, first), survivors))

    def _dropped(self, x: Tensor, survivors: Tensor | None) -> Tensor:
        return x if survivors is None else x * survivors / (1 - self.dropout)


class _Placed:
    """Matrices that went in with others, and their gradients, block after block."""

    def __init__(self, place: int | slice | Callable | None, tensors: Sequence[Tensor]) -> None:
        self.place = place
        self.values: Matrices | None = tensors[place] if isinstance(place, int | slice) else place
        given = tensors[place] if isinstance(place, slice) else [self.values] if isinstance(place, int) else []
        self.trains = any(matrix.requires_grad for matrix in given)
        self.gradients: list[Tensor] = []

    def give_gradients(self, gradients: list[Tensor | None]) -> None:
        if isinstance(self.place, int) and self.gradients:
            gradients[self.place] = self.gradients[0] if len(self.gradients) == 1 else torch.cat(self.gradients)
        elif self.gradients:
            gradients[self.place] = [matrix for part in self.gradients for matrix in part]


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # without a call in the usual case: there is one for every expert
