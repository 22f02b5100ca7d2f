"""Matrix products over rows sorted by group: the arithmetic of routed experts, and of their fast weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

#: Of every group [out, in]: in one tensor [G, out, in]; one by one; or made when called with a number, all with None.
Matrices = Tensor | Sequence[Tensor] | Callable[[int | None], Tensor]

#: CUDA's kernel takes fewer than 1,024 groups. Fast weights have as many as experts times samples.
MAX_GROUPS = 1023

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """y[t] = weight[g] @ x[t], g the group of row t.

    Args:
        x: rows sorted by group [T, in].
        weight: one matrix a group [G, out, in], used in the dtype of x.
        offsets: where each group's rows end [G] int32, the last being T.

    Returns:
        [T, out], in the dtype of x.
    """
    weight = weight.to(x.dtype)
    if _kernel_takes(x.dtype, *weight.shape[1:]):
        return F.grouped_mm(x, weight.mT, offs=offsets)
    return grouped_linear_loop(x, weight, offsets)


def grouped_linear_loop(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The same, one product a group: for the dtypes and widths that the kernel does not take."""
    return torch.cat([F.linear(rows, matrix) for rows, matrix in zip(split(x, offsets), weight, strict=True)])


def grouped_outer(y: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """Σ over the rows of a group of y[t] x[t]ᵀ: how a loss moves the group's matrix, if it moves its outputs by y.

    y [T, out], x [T, in], both of one dtype and sorted by group → [G, out, in]. Zeros for a group without rows.
    """
    if _kernel_takes(x.dtype, y.shape[1], x.shape[1]):
        return F.grouped_mm(y.T, x, offs=offsets)
    return torch.stack([a.T @ b for a, b in zip(split(y, offsets), split(x, offsets), strict=True)])


class AtOnce:
    """The products of all groups in one kernel. Matrices come and go in one tensor [G, out, in].

    `offsets`: where each group's rows end [G] int32.
    """

    def __init__(self, offsets: Tensor) -> None:
        self.offsets = offsets

    def linear(self, x: Tensor, matrices: Matrices, out: Tensor | None = None, add: bool = False) -> Tensor:
        """matrices[g] @ x[t] for each row, in `out` if given, or added to it. x [T, in] → [T, out]."""
        return _put(grouped_linear(x, self._all(matrices), self.offsets), out, add)

    def linear_back(self, y: Tensor, matrices: Matrices, out: Tensor | None = None, add: bool = False) -> Tensor:
        """matrices[g]ᵀ @ y[t], likewise. y [T, out] → [T, in]."""
        return _put(grouped_linear(y, self._all(matrices).mT, self.offsets), out, add)

    def outer(self, y: Tensor, x: Tensor) -> Tensor:
        """Σ over a group's rows of y[t] x[t]ᵀ: y [T, out], x [T, in] → [G, out, in]."""
        return grouped_outer(y, x, self.offsets)

    @staticmethod
    def _all(matrices: Matrices) -> Tensor:
        return matrices(None) if callable(matrices) else matrices


class Alone:
    """The same for all rows of one group, by its number: a product of two matrices."""

    def __init__(self, number: int) -> None:
        self.number = number

    def linear(self, x: Tensor, matrices: Matrices, out: Tensor | None = None, add: bool = False) -> Tensor:
        """As `AtOnce.linear`."""
        return _product(x, self._own(matrices).T, out, add)

    def linear_back(self, y: Tensor, matrices: Matrices, out: Tensor | None = None, add: bool = False) -> Tensor:
        """As `AtOnce.linear_back`."""
        return _product(y, self._own(matrices), out, add)

    def outer(self, y: Tensor, x: Tensor) -> Tensor:
        """As `AtOnce.outer`."""
        return torch.mm(y.T, x)[None]

    def _own(self, matrices: Matrices) -> Tensor:
        return matrices(self.number) if callable(matrices) else matrices[self.number]


class InTurn:
    """The same for some groups one after the other, by their numbers. `ends`: where the rows of each end."""

    def __init__(self, numbers: Sequence[int], ends: Sequence[int]) -> None:
        spans = zip([0, *ends], ends, strict=False)
        self.groups = [(Alone(number), slice(*span)) for number, span in zip(numbers, spans, strict=True)]

    def linear(self, x: Tensor, matrices: Matrices, out: Tensor | None = None, add: bool = False) -> Tensor:
        """As `AtOnce.linear`."""
        out = x.new_empty(len(x), len(matrices[0])) if out is None else out
        for group, rows in self.groups:
            group.linear(x[rows], matrices, out[rows], add)
        return out

    def linear_back(self, y: Tensor, matrices: Matrices, out: Tensor | None = None, add: bool = False) -> Tensor:
        """As `AtOnce.linear_back`."""
        out = y.new_empty(len(y), matrices[0].shape[1]) if out is None else out
        for group, rows in self.groups:
            group.linear_back(y[rows], matrices, out[rows], add)
        return out

    def outer(self, y: Tensor, x: Tensor) -> Tensor:
        """As `AtOnce.outer`."""
        return torch.cat([group.outer(y[rows], x[rows]) for group, rows in self.groups])


def _product(x: Tensor, matrix: Tensor, out: Tensor | None, add: bool) -> Tensor:
    if matrix.dtype != x.dtype:
        matrix = matrix.to(x.dtype)
    if out is None or out.dtype != x.dtype:
        return _put(torch.mm(x, matrix), out, add)
    return out.addmm_(x, matrix) if add else torch.mm(x, matrix, out=out)


def _put(y: Tensor, out: Tensor | None, add: bool) -> Tensor:
    if out is None:
        return y
    return out.add_(y) if add else out.copy_(y)


def split(x: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """The rows of each group. Waits for the device."""
    bounds = [0, *ends(offsets, len(x))]
    return x.split([bounds[number + 1] - bounds[number] for number in range(len(offsets))])


def ends(offsets: Tensor, rows: int) -> list[int]:
    """Where each group's rows end. Waits for the device.

    A fake tensor has no values (`--dry-run`): its groups are as even as can be.
    """
    if isinstance(offsets, FakeTensor):
        return [rows * number // len(offsets) for number in range(1, len(offsets) + 1)]
    return offsets.tolist()


def _kernel_takes(dtype: torch.dtype, rows: int, columns: int) -> bool:
    # The kernel reads rows in steps of 16 bytes, of the input and of the output.
    return dtype in _KERNEL_DTYPES and all(size * dtype.itemsize % 16 == 0 for size in (rows, columns))
