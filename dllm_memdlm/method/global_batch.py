"""What the processes of a run share where `memory.sync` asks for one set of fast weights in the whole global batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import all_reduce, broadcast, get_world_size, is_initialized


def first(tensor: Tensor) -> Tensor:
    """The tensor of the first process."""
    if is_initialized() and get_world_size() > 1:
        tensor = tensor.clone()
        broadcast(tensor, src=0)
    return tensor


def total(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor summed over the processes, in one exchange. All of one dtype, and of the same shapes everywhere."""
    if not is_initialized() or get_world_size() == 1:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
