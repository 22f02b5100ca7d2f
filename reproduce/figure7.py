"""Figure 7: the masked ratio of the prompt's anchor at inference, by context length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .charts import Line, Lines, draw_lines
from .commands import Command
from .curves import over_seeds
from .page import Grid, Page
from .paper import ANCHOR_RATIOS
from .scales import MEMDLM, Model, Scale
from .scores import ANCHORED, without_memory


def stages(scale: Scale) -> list[list[Command]]:
    """What has to be run."""
    runs = [scale.run(scale.backbones[0], MEMDLM, seed) for seed in scale.seeds]
    return [*scale.bases(scale.backbones[:1]), runs, [c for _, _, commands in _scored(scale) for c in commands]]


def page(scale: Scale, folder: Path) -> Page:
    """Draw figure7.png, and put the numbers beside it."""
    tasks = ANCHORED[scale.name]
    columns = [column for task in tasks for column in task.columns]
    points = [
        {"ratio": ratio, "seed": seed, "run": str(command.folder), "column": column, "score": score}
        for ratio, seed, commands in _scored(scale)
        for task, command in zip(tasks, commands, strict=True)
        for column, score in task.read(command).items()
    ]
    scores = {
        column: [over_seeds(points, "score", ratio=ratio, column=column) for ratio in ANCHOR_RATIOS]
        for column in columns
    }
    lines = [Line(column, ANCHOR_RATIOS, scores[column]) for column in columns]
    folder.mkdir(parents=True, exist_ok=True)
    draw_lines(
        [[Lines(scale.backbones[0].title, "masked ratio of the anchor", "right answers (%)", lines)]],
        folder / "figure7.png",
    )
    means = {column: [score.mean for score in scores[column]] for column in columns}
    widest = max(columns, key=lambda column: max(means[column]) - min(means[column]))
    rows = [
        (f"{ratio:g}", *(scores[column][place].text(1) for column in columns))
        for place, ratio in enumerate(ANCHOR_RATIOS)
    ]
    return Page(
        name="figure7",
        title="Anchor ratio at inference (figure 7)",
        scale=scale.name,
        seeds=scale.seeds,
        about=[
            scale.about,
            f"{scale.backbones[0].title}, trained with memory and with it on; asked: "
            f"{ANCHORED[scale.name][0].asked(scale)}, at each length.",
            "The paper finds the ratio to make next to no difference from 1K to 16K (at 16K all scores are within 2 "
            f"points). Ours differ by at most {max(means[widest]) - min(means[widest]):.1f} points, at {widest}.",
            *without_memory(command for _, _, commands in _scored(scale) for command in commands),
        ],
        points=points,
        pictures={"figure7.png": "Share of right answers. Band: a standard deviation over the seeds."},
        tables=[Grid("%, mean ± standard deviation over the seeds", ("ratio", *columns), rows)],
    ).made_by(command for stage in stages(scale) for command in stage)


def _scored(scale: Scale) -> Iterator[tuple[float, int, list[Command]]]:
    for seed in scale.seeds:
        model = Model.of(scale.run(scale.backbones[0], MEMDLM, seed))
        for ratio in ANCHOR_RATIOS:
            # The default is scored for figure 3 too, by the same command
            settings = [] if ratio == ANCHOR_RATIOS[0] else [f"memory_anchor_ratio={ratio}"]
            yield ratio, seed, [task.command(scale, model, True, settings) for task in ANCHORED[scale.name]]
