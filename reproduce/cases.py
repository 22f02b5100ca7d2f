"""What each figure and table shows: the steps that have to be run, and the points in their folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .logs import logged
from .scales import CONTROLLED, MDLM, MEMDLM, MODELS, RECIPES, Model, Scale, differences
from .scores import ABLATED, ANCHORED, RETRIEVAL, RULER_OFFLINE, TABLES, PlantedWords, Task, read_json
from .steps import Step

PAPER = yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8"))


class Case(NamedTuple):
    """A step whose results a figure shows."""

    labels: dict[str, Any]  #: what each of its points says: backbone, model, seed, …
    step: Step
    read: Callable[[Path], Iterator[dict[str, Any]]]  #: the points in its folder


def points_of(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Every number, with the folder that it is from."""
    return [{**labels, "run": str(step.folder), **point} for labels, step, read in cases for point in read(step.folder)]


def scored(task: Task, scale: Scale, labels: dict[str, Any], model: Model, whose: str, *settings: str) -> Case:
    return Case(labels, task.step(scale, model, whose, *settings), task.read)


def compared(task: Task) -> dict[str, tuple[str, str]]:
    """The models that a task is asked of: lm-eval knows no memory of another text."""
    return CONTROLLED if isinstance(task, PlantedWords) else MODELS


#: The losses of an evaluation with memory.
EVALUATED = ("eval_loss", "eval_loss_memory_off", "eval_loss_memory_prompt", "eval_loss_memory_other")


def pairs(scale: Scale) -> Iterator[Case]:
    """Both methods on each backbone, seeds outermost, so that what is there early is a whole set.

    MemDLM with its recipe's inner learning rate, and with the paper's where that is another one.
    """
    read = partial(logged, keys=("loss", "loss_memory_off", *EVALUATED, "eval_prompt_nll"))
    for seed in scale.seeds:
        for backbone in scale.backbones:
            labels, (rate, *others) = {"backbone": backbone.title, "seed": seed}, scale.rates(backbone)
            yield Case({**labels, "method": MDLM}, scale.run(backbone, MDLM, seed), read)
            yield Case({**labels, "method": MEMDLM, "rate": rate}, scale.run(backbone, MEMDLM, seed), read)
            for other in others:
                run = scale.run(backbone, "paper_rate", seed, **{"memory.inner_lr": other})
                yield Case({**labels, "method": MEMDLM, "rate": other}, run, read)


#: The model before fine-tuning, which has no seed.
BEFORE = "before fine-tuning"


def by_length(scale: Scale) -> Iterator[Case]:
    """Every model on every length."""
    for backbone in scale.backbones:
        labels = {"backbone": backbone.title, "model": BEFORE, "seed": None}
        for task in RETRIEVAL[scale.name]:
            yield scored(task, scale, labels, scale.untuned(backbone), "none")
    for task in RETRIEVAL[scale.name]:
        for labels, model, whose in scale.cases(scale.backbones, compared(task)):
            yield scored(task, scale, labels, model, whose)


def by_ratio(scale: Scale) -> Iterator[Case]:
    for seed in scale.seeds:
        model = Model.of(scale.run(scale.backbones[0], MEMDLM, seed))
        for ratio in PAPER["anchor_ratios"]:
            # The default is scored for figure 3 too, by the same command
            settings = [] if ratio == PAPER["anchor_ratios"][0] else [f"memory_anchor_ratio={ratio}"]
            for task in ANCHORED[scale.name]:
                for label, (_, whose) in compared(task).items():
                    if whose != "none":
                        labels = {"model": label, "ratio": ratio, "seed": seed}
                        yield scored(task, scale, labels, model, whose, *settings)


#: Of denoising; the responses at CPU scale are short.
DENOISING_STEPS = {"cpu": 16, "small": 48, "paper": 48}


def exposed(scale: Scale) -> Iterator[Case]:
    def read(folder: Path) -> Iterator[dict[str, Any]]:
        found = read_json(folder / "scores.json")
        return ({"examples": found["examples"], **step} for step in found["steps"])

    for labels, model, whose in scale.cases(scale.backbones, CONTROLLED):
        arguments = ["--whose", whose, "--examples", str(scale.questions), "--steps", str(DENOISING_STEPS[scale.name])]
        module = "dllm_memdlm.evaluation.exposure_bias"
        yield Case(labels, scale.evaluated(f"exposure-{whose}", model, module, arguments), read)


@cache
def variants() -> dict[str, dict[str, Any]]:
    """What is trained, in order, and what each changes in MemDLM's recipe."""
    names = dict.fromkeys(method for group in PAPER["ablations"].values() for _, method, _ in group)
    folder = RECIPES / "ablations"
    return {name: {} if name in (MDLM, MEMDLM) else differences(folder / f"{name}.yaml") for name in names}


def ablated(scale: Scale) -> Iterator[Case]:
    """Scored as in the paper: what was trained with memory has it at inference too."""
    task = ABLATED[scale.name]
    for seed in scale.seeds:
        for method, changes in variants().items():
            labels = {"method": method, "seed": seed}
            run = scale.run(scale.backbones[0], method, seed, **{**scale.shorter, **changes})
            norms = ("inner_grad_norm_1", "inner_grad_norm_2") if method == MEMDLM else ()
            yield Case(labels, run, partial(logged, keys=(*EVALUATED, *norms)))
            yield scored(task, scale, labels, Model.of(run), "none" if method == MDLM else "own")


#: The paper's name of each model.
TABLE_ROWS = dict(zip(MODELS, PAPER["rows"], strict=True))


def table(name: str, scale: Scale) -> Iterator[Case]:
    """At the smaller scales RULER tasks that read no files, and one seed: it measures nothing."""
    tasks = TABLES[name] if scale.name == "paper" else (RULER_OFFLINE[scale.name],)
    few = scale if scale.name == "paper" else replace(scale, seeds=scale.seeds[:1])
    backbones = [b for b in scale.backbones if scale.name != "paper" or b.title in PAPER[name]]
    for labels, model, whose in few.cases(backbones):
        for task in tasks:
            yield scored(task, scale, {**labels, "model": TABLE_ROWS[labels["model"]]}, model, whose)
