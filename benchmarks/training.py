"""What a training step costs: side by side, in memory, and by its settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dllm_memdlm.compat import dllm_api
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.versions import checkpoint_activations

from . import models, steps
from .device import peak_memory
from .report import Range, Section
from .steps import PLAIN, PUBLISHED, Step
from .timing import Timed, side_by_side


@dataclass(frozen=True)
class Shape:
    """A model and a batch."""

    name: str
    vocabulary: int
    ratio: int = 7  #: prompt tokens to one of the response
    batch: int = 2
    length: int = 512
    checkpointing: bool = False  #: of gradients, as in the recipes

    def __str__(self) -> str:
        return f"{self.name}, {self.vocabulary}, {self.ratio}:1{', checkpointing' * self.checkpointing}"


@dataclass(frozen=True)
class Size:
    """How much is measured, and how often."""

    dimensions: dict[str, dict[str, Any]]
    shapes: list[Shape]
    base: Shape  #: what growth and switches start from
    growth: dict[str, list[Any]]
    repeats: int
    padded_batches: int

    def dimensions_of(self, shape: Shape) -> dict[str, Any]:
        return {**self.dimensions[shape.name], "vocab_size": shape.vocabulary}


FULL = Size(
    dimensions=models.FULL,
    shapes=[
        Shape("LLaDA-MoE", 32768),
        Shape("LLaDA-MoE", 8192),
        Shape("LLaDA2.1", 8192),
        Shape("LLaDA-MoE", 32768, ratio=1),
        Shape("LLaDA-MoE", 8192, ratio=1),
        Shape("LLaDA2.1", 8192, ratio=1),
        Shape("LLaDA-MoE", 32768, checkpointing=True),
        Shape("LLaDA2.1", 8192, checkpointing=True),
    ],
    base=Shape("LLaDA-MoE", 8192),
    growth={
        "length": [512, 1024, 2048, 4096],
        "batch": [1, 2, 4, 8],
        "steps": [1, 2, 3, 4],
        "layer_fraction": [0.1, 0.25, 0.5, 1.0],
    },
    repeats=3,
    padded_batches=8,
)
QUICK = Size(
    dimensions=models.QUICK,
    shapes=[
        Shape("LLaDA-MoE", 256, length=64),
        Shape("LLaDA2.1", 256, length=64),
        Shape("LLaDA2.1", 256, length=64, checkpointing=True),
    ],
    base=Shape("LLaDA-MoE", 256, length=64),
    growth={"length": [64, 128], "steps": [1, 2]},
    repeats=2,
    padded_batches=2,
)


class Bench:
    """The model of one shape under a LoRA, and the steps on it."""

    def __init__(self, size: Size, shape: Shape) -> None:
        self.size, self.shape, self.dimensions = size, shape, size.dimensions_of(shape)
        self.model = self._checkpointed(steps.adapted(shape.name, self.dimensions))

    def batch(self, memory: MemoryConfig) -> dict[str, Tensor]:
        shape = self.shape
        return steps.batch_of(shape.vocabulary, [shape.length] * shape.batch, shape.ratio, memory)

    def ours(self, memory: MemoryConfig) -> Step:
        return steps.ours(steps.trainer_of(self.model, memory), self.batch(memory))

    def naive(self, model: nn.Module | None = None) -> Step:
        """MemDLM's as published, one set of fast weights for the batch; on our model or on another like it."""
        return steps.naive(model or self.model, self.batch(PUBLISHED), steps.trainer_of(self.model, PUBLISHED))

    def all(self) -> dict[str, Step]:
        """The naive ones without checkpointing only: nothing keeps their fast weights in place for a second pass."""
        cases = {"plain": self.ours(PLAIN), "MemDLM": self.ours(MemoryConfig())}
        naive_on = {"naive": self.model}
        if dllm_api.HAS_DLLM:
            naive_on["naive on dllm"] = self._checkpointed(steps.adapted_dllms(self.shape.name, self.dimensions))
            cases["dllm"] = steps.dllms(naive_on["naive on dllm"], self.batch(PLAIN))
        if not self.shape.checkpointing:
            cases |= {name: self.naive(model) for name, model in naive_on.items()}
        return cases

    def _checkpointed(self, model: nn.Module) -> nn.Module:
        if self.shape.checkpointing:
            checkpoint_activations(model)
        return model


