"""Peak memory of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from dllm_memdlm.planner.live import LiveBytes

from .timing import CPU


def peak_memory(case: Callable[[], Any], device: torch.device = CPU) -> int:
    """Most bytes that tensors have at a time, beyond what there was when `case` began.

    On a CPU they are counted from operator to operator: torch's profiler would keep every one of a step's millions of
    events, which takes more memory than the step.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        case()
        return torch.cuda.max_memory_allocated(device) - held
    with _NewBytes() as live, live.span() as span:
        case()
    return span.peak


class _NewBytes(LiveBytes):
    """What operators are given and none has made was there before."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._known.setdefault(tensor.untyped_storage(), 0)
        return super().__torch_dispatch__(func, types, args, kwargs)
