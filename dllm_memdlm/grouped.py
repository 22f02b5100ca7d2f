"""Matrix products over rows sorted by group: the arithmetic of routed experts, and of their fast weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

#: CUDA's kernel takes fewer than 1,024 groups. Fast weights have as many as experts times samples.
MAX_GROUPS = 1023

#: On a GPU only bfloat16 has one, from Hopper on. Otherwise torch loops over the groups, and waits for where they end.
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor | None) -> Tensor:
    """y[t] = weight[g] @ x[t], g the group of row t.

    Args:
        x: rows sorted by group [T, in].
        weight: one matrix a group [G, out, in], used in the dtype of x.
        offsets: where each group's rows end [G] int32, the last being T; None where all groups have equally many.

    Returns:
        [T, out], in the dtype of x.
    """
    weight = weight.to(x.dtype)
    if offsets is None:
        return torch.bmm(x.unflatten(0, (len(weight), -1)), weight.mT).flatten(0, 1)
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
