"""One projection of all experts: the product with their own weights, and what adapts it, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..grouped import grouped_linear, grouped_outer


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


class ProjectionPass:
    """One projection in one pass, for a run of experts.

    Args:
        projection: whose tensors have been taken out.
        dtype: of what goes in and comes out.
        offsets: where the rows of each of all experts end [E].
        fast_offsets: and of each expert and sample [E·S].
        own: the run of experts.
        first_row: of the run.
        tensors: gives those of the projection, for all experts, next.
        kept: gives what the forward pass has kept, next; none in the forward pass itself.
    """

    def __init__(
        self,
        projection: Projection,
        dtype: torch.dtype,
        offsets: Tensor,
        fast_offsets: Tensor,
        own: slice,
        first_row: int,
        tensors: Iterator[Tensor | None],
        kept: Iterator[Tensor | None] | None,
    ) -> None:
        self.projection, self.dtype, self.own = projection, dtype, own
        self.offsets, self.weight = offsets[own] - first_row, _Matrices(next(tensors), own)
        per_expert = len(fast_offsets) // len(offsets)
        sets = slice(own.start * per_expert, own.stop * per_expert)  # of fast weights
        own_fast_offsets = fast_offsets[sets] - first_row
        self.deltas = []
        for adapter in projection.adapters:
            which, its = (sets, own_fast_offsets) if adapter.per_sample else (own, self.offsets)
            down, up = _Matrices(next(tensors), which), _Matrices(next(tensors), which)
            self.deltas.append(_Delta(adapter, its, down, up))
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
            first, d_first = self.down.values, grouped_linear(d_output, self.up.values.mT, self.offsets)
            d_first.mul_(self.adapter.scaling)
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
