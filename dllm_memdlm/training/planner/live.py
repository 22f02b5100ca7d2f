"""Bytes and FLOPs of code that runs on fake tensors: every storage is counted from the op that makes it to its end."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
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
class _Storage:
    kind: str
    size: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that ops make while it is on, until they are freed. Views cost nothing.

    `kind_of` says what a tensor is for; all are of one kind by default.
    """

    def __init__(self, kind_of: Callable[[Tensor], str] = lambda tensor: "") -> None:
        super().__init__()
        self.now: Counter[str] = Counter()  #: by kind
        self.highest: Counter[str] = Counter()  #: what was alive when all together was most
        self.largest: Counter[str] = Counter()  #: of each kind by itself, at any time
        self.flops = 0
        self.moment = ""  #: to be set: what is going on
        self.highest_moment = ""  #: what was going on at the highest
        self._kind_of, self._known = kind_of, WeakIdKeyDictionary()

    def leave_out(self, tensor: Tensor) -> None:
        """Not count a tensor that was there before."""
        self._known.setdefault(tensor.untyped_storage(), _Storage("", 0))

    def hold(self, kind: str, size: int) -> None:
        """Count so many bytes more, or fewer, from now on."""
        self.now[kind] += size
        self.largest[kind] = max(self.largest[kind], self.now[kind])
        if self.now.total() > self.highest.total():
            self.highest, self.highest_moment = self.now.copy(), self.moment

    def turn_into(self, tensor: Tensor, kind: str, share: float = 1.0) -> None:
        """Count a part of a tensor, as another kind, from now on."""
        known = self._known[tensor.untyped_storage()]
        self.now[known.kind] -= known.size
        known.kind, known.size = kind, int(share * known.size)
        self.hold(kind, known.size)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # more often asked than all else
            return args[0].fake_device
        kwargs = kwargs or {}
        if func is aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            out = grouped_output(*args, **kwargs)  # torch's shape function knows bfloat16 only, its kernels more
        else:
            out = func(*args, **kwargs)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        formula = FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        known = self._known[storage] = _Storage(self._kind_of(tensor), storage.nbytes())
        self.hold(known.kind, known.size)
        weakref.finalize(storage, self._forget, known).atexit = False

    def _forget(self, known: _Storage) -> None:
        self.now[known.kind] -= known.size


def grouped_output(a: Tensor, b: Tensor, offs: Tensor, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """The shape that `_grouped_mm` gives: rows by group [T, N], or a product for each group [G, M, N]."""
    shape = (len(offs), a.shape[0], b.shape[1]) if b.dim() == 2 else (a.shape[0], b.shape[-1])
    return a.new_empty(shape, dtype=out_dtype or a.dtype)


#: FLOPs by op, from its arguments: torch's own table, and the CPU's grouped products and fused attention. Each row of a
#: grouped product (or column, where each group has a product) is of one group. Attention has two products of all
#: queries, and five in the backward pass, which computes the scores once more; torch's own formula (2.11) refuses fewer
#: heads of keys and values than of queries. query [B, H, M, d]; key, value [B, H or a divisor of it, L, d].
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._grouped_mm: lambda a, b, *_, **__: 2 * a.shape[0] * a.shape[1] * b.shape[-1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        2 * q.shape[:3].numel() * k.shape[2] * (q.shape[3] + v.shape[3])
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, v, *__, **___: (
        2 * q.shape[:3].numel() * k.shape[2] * (3 * q.shape[3] + 2 * v.shape[3])
    ),
}
