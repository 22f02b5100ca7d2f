"""Tables 1 to 3: RULER, BABILong and LongBench, for MDLM and MemDLM without and with the inner loop at inference.

At the smaller scales the columns are RULER tasks that read no files; on a CPU a few questions each, which shows the way
from a recipe to a table and measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import paper
from .commands import Command
from .curves import over_seeds
from .page import Grid, Page
from .scales import CASES, Backbone, Scale
from .scores import RULER_OFFLINE, TABLES, Task, without_memory

#: The paper's name of each model.
ROWS = dict(zip(CASES, paper.ROWS, strict=True))


@dataclass(frozen=True)
class PaperTable:
    """One table. `printed` is what the paper has, by backbone, row by row."""

    number: int
    title: str
    columns: Sequence[str]
    printed: dict[str, Sequence[Sequence[float]]]
    notes: Sequence[str] = ()

    def stages(self, scale: Scale) -> list[list[Command]]:
        """What has to be run."""
        scale = self._few(scale)
        scores = [command for _, _, _, commands in self._scored(scale) for command in commands]
        return [*scale.bases(self._backbones(scale)), scale.pairs(self._backbones(scale)), scores]

    def page(self, scale: Scale, folder: Path) -> Page:
        """The scores, beside the paper's where they are of the same columns."""
        scale = self._few(scale)
        points = [
            {"backbone": backbone.title, "model": row, "seed": seed, "run": str(command.folder)}
            | {"column": column, "score": score}
            for backbone, row, seed, commands in self._scored(scale)
            for task, command in zip(self._tasks(scale), commands, strict=True)
            for column, score in task.read(command).items()
        ]
        columns = [column for task in self._tasks(scale) for column in task.columns]
        rows = []
        for backbone in self._backbones(scale):
            for number, row in enumerate(paper.ROWS):
                cells = [self._cell(points, backbone, row, column) for column in columns]
                rows.append((backbone.title, row, *cells))
                if backbone.title in self.printed and scale.name == "paper":
                    theirs = dict(zip(self.columns, self.printed[backbone.title][number], strict=True))
                    rows.append(("", "the paper", *(f"{theirs[column]:.2f}" for column in columns)))
        grids = [Grid("Ours, %", ("backbone", "method", *columns), rows)]
        if scale.name != "paper":
            theirs = [
                (title, row, *(f"{score:.2f}" for score in scores))
                for title, printed in self.printed.items()
                for row, scores in zip(paper.ROWS, printed, strict=True)
            ]
            grids.append(Grid("The paper's, %", ("backbone", "method", *self.columns), theirs))
        return Page(
            name=f"table{self.number}",
            title=f"{self.title} (table {self.number})",
            scale=scale.name,
            seeds=scale.seeds,
            about=[scale.about, self._about(scale), *self.notes, *without_memory(self.stages(scale)[-1])],
            points=points,
            tables=grids,
        ).made_by(command for stage in self.stages(scale) for command in stage)

    def _about(self, scale: Scale) -> str:
        if scale.name == "paper":
            return "The tasks, lengths and decoding of the paper, through lm-eval."
        asked = {
            "cpu": "at 2,048 tokens, four questions of each, which measure nothing but show that the way from a recipe "
            "to a table works",
            "small": "at 1,024 tokens, a hundred questions of each",
        }
        return (
            f"RULER tasks that read no files, {asked[scale.name]}; the same for tables 1, 2 and 3. `SCALE=paper` runs "
            "the paper's tasks; its numbers stand below."
        )

    def _few(self, scale: Scale) -> Scale:
        """One seed where nothing is measured."""
        return scale if scale.name == "paper" else replace(scale, seeds=scale.seeds[:1])

    def _backbones(self, scale: Scale) -> list[Backbone]:
        """Those of the paper's table, or all at the other scales."""
        return [b for b in scale.backbones if scale.name != "paper" or b.title in self.printed]

    def _tasks(self, scale: Scale) -> Sequence[Task]:
        return TABLES[self.number] if scale.name == "paper" else (RULER_OFFLINE[scale.name],)

    def _scored(self, scale: Scale) -> Iterator[tuple[Backbone, str, int, list[Command]]]:
        for backbone, label, seed, model, memory in scale.cases(self._backbones(scale)):
            yield backbone, ROWS[label], seed, [task.command(scale, model, memory) for task in self._tasks(scale)]

    def _cell(self, points: Sequence[dict], backbone: Backbone, row: str, column: str) -> str:
        return over_seeds(points, "score", backbone=backbone.title, model=row, column=column).text(2)


TABLE_1 = PaperTable(1, "RULER and BABILong within the context", paper.TABLE_1_COLUMNS, paper.TABLE_1)
TABLE_2 = PaperTable(2, "RULER and BABILong beyond the context", paper.TABLE_2_COLUMNS, paper.TABLE_2)
TABLE_3 = PaperTable(
    *(3, "LongBench", paper.TABLE_3_COLUMNS, paper.TABLE_3),
    notes=("The paper does not say which backbone its table 3 is of; we take it to be LLaDA-MoE.",),
)
