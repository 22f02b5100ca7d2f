"""The output layer: logits, or the loss of given tokens without ever having all the logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .layers import autocast_dtype, constant

#: Logits that are there at a time, by device: 128 MiB in float32. A GPU reads the matrix anew for each part.
CHUNK = {"cpu": 2**25, "cuda": 2**27}


class OutputLinear(nn.Linear):
    """A projection to the vocabulary. Where tokens are given, it returns their negative log-likelihood instead."""

    chunk: int | None = None  #: logits at a time, if not those of the device

    @classmethod
    def put_into(cls, model: Any) -> None:
        """In place of a model's plain output layer, with its weight."""
        plain = model.get_output_embeddings()
        if type(plain) is nn.Linear:
            head = cls.__new__(cls)
            vars(head).update(vars(plain))
            model.set_output_embeddings(head)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """x [..., D] → logits [..., V]; with tokens [...] their NLL [...], as `token_nll`."""
        if tokens is None:
            return super().forward(x)
        if self.bias is not None:
            return token_nll(super().forward(x), tokens)
        dtype = autocast_dtype(x) or x.dtype
        chunk = self.chunk or CHUNK.get(x.device.type, CHUNK["cuda"])
        return _LinearNLL.apply(x.flatten(0, -2), constant(self.weight), tokens.flatten(), dtype, chunk).view_as(tokens)


class _LinearNLL(torch.autograd.Function):
    """Rows [N, D], weight [V, D], tokens [N] → [N], some rows at a time.

    A frozen weight is needed once: how a row moves its loss is found along with it. One that trains is needed again,
    as its gradient depends on what the losses are multiplied by.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, tokens: Tensor, dtype: torch.dtype, chunk: int) -> Tensor:
        of_rows, of_weight = ctx.needs_input_grad[:2]
        nll, slopes = [], []
        with torch.autocast(rows.device.type, enabled=False):
            matrix = weight.to(dtype)
            for part, wanted in _chunks(chunk // len(weight), rows, tokens):
                logits = widened(F.linear(part.to(dtype), matrix))
                total = logits.logsumexp(-1, keepdim=True)
                nll.append((total - logits.gather(1, wanted[:, None]))[:, 0])
                if of_rows and not of_weight:
                    slopes.append(_slope(logits, total, wanted).to(dtype) @ matrix)
        ctx.dtype, ctx.chunk = dtype, chunk
        ctx.save_for_backward(*((rows, weight, tokens) if of_weight else (torch.cat(slopes),) if slopes else ()))
        return torch.cat(nll)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[1]:
            (slopes,) = ctx.saved_tensors
            return (slopes * gradient[:, None]).to(slopes.dtype), None, None, None, None
        rows, weight, tokens = ctx.saved_tensors
        of_rows, of_weight = [], torch.zeros_like(weight)
        with torch.autocast(rows.device.type, enabled=False):
            matrix = weight.to(ctx.dtype)
            for part, wanted, factor in _chunks(ctx.chunk // len(weight), rows, tokens, gradient[:, None]):
                logits = widened(F.linear(part.to(ctx.dtype), matrix))
                slope = _slope(logits, logits.logsumexp(-1, keepdim=True), wanted).mul_(factor).to(ctx.dtype)
                of_rows.append(slope @ matrix)
                of_weight += slope.T @ part.to(ctx.dtype)
        return torch.cat(of_rows).to(rows.dtype), of_weight, None, None, None


def _chunks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.split(max(1, size)) for x in tensors), strict=True)


def _slope(logits: Tensor, total: Tensor, tokens: Tensor) -> Tensor:
    """How the logits move the NLL: softmax, less one at the token. In place."""
    return logits.sub_(total).exp_().scatter_add_(1, tokens[:, None], torch.full_like(total, -1))


def token_nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p(token), in nats, float32 (float64 stays). logits [B, M, V], tokens [B, M] → [B, M]."""
    flat = F.cross_entropy(widened(logits).flatten(0, 1), tokens.flatten(), reduction="none")
    return flat.view_as(tokens)


def widened(x: Tensor) -> Tensor:
    """float16 and bfloat16 to float32, in which losses are computed; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
