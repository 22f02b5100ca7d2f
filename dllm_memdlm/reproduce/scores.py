"""Scoring a trained model: a command for each, and its scores in % by column.

On a CPU the task is ours (`evaluation/needle.py`), at the other scales lm-eval's RULER, BABILong and LongBench, with
the configurations of recipes/eval.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from ..config import ConfigError
from ..demo import RECIPE_FOLDER
from .commands import Command
from .scales import Model, Scale


class Task(Protocol):
    """Something to score models on."""

    @property
    def columns(self) -> Sequence[str]:
        """What it gives a score for."""

    def command(self, scale: Scale, model: Model, memory: bool, settings: Sequence[str] = ()) -> Command:
        """Score the model of a run, with settings of decoding and memory as memdlm-generate takes them."""

    def read(self, command: Command) -> dict[str, float]:
        """The scores of a command that is done, in %, by column."""


@dataclass(frozen=True)
class Needles:
    """Words found in texts of several lengths."""

    words: tuple[int, ...]

    @property
    def columns(self) -> list[str]:
        return [f"{words} words" for words in self.words]

    def command(self, scale: Scale, model: Model, memory: bool, settings: Sequence[str] = ()) -> Command:
        arguments = ["--words", *map(str, self.words), "--questions", str(scale.questions)]
        # The settings stand first: behind `--words` they would be read as lengths.
        name = _name("needle", "-".join(map(str, self.words)), memory, settings)
        return scale.evaluated(
            name, model, "dllm_memdlm.evaluation.needle", [*settings, *["--memory"] * memory, *arguments]
        )

    def read(self, command: Command) -> dict[str, float]:
        scores = json.loads((command.folder / "scores.json").read_text(encoding="utf-8"))["scores"]
        return {f"{row['words']} words": 100 * row["right"] / row["asked"] for row in scores}


@dataclass(frozen=True)
class Harness:
    """One run of lm-eval.

    Args:
        config: a file of recipes/eval, without .yaml.
        cells: where a column's score stands in lm-eval's results: (task, metric).
        lengths: `max_seq_lengths` of the task's data, where it is not the configuration's.
    """

    config: str
    cells: tuple[tuple[str, str, str], ...]  #: column, task, metric
    lengths: str | None = None

    @property
    def columns(self) -> list[str]:
        return [column for column, _, _ in self.cells]

    def command(self, scale: Scale, model: Model, memory: bool, settings: Sequence[str] = ()) -> Command:
        name = _name(self.config, self.lengths or "", memory, settings)
        folder = model.scores / name
        arguments = [f"pretrained={model.pretrained}", "max_length=65536", *["memory=true"] * memory, *settings]
        config = os.path.relpath(RECIPE_FOLDER / "eval" / f"{self.config}.yaml")
        argv = ["-m", "dllm_memdlm.evaluate", "run", "--config", config, "--model_args", ",".join(arguments)]
        if self.lengths is not None:
            argv += ["--metadata", f"max_seq_lengths={self.lengths}"]
        return Command(folder, (*argv, "--output_path", str(folder)), env=scale.env)

    def read(self, command: Command) -> dict[str, float]:
        results = newest_results(command.folder)
        return {column: 100 * results[task][f"{metric},none"] for column, task, metric in self.cells}


def newest_results(folder: Path) -> dict[str, Any]:
    """The results of the last run of lm-eval that wrote to a folder, by task. Raises ConfigError if there is none."""
    files = sorted(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ConfigError(f"{folder}: lm-eval has written no results_*.json there")
    return json.loads(files[-1].read_text(encoding="utf-8"))["results"]


def mean_score(scores: dict[str, float]) -> float:
    """The mean over the columns."""
    return fmean(scores.values())


def _name(task: str, lengths: str, memory: bool, settings: Sequence[str]) -> str:
    """A folder for each way to score a model."""
    parts = [task, lengths.strip("[]").replace(",", "-"), "memory" if memory else "off", *settings]
    return "-".join(part.replace("=", "-").replace("_", "-") for part in parts if part)


def _ruler(length: int, name: str) -> tuple[tuple[str, str, str], ...]:
    tasks = {"MV": "niah_multivalue", "VT": "ruler_vt", "CWE": "ruler_cwe"}
    return tuple((f"{column} {name}", task, str(length)) for column, task in tasks.items())


def _babilong(name: str) -> Harness:
    return Harness("babilong", ((f"BABI {name}", "babilong_longctx", "acc"),), name.lower())


_OFFLINE = tuple(
    (f"{column} 1K", task, "1024")
    for column, task in (
        ("NIAH", "niah_single_1"),
        ("MK-2", "niah_multikey_2"),
        ("MK-3", "niah_multikey_3"),
        ("VT", "ruler_vt"),
        ("CWE", "ruler_cwe"),
        ("FWE", "ruler_fwe"),
    )
)

#: RULER that reads no files, in place of the tables' tasks.
RULER_OFFLINE = {"cpu": Harness("ruler_offline", _OFFLINE), "small": Harness("ruler_small", _OFFLINE)}

#: Retrieval by context length, at each scale.
RETRIEVAL: dict[str, tuple[Task, ...]] = {
    "cpu": (Needles((40, 80, 160, 320)),),
    "small": (RULER_OFFLINE["small"],),
    "paper": tuple(_babilong(name) for name in ("1K", "2K", "4K", "8K", "16K", "32K")),
}

#: What ablations are scored on.
ABLATED: dict[str, Task] = {"cpu": Needles((160,)), "small": RULER_OFFLINE["small"], "paper": _babilong("1K")}

#: The tables of the paper, by number: what each backbone is scored on.
TABLES: dict[int, tuple[Task, ...]] = {
    1: (
        Harness("ruler", _ruler(4096, "4K") + _ruler(8192, "8K"), "[4096,8192]"),
        *(_babilong(name) for name in ("2K", "4K", "8K")),
    ),
    2: (
        Harness("ruler", _ruler(16384, "16K") + _ruler(32768, "32K"), "[16384,32768]"),
        *(_babilong(name) for name in ("16K", "32K")),
    ),
    3: (
        Harness(
            "longbench",
            tuple(
                (column, f"longbench_{task}", "score")
                for column, task in (
                    ("TriviaQA", "triviaqa"),
                    ("PR-en", "passage_retrieval_en"),
                    ("PR-zh", "passage_retrieval_zh"),
                    ("MF-en", "multifieldqa_en"),
                    ("MF-zh", "multifieldqa_zh"),
                    ("2WikiQA", "2wikimqa"),
                    ("DuReader", "dureader"),
                    ("MultiNews", "multi_news"),
                    ("TREC", "trec"),
                    ("SAMSum", "samsum"),
                    ("LCC", "lcc"),
                    ("RB-P", "repobench-p"),
                )
            ),
        ),
    ),
}
