"""What a figure or table leaves in `reports/`: the pictures, and one JSON file with every number behind them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .commands import Command


@dataclass(frozen=True)
class Grid:
    """A table of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Page:
    """One figure or table of the paper, at one scale.

    The JSON file has a line for each of `points`; a point names the run that it was taken from, by its folder.
    """

    name: str  #: of the folder and of the JSON file
    title: str
    scale: str
    about: Sequence[str]  #: paragraphs: what was run, what it shows, and what it does not
    points: list[dict[str, Any]]  #: what is drawn or tabled
    pictures: dict[str, str] = field(default_factory=dict)  #: files in the folder, and what they show
    tables: Sequence[Grid] = ()
    seeds: Sequence[int] = ()
    commands: Sequence[dict[str, Any]] = ()  #: line, folder and seconds of each
    versions: dict[str, str] = field(default_factory=dict)
    devices: Sequence[str] = ()

    def made_by(self, commands: Iterable[Command]) -> Page:
        """Note the commands, all done, and what they ran on."""
        records = {command: command.record() for command in dict.fromkeys(commands)}
        self.commands = [
            {"command": command.line, "folder": str(command.folder), "seconds": record["seconds"]}
            for command, record in records.items()
        ]
        found: dict[str, list[str]] = {}
        for record in records.values():
            for name, version in record["versions"].items():
                found.setdefault(name, []).append(version)
        self.versions = {name: " and ".join(dict.fromkeys(versions)) for name, versions in found.items()}
        self.devices = [*dict.fromkeys(device for record in records.values() for device in record["devices"])]
        return self

    def write(self, folder: Path) -> Path:
        """Write the JSON file beside the pictures."""
        head = {key: value for key, value in asdict(self).items() if key not in ("points", "commands")}
        text = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
        for name in ("commands", "points"):
            lines = ",\n".join(f"    {json.dumps(entry, ensure_ascii=False)}" for entry in getattr(self, name))
            text += f',\n  "{name}": [\n{lines}\n  ]'
        path = folder / f"{self.name}.json"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n}\n", encoding="utf-8")
        return path


def read_page(path: Path) -> Page:
    """The inverse of `Page.write`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return Page(**{**content, "tables": [Grid(**table) for table in content["tables"]]})
