"""Matrix products over rows sorted by group: the arithmetic of routed experts, and of their fast weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

#: CUDA's kernel takes fewer than 1,024 groups. Fast weights have as many as experts times samples.
MAX_GROUPS = 1023

#: On a GPU only bfloat16 has a kernel, for capabilities 9 and 10. Otherwise torch loops over the groups, and waits for
#: their ends.
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
    if x.dtype not in _KERNEL_DTYPES:
        return grouped_linear_loop(x, weight, offsets)
    out = weight.shape[1]
    weight = _filled(_filled(weight).mT)
    return F.grouped_mm(_filled(x), weight, offs=offsets)[:, :out]


def grouped_linear_loop(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The same, one product a group: for the dtypes that the kernel does not take."""
    return torch.cat([F.linear(rows, matrix) for rows, matrix in zip(split(x, offsets), weight, strict=True)])


def grouped_outer(y: Tensor, x: Tensor, offsets: Tensor | None, groups: int) -> Tensor:
    """Σ over the rows of a group of y[t] x[t]ᵀ: how a loss moves the group's matrix, if it moves its outputs by y.

    y [T, out], x [T, in], both of one dtype and sorted by group → [G, out, in]. Zeros for a group without rows.
    """
    if offsets is None:
        y, x = (rows.unflatten(0, (groups, -1)) for rows in (y, x))
        return torch.bmm(y.mT, x)
    if x.dtype not in _KERNEL_DTYPES:
        return torch.stack([a.T @ b for a, b in zip(split(y, offsets), split(x, offsets), strict=True)])
    rows, columns = y.shape[1], x.shape[1]
    return F.grouped_mm(_filled(y).T, _filled(x), offs=offsets)[:, :rows, :columns]


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


def _filled(x: Tensor) -> Tensor:
    """With zeros up to whole steps of 16 bytes, in which the kernel reads rows of the input and of the output."""
    missing = -x.shape[-1] % (16 // x.dtype.itemsize)
    return F.pad(x, (0, missing)) if missing else x
