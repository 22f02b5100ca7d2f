"""Scoring a trained model: a command for each, and its scores in % by column.

On a CPU the figures' task is ours (`needle.py`); all else is lm-eval's RULER, BABILong and LongBench, with
the configurations of recipes/eval.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import yaml

from dllm_memdlm.config import ConfigError
from dllm_memdlm.method.prompt_memory import Tally

from .commands import Command
from .demo import RECIPE_FOLDER
from .scales import Model, Scale, flat


class Task(Protocol):
    """Something to score models on."""

    @property
    def columns(self) -> Sequence[str]:
        """What it gives a score for."""

    def asked(self, scale: Scale) -> str:
        """How much is asked, in words."""

    def command(self, scale: Scale, model: Model, memory: bool, settings: Sequence[str] = ()) -> Command:
        """Score a model, with settings of decoding and memory as memdlm generate takes them."""

    def read(self, command: Command) -> dict[str, float]:
        """The scores of a command that is done, in %, by column."""


@dataclass(frozen=True)
class PlantedWords:
    """Words found in texts of several lengths."""

    words: tuple[int, ...]

    @property
    def columns(self) -> list[str]:
        return [f"{words} words" for words in self.words]

    def asked(self, scale: Scale) -> str:
        return f"eight words in each of {scale.questions} texts that training has not seen"

    def command(self, scale: Scale, model: Model, memory: bool, settings: Sequence[str] = ()) -> Command:
        arguments = ["--words", *map(str, self.words), "--questions", str(scale.questions)]
        name = _name("needle", "-".join(map(str, self.words)), memory, settings)
        # The settings stand first: behind `--words` they would be read as lengths.
        arguments = [*settings, *["--memory"] * memory, *arguments]
        return scale.evaluated(name, model, "reproduce.needle", arguments)

    def read(self, command: Command) -> dict[str, float]:
        scores = json.loads((command.folder / "scores.json").read_text(encoding="utf-8"))["scores"]
        return {f"{row['words']} words": 100 * row["right"] / row["asked"] for row in scores}


@dataclass(frozen=True)
class Harness:
    """One run of lm-eval.

    Args:
        config: a file of recipes/eval, without .yaml.
        cells: where a column's score stands in lm-eval's results: (column, task, metric). A column with several cells
            is their mean.
        lengths: `max_seq_lengths` of the task's data, where it is not the configuration's.
    """

    config: str
    cells: tuple[tuple[str, str, str], ...]
    lengths: str | None = None

    @property
    def columns(self) -> list[str]:
        return [*dict.fromkeys(column for column, _, _ in self.cells)]

    @property
    def _path(self) -> Path:
        return RECIPE_FOLDER / "eval" / f"{self.config}.yaml"

    def asked(self, scale: Scale) -> str:
        return f"what {os.path.relpath(self._path)} asks"

    def command(self, scale: Scale, model: Model, memory: bool, settings: Sequence[str] = ()) -> Command:
        folder = model.scores / _name(self.config, self.lengths or "", memory, settings)
        arguments = [f"pretrained={model.pretrained}", "max_length=65536", *scale.model_args]
        arguments += [*["memory=true"] * memory, *settings]
        argv = [*scale.harness, "--config", os.path.relpath(self._path), "--model_args", ",".join(arguments)]
        if self.lengths is not None:
            argv += ["--metadata", f"max_seq_lengths={self.lengths}"]
        made_from = flat(yaml.safe_load(self._path.read_text(encoding="utf-8")))
        argv += ["--output_path", str(folder)]
        return Command(folder, tuple(argv), dict(made_from), model.made_by, scale.env)

    def read(self, command: Command) -> dict[str, float]:
        results = newest_results(command.folder)["results"]
        scores: dict[str, list[float]] = {}
        for column, task, metric in self.cells:
            scores.setdefault(column, []).append(100 * results[task][f"{metric},none"])
        return {column: fmean(values) for column, values in scores.items()}


def newest_results(folder: Path) -> dict[str, Any]:
    """What the last run of lm-eval that wrote to a folder has left. Raises ConfigError if there is none."""
    files = sorted(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ConfigError(f"{folder}: lm-eval has written no results_*.json there")
    return json.loads(files[-1].read_text(encoding="utf-8"))


def without_memory(commands: Iterable[Command]) -> list[str]:
    """A sentence on prompts that were asked with memory and decoded without, if there are such."""
    total = Tally()
    for command in dict.fromkeys(commands):
        own = command.folder / "scores.json"
        report = (
            json.loads(own.read_text(encoding="utf-8")) if own.exists() else newest_results(command.folder)["config"]
        )
        for field in fields(Tally):
            number = getattr(total, field.name) + report.get("memory_tally", {}).get(field.name, 0)
            setattr(total, field.name, number)
    lost = total.failures()
    return [f"Prompts that were to have a memory and were decoded without: {lost}."] if lost else []


def mean_score(scores: dict[str, float]) -> float:
    """The mean over the columns."""
    return fmean(scores.values())


def _name(task: str, lengths: str, memory: bool, settings: Sequence[str]) -> str:
    """A folder for each way to score a model."""
    parts = [task, lengths.strip("[]").replace(",", "-"), "memory" if memory else "off", *settings]
    return "-".join(part.replace("=", "-").replace("_", "-") for part in parts if part)


def _ruler(lengths: dict[str, int]) -> Harness:
    tasks = {"MV": "niah_multivalue", "VT": "ruler_vt", "CWE": "ruler_cwe"}
    cells = [(f"{column} {name}", task, str(n)) for column, task in tasks.items() for name, n in lengths.items()]
    return Harness("ruler", tuple(cells), json.dumps([*lengths.values()], separators=(",", ":")))


def _babilong(name: str) -> Harness:
    return Harness("babilong", ((f"BABI {name}", "babilong_longctx", "acc"),), name.lower())


_OFFLINE = {
    "NIAH": "niah_single_1",
    "MK-2": "niah_multikey_2",
    "MK-3": "niah_multikey_3",
    "VT": "ruler_vt",
    "CWE": "ruler_cwe",
    "FWE": "ruler_fwe",
}


def _offline(length: int, name: str) -> Harness:
    """The mean of those tasks at one length."""
    cells = tuple((name, task, str(length)) for task in _OFFLINE.values())
    return Harness("ruler_small", cells, f"[{length}]")


def _each_offline(config: str, length: int, name: str) -> Harness:
    """A column for each of them."""
    cells = tuple((f"{column} {name}", task, str(length)) for column, task in _OFFLINE.items())
    return Harness(config, cells, f"[{length}]")


#: RULER that reads no files, in place of the tables' tasks. With a vocabulary of 2,048 the question alone of ruler_vt
#: takes more than 1,024 tokens, and lm-eval would try for ever to make it shorter.
RULER_OFFLINE = {
    "cpu": _each_offline("ruler_offline", 2048, "2K"),
    "small": _each_offline("ruler_small", 1024, "1K"),
}

#: Retrieval by context length, at each scale.
RETRIEVAL: dict[str, tuple[Task, ...]] = {
    "cpu": (PlantedWords((40, 80, 160, 320)),),
    "small": (_offline(1024, "1K"), _offline(2048, "2K"), _offline(4096, "4K")),
    "paper": tuple(_babilong(name) for name in ("1K", "2K", "4K", "8K", "16K", "32K")),
}

#: What the anchor ratio at inference is tried on: the paper stops at 16K.
ANCHORED = {**RETRIEVAL, "paper": RETRIEVAL["paper"][:-1]}

#: What ablations are scored on.
ABLATED: dict[str, Task] = {"cpu": PlantedWords((160,)), "small": _offline(1024, "1K"), "paper": _babilong("1K")}

#: The tables of the paper, by number: what each backbone is scored on.
TABLES: dict[int, tuple[Task, ...]] = {
    1: (
        _ruler({"4K": 4096, "8K": 8192}),
        *(_babilong(name) for name in ("2K", "4K", "8K")),
    ),
    2: (
        _ruler({"16K": 16384, "32K": 32768}),
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
