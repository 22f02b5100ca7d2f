"""Matrix products over rows sorted by group: the arithmetic of routed experts, and of their fast weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

#: CUDA's kernel takes fewer than 1,024 groups. Fast weights have as many as experts times samples.
MAX_GROUPS = 1023

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """y[t] = weight[g] @ x[t], g the group of row t.

    Args:
        x: rows sorted by group [T, in].
        weight: one matrix a group [G, out, in].
        offsets: where each group's rows end [G] int32, the last being T.

    Returns:
        [T, out], in autocast's dtype where it is on, otherwise in that of x.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    x, weight = x.to(dtype), weight.to(dtype)
    if not _kernel_takes(x, weight):
        return grouped_linear_loop(x, weight, offsets)
    if len(weight) <= MAX_GROUPS:
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=offsets)
    # Part by part; where their rows begin is waited for.
    offsets = offsets.split(MAX_GROUPS)
    sizes = _sizes(torch.stack([part[-1] for part in offsets]), len(x))
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    parts = zip(x.split(sizes), starts, weight.split(MAX_GROUPS), offsets, strict=True)
    return torch.cat([F.grouped_mm(rows, w.transpose(-2, -1), offs=offs - start) for rows, start, w, offs in parts])


def grouped_linear_loop(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The same, one product a group: for the dtypes and widths that the kernel does not take."""
    return torch.cat([F.linear(rows, matrix) for rows, matrix in zip(split(x, offsets), weight, strict=True)])


def split(x: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """The rows of each group. Waits for the device."""
    return x.split(_sizes(offsets, len(x)))


def _sizes(offsets: Tensor, rows: int) -> list[int]:
    """How many rows each group has. A fake tensor has no values (`--dry-run`): its groups are as even as can be."""
    if isinstance(offsets, FakeTensor):
        return [rows // len(offsets) + (number < rows % len(offsets)) for number in range(len(offsets))]
    return offsets.diff(prepend=offsets.new_zeros(1)).tolist()


def _kernel_takes(x: Tensor, weight: Tensor) -> bool:
    # The kernel reads rows in steps of 16 bytes, of the input and of the output.
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    return x.dtype in _KERNEL_DTYPES and aligned
