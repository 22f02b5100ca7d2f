"""Figure 3 (v2): retrieval by context length, of the model before fine-tuning, and after it with each method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .commands import Command
from .curves import Spread, spread
from .lines import Chart, Line, draw_lines
from .page import Grid, Page
from .scales import MDLM, MEMDLM, Backbone, Model, Scale
from .scores import RETRIEVAL


class Case(NamedTuple):
    """A model and whether it adapts to what it is asked."""

    label: str
    method: str | None  #: none is the model before fine-tuning
    memory: bool


CASES = (
    Case("before fine-tuning", None, False),
    Case("MDLM", MDLM, False),
    Case("MemDLM, memory off", MEMDLM, False),
    Case("MemDLM, memory on", MEMDLM, True),
)


def stages(scale: Scale) -> list[list[Command]]:
    """What has to be run."""
    runs = [scale.run(b, method, seed) for seed in scale.seeds for b in scale.backbones for method in (MDLM, MEMDLM)]
    scores = [command for _, _, _, commands in _scored(scale) for command in commands]
    return [*scale.bases(scale.backbones), runs, scores]


def page(scale: Scale, folder: Path) -> Page:
    """Draw figure3.png, and put the numbers beside it."""
    points = []
    for backbone, case, seed, commands in _scored(scale):
        for task, command in zip(RETRIEVAL[scale.name], commands, strict=True):
            head = {"backbone": backbone.title, "model": case.label, "seed": seed, "run": str(command.folder)}
            points += [{**head, "column": column, "score": score} for column, score in task.read(command).items()]
    columns = [column for task in RETRIEVAL[scale.name] for column in task.columns]
    folder.mkdir(parents=True, exist_ok=True)
    draw_lines([[_chart(backbone, columns, points) for backbone in scale.backbones]], folder / "figure3.png")
    rows = [
        (backbone.title, case.label, *(_over_seeds(points, backbone, case, column).text(1) for column in columns))
        for backbone in scale.backbones
        for case in CASES
    ]
    return Page(
        name="figure3",
        title="Before and after fine-tuning, by context length (figure 3)",
        scale=scale.name,
        seeds=scale.seeds,
        about=[
            scale.about,
            f"{scale.questions} texts of each length that training has not seen; the model before fine-tuning is one "
            "for all seeds.",
            "The paper finds that MDLM's fine-tuning takes something away from the model at 1K and 2K, and that MemDLM "
            "stays above both from 1K to 32K.",
        ],
        points=points,
        pictures={"figure3.png": "Share of right answers. Band: a standard deviation over the seeds."},
        tables=[Grid("%, mean ± standard deviation over the seeds", ("backbone", "model", *columns), rows)],
    ).made_by(command for stage in stages(scale) for command in stage)


def _scored(scale: Scale) -> Iterator[tuple[Backbone, Case, int | None, list[Command]]]:
    """Every model with the commands that score it."""
    for seed in scale.seeds:
        for backbone in scale.backbones:
            for case in CASES:
                if case.method is not None:
                    model = Model.of(scale.run(backbone, case.method, seed))
                elif seed == scale.seeds[0]:
                    model = scale.untuned(backbone)
                else:
                    continue
                tasks = RETRIEVAL[scale.name]
                yield backbone, case, seed, [task.command(scale, model, case.memory) for task in tasks]


def _over_seeds(points: list[dict[str, Any]], backbone: Backbone, case: Case, column: str) -> Spread:
    wanted = (backbone.title, case.label, column)
    return spread([p["score"] for p in points if (p["backbone"], p["model"], p["column"]) == wanted])


def _chart(backbone: Backbone, columns: list[str], points: list[dict[str, Any]]) -> Chart:
    lines = [Line(c.label, columns, [_over_seeds(points, backbone, c, column) for column in columns]) for c in CASES]
    return Chart(backbone.title, "length of the text", "right answers (%)", lines)
