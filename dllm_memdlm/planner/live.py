"""Bytes and FLOPs of code that runs on fake tensors: every storage is counted from the op that makes it to its end."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten


@dataclass
class Span:
    """What a block of code did to memory, in bytes, and its matrix products, in FLOPs (2 a multiplication)."""

    peak: int = 0  #: most over what was alive when it began
    kept: int = 0  #: alive at its end, less what was alive when it began; negative where it frees more
    flops: int = 0
    cached: int = 0  #: freed at its end with autocast's cache, though not before the end of a stage


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that ops make while it is on, until they are freed. Views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.flops = 0
        self._highest = 0
        self._known = WeakIdKeyDictionary()

    @contextmanager
    def span(self) -> Iterator[Span]:
        """Measure a block; the result is filled in at its end. Spans follow each other, or lie within one another."""
        span, start, flops, outer = Span(), self.now, self.flops, self._highest
        self._highest = self.now
        yield span
        span.peak, span.kept, span.flops = self._highest - start, self.now - start, self.flops - flops
        self._highest = max(outer, self._highest)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            out = grouped_output(*args, **kwargs)  # torch's shape function knows bfloat16 only, its kernels more
        else:
            out = func(*args, **kwargs)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        formula = FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self._highest = max(self._highest, self.now)
        weakref.finalize(storage, self._forget, size).atexit = False

    def _forget(self, size: int) -> None:
        self.now -= size


def grouped_output(a: Tensor, b: Tensor, offs: Tensor, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """The shape that `_grouped_mm` gives: rows by group [T, N], or a product for each group [G, M, N]."""
    shape = (len(offs), a.shape[0], b.shape[1]) if b.dim() == 2 else (a.shape[0], b.shape[-1])
    return a.new_empty(shape, dtype=out_dtype or a.dtype)


def grouped_flops(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    """Every row, or column where each group has a product, belongs to one group: the FLOPs of one product."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[-1]


def attention_flops(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """Of scores and of the sum over values. query [B, H, M, d]; key, value [B, H or a divisor of it, L, d].

    Not torch's own formula: that of 2.11 refuses fewer heads of keys and values than of queries.
    """
    return 2 * query.shape[:3].numel() * key.shape[2] * (query.shape[3] + value.shape[3])


def attention_backward_flops(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> int:
    """Of the scores once more, and of the gradients of values, of scores, of queries and of keys."""
    return 2 * query.shape[:3].numel() * key.shape[2] * (3 * query.shape[3] + 2 * value.shape[3])


#: FLOPs by op: torch's own table, and the CPU's grouped products and fused attention.
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._grouped_mm: grouped_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
