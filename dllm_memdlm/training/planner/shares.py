"""What an engine keeps on each GPU of a model's weights, gradients and optimizer states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .shapes import held_bytes

#: Engines that share out the weights themselves, and those of DeepSpeed.
SHARES_WEIGHTS = ("zero3", "fsdp2")
ZERO = ("zero1", "zero2", "zero3")

#: DeepSpeed's stage 3 lets go of weights only beyond so many elements (stage3_max_live_parameters, its default).
LIVE_ELEMENTS = 10**9


@dataclass(frozen=True)
class Share:
    """Bytes on one GPU that are there in every pass."""

    weights: int
    optimizer: int
    buffers: int = 0  #: gradients in flight, and the room an engine keeps for them
    gathered: int = 0  #: weights of the layers under way, put together from all GPUs
    stays: float = 1.0  #: part of a gradient that stays on the GPU once the backward pass has made it


def share(model: nn.Module, layers: nn.ModuleList, engine: str, gpus: int, cast: torch.dtype | None) -> Share:
    """The share of one of `gpus` GPUs. `cast`: what layers compute with, if the engine turns their weights into it."""
    everything, trainable = held_bytes(model, cast=cast), held_bytes(model, trainable=True, cast=cast)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if engine in ZERO:
        # A float32 copy of the weights that train, which is the one updated, and two moments.
        optimizer = 12 * count // gpus
        if engine != "zero3":
            return Share(everything, optimizer, stays=1 / gpus)
        element = everything / max(1, sum(t.numel() for t in model.parameters()))
        gathered = min(everything, int(LIVE_ELEMENTS * element))
        return Share(everything // gpus, optimizer, 4 * count // gpus, gathered, stays=0.0)
    if engine == "fsdp2":
        # Gathered are the layer under way and the next one, on its way; and what belongs to no layer.
        sizes = [held_bytes(layer, cast=cast) for layer in layers]
        gathered = 2 * max(sizes) + everything - sum(sizes)
        kept = held_bytes(model, cast=cast and torch.float32)  # accelerate widens what it shares out
        adam = 8 * count if cast else 2 * trainable
        return Share(kept // gpus, adam // gpus, 0, gathered, stays=1 / gpus)
    # Adam's two moments are of the weights' dtype. DDP averages gradients in buckets, a second copy of them all.
    return Share(everything, 2 * trainable, trainable if engine == "ddp" else 0)
