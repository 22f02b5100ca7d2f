"""A part of the model on its own: what its tensors depend on, what it does in a step, and what stands for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .live import Span


@dataclass(frozen=True)
class Sizes:
    """What the tensors of a step depend on, besides the model."""

    batch: int  #: samples of one micro-batch
    length: int  #: tokens of a sample
    masked: int  #: tokens of a sample with a loss
    norm: str = "token"  #: how the outer loss is normalised, a key of `losses.NORMS`
    amp: torch.dtype | None = None  #: autocast's dtype; none where it is off
    cast: torch.dtype | None = None  #: what an engine turns all weights into, if it does
    device: str = "cuda"  #: whose way of computing is followed, cuda or cpu
    checkpointing: bool = False  #: whether the trunk is recomputed in the backward pass
    accumulates: bool = False  #: whether gradients of an earlier micro-batch are there already


@dataclass
class Life:
    """A part of the model in one step. Passes that it does not have are none."""

    gradients: int  #: bytes of its weights' gradients
    dtype: torch.dtype = torch.float32  #: of what it puts out
    inner: Span | None = None  #: forward of an inner step, on fast weights that are leaves
    inner_backward: Span | None = None
    plain: Span | None = None  #: forward without gradient: the trunk on other states, the head as a teacher
    forward: Span | None = None  #: forward of the outer pass
    backward: Span | None = None
    cached: int = 0  #: bytes that autocast keeps from the first forward to the end of all (on a CPU): weights, cast
    released: int = 0  #: those of them that are free then; the others the graph still needs


class Source(torch.autograd.Function):
    """What an earlier part puts out: held by its users alone. Its gradient ends here."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return link.new_empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        return None, None, None


class Sink(torch.autograd.Function):
    """A later part, which gives back a gradient of the same shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.new_empty(ctx.shape, dtype=ctx.dtype)
