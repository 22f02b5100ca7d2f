"""Exchange between processes: of one set of fast weights for the whole global batch, and of how long it takes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce, broadcast, is_initialized


def first(tensor: Tensor) -> Tensor:
    """Return the first process's tensor."""
    if is_initialized():
        tensor = tensor.clone()
        broadcast(tensor, src=0)
    return tensor


def total(tensors: list[Tensor]) -> list[Tensor]:
    """Sum each tensor over the processes, in one exchange. All are of one dtype, and of the same shapes everywhere."""
    if not is_initialized():
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def most(count: int, device: torch.device) -> int:
    """Return the largest count of all processes. It waits for the device, where there are several."""
    if not is_initialized():
        return count
    counts = torch.tensor(count, device=device)
    all_reduce(counts, ReduceOp.MAX)
    return int(counts)
