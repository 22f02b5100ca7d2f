"""Where a step's time goes, and what would be left of it if every matrix product were as fast as a large one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from .report import Cell, Section
from .steps import Step
from .timing import CPU, rates, side_by_side
from .training import Bench, Size, described

aten = torch.ops.aten
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm")
ATTENTION = "aten::_scaled_dot_product"
#: Whose FLOPs torch's counter does not know, and which a step on a CPU has.
UNKNOWN = {aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}  # of shapes


class Shares(NamedTuple):
    """Of the time of a step."""

    products: float
    attention: float
    operators: float  #: all others of torch's
    between: float  #: Python, autograd and the way to an operator


def shares(step: Callable[[], Any]) -> Shares:
    """Of all that runs on the CPU in one call."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.profiler.record_function("all"):
        step()
    events = {event.key: event for event in profiler.key_averages()}
    total = events["all"].cpu_time_total
    own = {name: event.self_cpu_time_total / total for name, event in events.items() if name.startswith("aten::")}
    products = sum(own[name] for name in PRODUCTS if name in own)
    attention = sum(share for name, share in own.items() if name.startswith(ATTENTION))
    known = sum(own.values())
    return Shares(products, attention, known - products - attention, 1 - known)


def flops(step: Callable[[], Any]) -> int:
    """Of the matrix products in one call, attention's not counted."""
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
        step()
    return counter.get_total_flops()


def profiling(size: Size) -> Section:
    """dllm's plain step, ours, and ours with memory, of the prompt-heavy shapes."""
    section = Section(
        title="Where a step's time goes, 1 thread",
        columns=[
            *("model, vocabulary, prompt:response", "step", "s"),
            *("products s", "attention s", "other operators s", "between them s"),
            *("GFLOP of products", "GFLOP/s", "s at the full rate", "÷ dllm's plain", "÷ plain at the full rate"),
        ],
        note=f"{described(size.shapes[0])}; CPU time, medians of {size.repeats} turns, shared out as in one step under "
        "the profiler, which itself takes some of what is between operators. At the full rate: with every product at "
        "the speed of one of two matrices of 1,024 × 1,024, and all else as it is.",
    )
    torch.set_num_threads(1)
    full_rate = rates(CPU, torch.float32).flops
    section.note += f" That is {full_rate / 1e9:.0f} GFLOP/s here."
    for shape in size.shapes:
        if shape.ratio != size.base.ratio:
            continue
        cases = Bench(size, shape).all()
        cases = {name: cases[name] for name in ("dllm", "plain", "MemDLM") if name in cases}
        section.rows += _rows(str(shape), cases, size.repeats, full_rate)
    return section


def _rows(shape: str, cases: dict[str, Step], repeats: int, full_rate: float) -> list[list[Cell]]:
    for case in cases.values():
        case()  # the first step of a model also packs its experts
    seconds = {name: timed.median("cpu") for name, timed in side_by_side(cases, repeats).items()}
    rows: list[list[Cell]] = []
    best: dict[str, float] = {}
    for name, case in cases.items():
        parts, count = [share * seconds[name] for share in shares(case)], flops(case)
        best[name] = seconds[name] - parts[0] + count / full_rate
        rows.append(
            [
                *(shape, name, seconds[name], *parts, count / 1e9, round(count / 1e9 / parts[0]), best[name]),
                best[name] / seconds["dllm"] if "dllm" in seconds else None,
                best[name] / best["plain"] if name != "dllm" else None,
            ]
        )
    return rows
