"""The tables of `full_size`: what of a training step is known, and what it had to do at the least."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dllm_memdlm.training.planner import Plan

from . import inference
from .inference import GIB
from .random_models import RATIO
from .report import Section, write
from .timing import Rates
from .watch import Watched

PLAIN = "plain MDLM"


class Report:
    """The tables, on disk after every row."""

    def __init__(self, output: Path, about: dict[str, Any]) -> None:
        self.output, self.about, self.start = output, about, time.perf_counter()
        self.steps = Section(
            title="A training step at full size",
            columns=[
                *("model", "training", "s", "tokens/s", "÷ plain"),
                *("TFLOP", "FLOP limit s", "GB", "byte limit s", "÷ the longer"),
                *("peak GiB", "planned", "GPU busy", "waits"),
            ],
            note="Whole optimizer steps of the trainer: data, forward, backward, clipping, optimizer; prompt:response "
            f"{RATIO}:1, all of the response masked; random weights. TFLOP as the planner counts them; GB of weights, "
            "read as often as layers are passed, without activations; limits by what the device reaches in a large "
            "product and in a copy; weights in 4 bit count as they are packed. Peaks, and planned ones, beyond weights "
            "and optimizer. GPU busy: seconds of its kernels over those of a step. Waits: how often the host waits for "
            "the GPU in a step.",
        )
        self.host = Section(
            title="What the host does in a step, s",
            columns=["model", "training", "data", "loss, gradients, clipping", "optimizer", "the rest", "first step"],
            note="Seconds until the host has said everything, not until the GPU has done it; waits included.",
        )
        self.waits = Section(title="Where the host waits in a step", columns=["model", "training", "line", "times"])
        self.kernels = Section(
            title="The longest kernels of a step",
            columns=["model", "training", "kernel", "calls", "ms", "of all"],
            note="On a CPU: operators.",
        )
        self.loading = Section(
            title="Making a model of random weights",
            columns=["model", "s", "held GiB", "reserved GiB", "reserved after training"],
            note="Reserved: what torch's allocator has taken from the GPU, what it does not use included.",
        )
        self.inference = inference.section()

    def tables(self) -> list[Section]:
        tables = (self.steps, self.host, self.waits, self.kernels, self.loading, self.inference)
        return [table for table in tables if table.rows]

    def note(self, key: list[str], tokens: int, read: int, reached: Rates, plan: Plan | None, found: Watched) -> None:
        """What is known by now of one model's training, in place of what was known before.

        A step has so many tokens, and reads so many bytes of weights; its FLOPs are those of the plan, if there is one.
        """
        flops, planned, busy = None, None, sum(kernel.seconds for kernel in found.kernels)
        if plan is not None:
            flops = plan.flops_mdlm if key[1] == PLAIN else plan.flops_memdlm
            planned = (plan.peak - plan.at_peak["weights"] - plan.at_peak["optimizer"]) / GIB
        flops_seconds, bytes_seconds = flops and flops / reached.flops, read / reached.bytes
        self._put(
            *(self.steps, key),
            [
                *(found.seconds, round(tokens / found.seconds), None),
                *(flops and flops / 1e12, flops_seconds, read / 1e9, bytes_seconds),
                found.seconds / max(flops_seconds or 0, bytes_seconds),
                *(found.memory and found.memory.peak / GIB, planned),
                f"{busy / found.seconds:.0%}" if found.kernels else None,
                None if found.waits is None else sum(found.waits.values()),
            ],
        )
        plain = {model: seconds for model, kind, seconds, *_ in self.steps.rows if kind == PLAIN}
        for row in self.steps.rows:
            row[4] = row[2] / plain[row[0]] if row[0] in plain else None
        self._put(self.host, key, [*found.host.values(), found.first])
        if found.waits is not None:
            self._put(self.waits, key, *([line, times] for line, times in found.waits.most_common(10)))
        longest = found.kernels[:20]
        self._put(self.kernels, key, *([k.short, k.calls, k.seconds * 1e3, f"{k.seconds / busy:.1%}"] for k in longest))
        last = "kernels" if found.kernels else "step" if found.waits is None else "waits"
        self.save(f"{', '.join(key)}: {last}")

    def _put(self, table: Section, key: list[str], *rows: list[Any]) -> None:
        table.rows = [row for row in table.rows if row[:2] != key] + [[*key, *row] for row in rows]

    def save(self, what: str) -> list[Path]:
        """Write what there is; say what has come, so that a log tells what takes the time."""
        print(f"{time.perf_counter() - self.start:6.1f} s  {what}", flush=True)
        return write(self.tables(), "At full size", self.about, self.output, "bench-gpu")
