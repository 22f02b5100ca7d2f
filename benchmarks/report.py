"""Tables of measurements: on the terminal, as JSON and as Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table


class Range(NamedTuple):
    """A ratio that was measured several times."""

    median: float
    smallest: float
    largest: float


Cell = str | int | float | Range | None


def console() -> Console:
    """A console; of a log, as wide as no table need be squeezed."""
    made = Console(highlight=False, log_path=False)
    if not made.is_terminal:
        made.width = 200
    return made


@dataclass
class Section:
    """One table. A cell is text, a number, a range of them, or none where something was not measured."""

    title: str
    columns: list[str]
    note: str = ""
    rows: list[list[Cell]] = field(default_factory=list)

    def print(self, console: Console) -> None:
        table = Table(title=self.title, title_justify="left", title_style="bold")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*(escape(text(cell)) for cell in row))
        console.print()
        console.print(table)
        if self.note:
            console.print(self.note, style="dim")

    def markdown(self) -> str:
        lines = [f"## {self.title}", ""]
        for row in (self.columns, ["---"] * len(self.columns), *self.rows):
            lines.append(f"| {' | '.join(map(text, row))} |")
        return "\n".join([*lines, "", self.note]).rstrip() + "\n"


def text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, Range):
        return f"{cell.median:.2f} ({cell.smallest:.2f}-{cell.largest:.2f})"
    if isinstance(cell, float):
        return f"{cell:.2f}" if abs(cell) >= 0.1 or cell == 0 else f"{cell:.2g}"
    return str(cell)


def write(
    sections: list[Section], title: str, facts: dict[str, Any], folder: Path, name: str, appendix: str = ""
) -> list[Path]:
    """`name`.json and `name`.md, the latter with an appendix. Returns their paths.

    A process that is killed leaves the old ones or the new ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / f"{name}.json", folder / f"{name}.md"
    _replace(data, json.dumps({**facts, "sections": [asdict(section) for section in sections]}, indent=2) + "\n")
    about = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    _replace(page, "\n".join([f"# {title}", "", about, "", *(section.markdown() for section in sections), appendix]))
    return [data, page]


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