def compared(size: Size, threads: int) -> Section:
    """dllm's plain step, ours, ours with memory, and MemDLM's written naively."""
    clock = "cpu" if threads == 1 else "wall"
    section = Section(
        title=f"A training step, {threads} thread{'s' * (threads > 1)}",
        columns=[
            *("model, vocabulary, prompt:response", "dllm's plain s", "plain s", "MemDLM s"),
            *("naive MemDLM s", "the same on dllm's model s"),
            *("plain ÷ dllm", "MemDLM ÷ dllm", "MemDLM ÷ naive", "MemDLM ÷ naive on dllm's", "MemDLM ÷ plain"),
            *("plain tokens/s", "MemDLM tokens/s"),
        ],
        note=f"Forward and backward of {described(size.shapes[0])}, float32, LoRA r = {steps.LORA.r}, no dropout; "
        f"{'CPU' if clock == 'cpu' else 'wall'} time, medians of {size.repeats} turns, ratios turn by turn with the "
        "smallest and the largest. MemDLM has fast weights for each sample, the naive step one set for the batch.",
    )
    torch.set_num_threads(threads)
    for shape in size.shapes:
        cases = Bench(size, shape).all()
        timed = side_by_side(cases, size.repeats, warm=True)

        def ratio(one: str, other: str, timed: dict[str, Timed] = timed) -> Range | None:
            return timed[one].ratio(timed[other], clock) if {one, other} <= timed.keys() else None

        seconds = {name: t.median(clock) for name, t in timed.items()}
        tokens = shape.batch * shape.length
        section.rows.append(
            [
                *(str(shape), seconds.get("dllm"), seconds["plain"], seconds["MemDLM"]),
                *(seconds.get("naive"), seconds.get("naive on dllm")),
                *(ratio("plain", "dllm"), ratio("MemDLM", "dllm")),
                *(ratio("MemDLM", "naive"), ratio("MemDLM", "naive on dllm"), ratio("MemDLM", "plain")),
                *(round(tokens / seconds["plain"]), round(tokens / seconds["MemDLM"])),
            ]
        )
    return section


def peaks(size: Size) -> Section:
    """Most memory of each."""
    section = Section(
        title="Peak memory of a training step, MB",
        columns=[
            *("model, vocabulary, prompt:response", "weights", "dllm's plain", "plain", "MemDLM", "naive MemDLM"),
            *("MemDLM ÷ dllm", "the same with weights", "MemDLM ÷ naive"),
        ],
        note=f"All that torch allocates in the forward and backward pass of {described(size.shapes[0])}, gradients "
        "included, beyond the weights, which all have alike.",
    )
    for shape in size.shapes:
        bench = Bench(size, shape)
        held = sum(parameter.nbytes for parameter in bench.model.parameters()) / 1e6
        found: dict[str, float] = {}
        cases = bench.all()
        cases.pop("naive on dllm", None)  # holds what the one on our model holds
        for name, case in cases.items():
            case()
            found[name] = peak_memory(case) / 1e6
        memory, dllm, naive = found["MemDLM"], found.get("dllm"), found.get("naive")
        section.rows.append(
            [
                *(str(shape), held, dllm, found["plain"], memory, naive),
                *((None, None) if dllm is None else (memory / dllm, (memory + held) / (dllm + held))),
                None if naive is None else memory / naive,
            ]
        )
    return section


def growth(size: Size) -> Section:
    """How a step grows with the length, the batch, K and the share of layers with fast weights."""
    section = Section(
        title=f"Growth, {size.base}",
        columns=["setting", "value", "plain s", "MemDLM s", "MemDLM ÷ plain"],
        note=f"From {described(size.base)}, K = 2 and a tenth of the layers, one setting changed at a time. Wall time, "
        f"{torch.get_num_threads()} threads, medians of {min(3, size.repeats)} turns.",
    )
    bench = Bench(size, size.base)
    for setting, values in size.growth.items():
        for value in values:
            memory = MemoryConfig()
            if setting in ("length", "batch"):
                bench.shape = replace(size.base, **{setting: value})
            else:
                bench.shape, memory = size.base, MemoryConfig(**{setting: value})
            cases = {"plain": bench.ours(PLAIN), "MemDLM": bench.ours(memory)}
            cases["MemDLM"]()
            timed = side_by_side(cases, min(3, size.repeats))
            seconds = [t.seconds for t in timed.values()]
            section.rows.append([setting, value, *seconds, timed["MemDLM"].ratio(timed["plain"])])
    return section


def described(shape: Shape) -> str:
    return f"{shape.batch} × {shape.length} tokens"
