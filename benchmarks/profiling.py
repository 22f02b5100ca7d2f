"""Where a step's time goes, and what would be left of it if every matrix product were as fast as a large one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .device import CPU, PRODUCTS, Clock
from .report import Cell, Section
from .steps import Step
from .timing import rates, side_by_side
from .training import Bench, Size, described

ATTENTION = "aten::_scaled_dot_product"


class Parts(NamedTuple):
    """Seconds of a step."""

    products: float
    attention: float
    rest: float  #: other operators, autograd, Python
    flops: int  #: of the products


def parts(step: Callable[[], Any], seconds: float) -> Parts:
    """Of a step that takes so many seconds when nobody looks."""
    with Clock() as clock:
        step()
    products = sum(clock.seconds[name] for name in PRODUCTS)
    attention = sum(time for name, time in clock.seconds.items() if name.startswith(ATTENTION))
    return Parts(products, attention, seconds - products - attention, clock.flops)


def profiling(size: Size) -> Section:
    """dllm's plain step, ours, ours with memory, and MemDLM's written naively, of the prompt-heavy shapes."""
    section = Section(
        title="Where a step's time goes, 1 thread",
        columns=[
            *("model, vocabulary, prompt:response", "step", "s"),
            *("products s", "attention s", "rest s"),
            *("GFLOP of products", "GFLOP/s", "GFLOP ÷ plain's"),
            *("s at the full rate", "÷ dllm's plain", "÷ naive MemDLM", "÷ plain at the full rate"),
        ],
        note=f"{described(size.shapes[0])}; CPU time, medians of {size.repeats} turns; products and attention as timed "
        "one by one in another step. At the full rate: with every product at the speed of one of two matrices of "
        "1,024 × 1,024, and all else as it is; over the others as they are.",
    )
    torch.set_num_threads(1)
    full_rate = rates(CPU, torch.float32).flops
    section.note += f" That is {full_rate / 1e9:.0f} GFLOP/s here."
    for shape in size.shapes:
        if shape.ratio != size.base.ratio or shape.checkpointing:
            continue
        cases = Bench(size, shape).all()
        cases = {name: cases[name] for name in ("dllm", "plain", "MemDLM", "naive") if name in cases}
        section.rows += _rows(str(shape), cases, size.repeats, full_rate)
    return section


def _rows(shape: str, cases: dict[str, Step], repeats: int, full_rate: float) -> list[list[Cell]]:
    seconds = {name: timed.median("cpu") for name, timed in side_by_side(cases, repeats, warm=True).items()}
    rows: list[list[Cell]] = []
    best, flops = {}, {}
    for name, case in cases.items():
        found = parts(case, seconds[name])
        flops[name], best[name] = found.flops, seconds[name] - found.products + found.flops / full_rate
        rows.append(
            [
                *(shape, name, seconds[name], *found[:3]),
                *(found.flops / 1e9, round(found.flops / 1e9 / found.products)),
                found.flops / flops["plain"] if "plain" in flops else None,
                best[name],
                best[name] / seconds["dllm"] if "dllm" in seconds else None,
                best[name] / seconds["naive"],
                best[name] / best["plain"] if "plain" in best else None,
            ]
        )
    return rows
