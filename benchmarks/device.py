"""What a device does while a block of code runs: waits of the host for it, its longest kernels, its memory."""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dllm_memdlm.training.planner.live import FLOPS, LiveBytes

CPU = torch.device("cpu")
#: Of C++ names.
COMMON = r"void |at::native::|\(anonymous namespace\)::|c10::|cutlass::|std::|at::|\|"
WAITED = "called a synchronizing CUDA operation"  #: torch's warning
PRODUCTS = tuple(f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm"))


def finish(device: torch.device) -> None:
    """Wait until a GPU has done all that it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def waits(device: torch.device) -> Iterator[Counter[str]]:
    """Count how often the host waits for a GPU, by the line that makes it wait. Filled in at the end; none on a CPU.

    torch warns of every such wait; a wait in the backward pass is reported at the line that started the pass.
    """
    found: Counter[str] = Counter()
    if device.type != "cuda":
        yield found
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if str(warning.message).startswith(WAITED):
            found[f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}"] += 1


class Kernel(NamedTuple):
    """One kernel of a GPU, or operator of a CPU, in a block of code."""

    name: str
    calls: int
    seconds: float  #: of all calls together

    @property
    def short(self) -> str:
        """The name without what all have in common, in a width that a table takes."""
        return f"`{re.sub(COMMON, '', self.name)[:160]}`"


@contextmanager
def kernels(device: torch.device) -> Iterator[list[Kernel]]:
    """List what the device computes, the longest first. Filled in at the end."""
    found: list[Kernel] = []
    if device.type != "cuda":
        with Clock() as clock:
            yield found
        seconds, calls = clock.seconds, clock.calls
    else:
        finish(device)
        # Not torch.profiler, which makes a tree of all events: minutes for the quarter of a million of a 4-bit step.
        with profile(use_cpu=False, use_device="cuda", use_kineto=True) as profiler:
            yield found
            finish(device)
        seconds, calls = Counter(), Counter()
        for event in profiler.kineto_results.events():
            if event.device_type() == DeviceType.CUDA and not event.is_user_annotation():
                seconds[event.name()] += event.duration_ns() / 1e9
                calls[event.name()] += 1
    found += [Kernel(name, calls[name], total) for name, total in seconds.most_common()]


class Clock(TorchDispatchMode):
    """CPU time of every operator. Views take longer to time than to make; products and attention do not."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.flops = 0  #: of matrix products

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        start = time.process_time()
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket._qualified_op_name
        self.seconds[name] += time.process_time() - start
        self.calls[name] += 1
        if name in PRODUCTS:
            self.flops += FLOPS[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@dataclass
class Memory:
    """Bytes that tensors take in a block of code."""

    peak: int = 0  #: most at a time, beyond what there was when it began


@contextmanager
def memory(device: torch.device) -> Iterator[Memory]:
    """Measure the memory of a block of code. Filled in at its end.

    On a CPU it is counted from operator to operator: torch's profiler would keep every one of a step's millions of
    events, which takes more memory than the step.
    """
    found = Memory()
    if device.type == "cuda":
        finish(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        finish(device)
        found.peak = torch.cuda.max_memory_allocated(device) - held
        return
    with _NewBytes() as live:
        yield found
    found.peak = live.highest.total()


def peak_memory(case: Callable[[], Any], device: torch.device = CPU) -> int:
    """Most bytes that tensors have at a time, beyond what there was when `case` began."""
    with memory(device) as found:
        case()
    return found.peak


class _NewBytes(LiveBytes):
    """What operators are given and none has made was there before."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.leave_out(tensor)
        return super().__torch_dispatch__(func, types, args, kwargs)
