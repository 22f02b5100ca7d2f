"""Figure 3 (v2): retrieval by context length, of the model before fine-tuning, and after it with each method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .charts import Line, Lines, Spread, draw_lines, spread
from .commands import Command
from .curves import over_seeds
from .page import Grid, Page
from .scales import CASES, Backbone, Scale
from .scores import RETRIEVAL, without_memory

BEFORE = "before fine-tuning"
LABELS = (BEFORE, *CASES)


def stages(scale: Scale) -> list[list[Command]]:
    """What has to be run."""
    scores = [command for _, _, _, commands in _scored(scale) for command in commands]
    return [*scale.bases(scale.backbones), scale.pairs(scale.backbones), scores]


def page(scale: Scale, folder: Path) -> Page:
    """Draw figure3.png, and put the numbers beside it."""
    points = []
    for backbone, label, seed, commands in _scored(scale):
        for task, command in zip(RETRIEVAL[scale.name], commands, strict=True):
            head = {"backbone": backbone.title, "model": label, "seed": seed, "run": str(command.folder)}
            points += [{**head, "column": column, "score": score} for column, score in task.read(command).items()]
    columns = [column for task in RETRIEVAL[scale.name] for column in task.columns]
    folder.mkdir(parents=True, exist_ok=True)
    charts = [[draw(backbone, columns, points) for backbone in scale.backbones] for draw in (_chart, _differences)]
    draw_lines(charts, folder / "figure3.png")
    rows = [
        (backbone.title, label, *(score.text(1) for score in _scores(points, backbone, label, columns)))
        for backbone in scale.backbones
        for label in LABELS
    ]
    return Page(
        name="figure3",
        title="Before and after fine-tuning, by context length (figure 3)",
        scale=scale.name,
        seeds=scale.seeds,
        about=[
            scale.about,
            f"Asked: {RETRIEVAL[scale.name][0].asked(scale)}, at each length. The model before fine-tuning is one for "
            "all seeds.",
            "The paper finds that MDLM's fine-tuning takes something away from the model at 1K and 2K, and that MemDLM "
            "stays above both from 1K to 32K.",
            *without_memory(command for _, _, _, commands in _scored(scale) for command in commands),
        ],
        points=points,
        pictures={
            "figure3.png": "Share of right answers, and how far MemDLM's is from MDLM's of the same seed. Band: a "
            "standard deviation over the seeds."
        },
        tables=[Grid("%, mean ± standard deviation over the seeds", ("backbone", "model", *columns), rows)],
    ).made_by(command for stage in stages(scale) for command in stage)


def _scored(scale: Scale) -> Iterator[tuple[Backbone, str, int | None, list[Command]]]:
    """Every model with the commands that score it; the one before fine-tuning has no seed."""
    tasks = RETRIEVAL[scale.name]
    for backbone in scale.backbones:
        untuned = scale.untuned(backbone)
        yield backbone, BEFORE, None, [task.command(scale, untuned, memory=False) for task in tasks]
    for backbone, label, seed, model, memory in scale.cases(scale.backbones):
        yield backbone, label, seed, [task.command(scale, model, memory) for task in tasks]


def _scores(points: list[dict[str, Any]], backbone: Backbone, label: str, columns: list[str]) -> list[Spread]:
    return [over_seeds(points, "score", backbone=backbone.title, model=label, column=column) for column in columns]


def _chart(backbone: Backbone, columns: list[str], points: list[dict[str, Any]]) -> Lines:
    lines = [Line(label, columns, _scores(points, backbone, label, columns)) for label in LABELS]
    return Lines(backbone.title, "length of the text", "right answers (%)", lines)


def _differences(backbone: Backbone, columns: list[str], points: list[dict[str, Any]]) -> Lines:
    """MemDLM's scores less those of MDLM's model of the same seed."""
    scores = {
        (point["model"], point["seed"], point["column"]): point["score"]
        for point in points
        if point["backbone"] == backbone.title
    }
    seeds = dict.fromkeys(seed for label, seed, _ in scores if label == "MDLM")
    lines = [
        Line(label, columns, [spread([scores[label, s, c] - scores["MDLM", s, c] for s in seeds]) for c in columns])
        for label in LABELS
        if label not in (BEFORE, "MDLM")
    ]
    return Lines(backbone.title, "length of the text", "right answers − MDLM's (points)", lines, zero=True)
