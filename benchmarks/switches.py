"""What each optimisation of the training step brings: the step with it switched off."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from dllm_memdlm.backbones import grouped, staged_backbone
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.training.trainer import MemDLMTrainer

from . import steps
from .device import peak_memory
from .report import Section
from .steps import PLAIN, Step
from .timing import side_by_side
from .training import Bench, Size, described


def switches(size: Size) -> Section:
    """Each optimisation switched off by itself, then all of them."""
    section = Section(
        title=f"With an optimisation switched off, {size.base}",
        columns=["off", "plain s", "÷ with all", "MemDLM s", "÷ with all", "peak plain MB", "peak MemDLM MB"],
        note=f"{described(size.base)}; wall time, {torch.get_num_threads()} threads, medians of {min(3, size.repeats)} "
        "turns; peaks beyond the weights. '-': plain MDLM has no such thing.",
    )
    bench = Bench(size, size.base)
    cases: dict[str, Step] = {}
    for name in ("nothing", *SWITCHES, "all of these"):
        off = list(SWITCHES.values()) if name == "all of these" else [SWITCHES[name]] if name in SWITCHES else []
        cases[f"{name}/plain"] = switched(bench, PLAIN, off)
        cases[f"{name}/MemDLM"] = switched(bench, MemoryConfig(), off)
    timed = side_by_side(cases, min(3, size.repeats), warm=True)
    peak = {name: peak_memory(case) / 1e6 for name, case in cases.items()}
    for name in ("nothing", *SWITCHES, "all of these"):
        row: list[Any] = [name]
        for kind in ("plain", "MemDLM"):
            own = f"{name}/{kind}"
            row += [timed[own].seconds, timed[own].ratio(timed[f"nothing/{kind}"])]
        row += [peak[f"{name}/plain"], peak[f"{name}/MemDLM"]]
        if name in OF_MEMORY:
            row[1], row[2], row[5] = None, None, None
        section.rows.append(row)
    return section


Switch = Callable[[MemDLMTrainer, dict[str, Tensor]], Any]


def switched(bench: Bench, memory: MemoryConfig, off: list[Switch]) -> Step:
    trainer, batch = steps.trainer_of(bench.model, memory), bench.batch(memory)

    def step() -> float:
        with ExitStack() as stack:
            changed = dict(batch)
            for switch in off:
                stack.enter_context(switch(trainer, changed))
            return steps.ours(trainer, changed)()

    return step


def _positions_everywhere(trainer: MemDLMTrainer, batch: dict[str, Tensor]) -> Any:
    everywhere = torch.arange(batch["input_ids"].shape[1]).expand(len(batch["input_ids"]), -1)
    return patch.dict(batch, {name: everywhere for name in batch if name.startswith("loss_index")})


def _whole_logits(trainer: MemDLMTrainer, batch: dict[str, Tensor]) -> Any:
    backbone = staged_backbone(trainer.model)
    plain = nn.Linear(*reversed(backbone.lm_head.weight.shape), bias=False, device="meta")
    plain.weight = backbone.lm_head.weight
    return patch.object(backbone, "lm_head", plain)


def _anchor_again(trainer: MemDLMTrainer, batch: dict[str, Tensor]) -> Any:
    memory = trainer.memory
    if memory is None:
        return nullcontext()
    write = memory.write
    return patch.object(memory, "write", lambda *args, anchor_prefix, **kwargs: write(*args, **kwargs))


SWITCHES: dict[str, Switch] = {
    "all experts at once": lambda trainer, batch: patch.object(grouped, "_KERNEL_DTYPES", ()),
    "loss at masked positions only": _positions_everywhere,
    "the last layer's queries and FFN at those only": lambda trainer, batch: patch.object(
        staged_backbone(trainer.model), "layers_take_queries", False
    ),
    "loss without whole logits": _whole_logits,
    "the anchor's prefix once": _anchor_again,
    "inner loop in the suffix only": lambda trainer, batch: (
        nullcontext() if trainer.memory is None else patch.object(trainer.memory, "boundary", 0)
    ),
}
OF_MEMORY = ("the anchor's prefix once", "inner loop in the suffix only")
