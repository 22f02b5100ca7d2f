"""Figure 11: exposure bias, the loss on what the model unmasked itself over that on the true text, step by step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .charts import Line, Lines, Spread, draw_lines
from .commands import Command
from .curves import over_seeds
from .page import Grid, Page
from .scales import CASES, Backbone, Scale
from .scores import without_memory

#: What is drawn of each step, with the axis' label.
MEASURES = {
    "ratio": "$L_{seq} / L_{static}$",
    "static": "$L_{static}$ (nats a token)",
    "sequential": "$L_{seq}$ (nats a token)",
}

STEPS = {"cpu": 16, "small": 48, "paper": 48}  #: of denoising; the responses at CPU scale are short


def stages(scale: Scale) -> list[list[Command]]:
    """What has to be run."""
    measured = [command for _, _, _, command in _measured(scale)]
    return [*scale.bases(scale.backbones), scale.pairs(scale.backbones), measured]


def page(scale: Scale, folder: Path) -> Page:
    """Draw figure11.png, and put the numbers beside it."""
    points, examples = [], set()
    for backbone, label, seed, command in _measured(scale):
        measured = json.loads((command.folder / "scores.json").read_text(encoding="utf-8"))
        head = {"backbone": backbone.title, "model": label, "seed": seed, "run": str(command.folder)}
        points += [{**head, **step} for step in measured["steps"]]
        examples.add(measured["examples"])
    folder.mkdir(parents=True, exist_ok=True)
    charts = [[_chart(backbone, measure, points) for measure in MEASURES] for backbone in scale.backbones]
    draw_lines(charts, folder / "figure11.png")
    shown = [STEPS[scale.name] * part // 4 for part in (1, 2, 3)] + [STEPS[scale.name] - 1]
    rows = [
        (backbone.title, label, *(_at(points, backbone, label, "ratio", step).text(2) for step in shown))
        for backbone in scale.backbones
        for label in CASES
    ]
    return Page(
        name="figure11",
        title="Exposure bias (figure 11)",
        scale=scale.name,
        seeds=scale.seeds,
        about=[
            scale.about,
            f"{' or '.join(map(str, sorted(examples)))} held-out examples, {STEPS[scale.name]} steps. L_static: nats a "
            "token on the true text with that share of the response masked; L_seq: on the text that the model has "
            "unmasked itself, most confident tokens first. Both score the true tokens at the positions still masked.",
            "With the memory on, it is in place in both. The authors' script has it in L_seq alone, and takes the mean "
            "of each example's mean where we count all tokens alike; the paper's text settles neither.",
            "The paper: MDLM's ratio climbs past 20 in 48 steps; MemDLM's stays nearly flat, with the memory on "
            "flatter still.",
            *without_memory(command for _, _, _, command in _measured(scale)),
        ],
        points=points,
        pictures={"figure11.png": "Exposure bias and its two losses. Band: a standard deviation over the seeds."},
        tables=[
            Grid(
                "R_EB, mean ± standard deviation over the seeds",
                ("backbone", "model", *(f"step {step}" for step in shown)),
                rows,
            )
        ],
    ).made_by(command for stage in stages(scale) for command in stage)


def _measured(scale: Scale) -> Iterator[tuple[Backbone, str, int, Command]]:
    for backbone, label, seed, model, memory in scale.cases(scale.backbones):
        arguments = [*["--memory"] * memory, "--examples", str(scale.questions), "--steps", str(STEPS[scale.name])]
        name, module = f"exposure-{'memory' if memory else 'off'}", "dllm_memdlm.evaluation.exposure_bias"
        yield backbone, label, seed, scale.evaluated(name, model, module, arguments)


def _at(points: list[dict[str, Any]], backbone: Backbone, label: str, measure: str, step: int) -> Spread:
    return over_seeds(points, measure, backbone=backbone.title, model=label, step=step)


def _chart(backbone: Backbone, measure: str, points: list[dict[str, Any]]) -> Lines:
    steps = sorted({point["step"] for point in points})
    lines = [Line(label, steps, [_at(points, backbone, label, measure, s) for s in steps]) for label in CASES]
    return Lines(backbone.title, "denoising step", MEASURES[measure], lines)
