"""Scoring a trained model: a step for each way, and its scores in % by column.

On a CPU the figures' task is ours (`needle.py`); all else is lm-eval's RULER, BABILong and LongBench, with
the configurations of recipes/eval.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from dllm_memdlm.config import ConfigError

from .needle import NEEDLES, PLACES
from .scales import RECIPES, Model, Scale
from .steps import FOLDER, Step


@dataclass(frozen=True)
class PlantedWords:
    """Words found in texts of several lengths."""

    words: tuple[int, ...]
    planted: int = NEEDLES  #: in each

    @property
    def columns(self) -> list[str]:
        """Return what it gives a score for."""
        return [f"{words} words" for words in self.words]

    def asked(self, scale: Scale) -> str:
        """Say how much is asked."""
        return f"the words planted in each of {scale.questions} texts that training has not seen"

    def step(self, scale: Scale, model: Model, whose: str, *settings: str) -> Step:
        """Score a model, with settings of decoding and memory as memdlm generate takes them."""
        # The settings stand first: behind `--words` they would be read as lengths.
        arguments = [*settings, "--whose", whose, "--words", *map(str, self.words)]
        arguments += ["--questions", str(scale.questions)]
        arguments += ["--planted", str(self.planted)] * (self.planted != NEEDLES)
        return scale.evaluated(f"needle-{whose}", model, "reproduce.needle", arguments)

    def read(self, folder: Path) -> Iterator[dict[str, Any]]:
        """The scores that a step has left; where a model does not see all of a text, of either place, too."""
        for row in read_json(folder / "scores.json")["scores"]:
            column = {"column": f"{row['words']} words"}
            yield {**column, "score": 100 * row["right"] / row["asked"]}
            for place in PLACES:
                if place in row:
                    own = row[place]
                    yield {
                        **column,
                        "place": place,
                        "score": 100 * own["right"] / max(1, own["asked"]),
                        "nll": own["nll"],
                    }


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
        """Return what it gives a score for."""
        return [*dict.fromkeys(column for column, _, _ in self.cells)]

    @property
    def _path(self) -> Path:
        return RECIPES / "eval" / f"{self.config}.yaml"

    def asked(self, scale: Scale) -> str:
        """Say how much is asked."""
        return f"what {os.path.relpath(self._path)} asks"

    def step(self, scale: Scale, model: Model, whose: str, *settings: str) -> Step:
        """Score a model, with settings of decoding and memory as lm-eval's model takes them."""
        arguments = [f"pretrained={model.pretrained}", "max_length=65536", *scale.model_args]
        arguments += [*["memory=true"] * (whose == "own"), *settings]
        lengths = [] if self.lengths is None else ["--metadata", f"max_seq_lengths={self.lengths}"]
        argv = [*scale.harness, "--config", os.path.relpath(self._path), "--model_args", ",".join(arguments), *lengths]
        made_from = [yaml.safe_load(self._path.read_text(encoding="utf-8")), arguments, lengths]
        name = model.folder / f"{self.config}-{whose}"
        argv += ["--output_path", FOLDER]
        return Step.of(name, argv, made_from, scale.runs, after=model.after, env=scale.env)

    def read(self, folder: Path) -> Iterator[dict[str, Any]]:
        """The scores that a step has left, the last run's. Raises ConfigError if there are none."""
        files = written(folder)
        if not files:
            raise ConfigError(f"{folder}: lm-eval has written no results_*.json there")
        results = read_json(files[-1])["results"]
        for column in self.columns:
            cells = [results[task][f"{metric},none"] for own, task, metric in self.cells if own == column]
            yield {"column": column, "score": 100 * fmean(cells)}


Task = PlantedWords | Harness


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def written(folder: Path) -> list[Path]:
    """What an evaluation of ours, or lm-eval, has written to a folder, the newest last.

    lm-eval writes to a folder inside. Those of other steps, deeper inside a run's own folder, do not count.
    """
    files = [path for name in ("scores.json", "results_*.json", "*/results_*.json") for path in folder.glob(name)]
    return sorted(files, key=lambda path: path.stat().st_mtime)


def without_memory(folders: Iterable[Path]) -> list[str]:
    """A sentence on prompts that were asked with memory and decoded without, if there are such."""
    from dllm_memdlm.method.prompt_memory import Tally  # seconds to import

    total: Counter[str] = Counter()
    for report in (read_json(path) for folder in set(folders) for path in written(folder)[-1:]):
        total.update({**report, **report.get("config", {})}.get("memory_tally", {}))
    lost = Tally(**{field.name: total[field.name] for field in fields(Tally)}).failures()
    return [f"Prompts that were to have a memory and were decoded without: {lost}."] if lost else []


def _ruler(**lengths: int) -> Harness:
    tasks = {"MV": "niah_multivalue", "VT": "ruler_vt", "CWE": "ruler_cwe"}
    cells = tuple((f"{column} {name}", task, str(n)) for column, task in tasks.items() for name, n in lengths.items())
    return Harness("ruler", cells, json.dumps([*lengths.values()], separators=(",", ":")))


def _babilong(name: str) -> Harness:
    return Harness("babilong", ((f"BABI {name}", "babilong_longctx", "acc"),), name.lower())


_OFFLINE = {
    **{"NIAH": "niah_single_1", "MK-2": "niah_multikey_2", "MK-3": "niah_multikey_3"},
    **{"VT": "ruler_vt", "CWE": "ruler_cwe", "FWE": "ruler_fwe"},
}


def _offline(config: str, name: str, length: int, each: bool = False) -> Harness:
    """RULER that reads no files, at one length: a column for each of its tasks, or one with their mean."""
    cells = tuple((f"{column} {name}" if each else name, task, str(length)) for column, task in _OFFLINE.items())
    return Harness(config, cells, f"[{length}]")


_LONGBENCH = {
    **{"TriviaQA": "triviaqa", "PR-en": "passage_retrieval_en", "PR-zh": "passage_retrieval_zh"},
    **{"MF-en": "multifieldqa_en", "MF-zh": "multifieldqa_zh", "2WikiQA": "2wikimqa", "DuReader": "dureader"},
    **{"MultiNews": "multi_news", "TREC": "trec", "SAMSum": "samsum", "LCC": "lcc", "RB-P": "repobench-p"},
}

#: Retrieval by context length, at each scale.
RETRIEVAL: dict[str, Sequence[Task]] = {
    "cpu": (PlantedWords((40, 80, 160, 320)),),
    "small": [_offline("ruler_small", f"{n}K", 1024 * n) for n in (1, 2, 4)],
    "paper": [_babilong(name) for name in ("1K", "2K", "4K", "8K", "16K", "32K")],
}

#: What is asked of documents that are longer than what a model sees.
DOCUMENTS = {"demo": PlantedWords((40,)), "cpu": PlantedWords((40,)), "small": PlantedWords((1000,))}

#: What the anchor ratio at inference is tried on: the paper stops at 16K.
ANCHORED = {**RETRIEVAL, "paper": RETRIEVAL["paper"][:-1]}

#: What ablations are scored on.
ABLATED: dict[str, Task] = {"cpu": PlantedWords((160,)), "small": RETRIEVAL["small"][0], "paper": _babilong("1K")}

#: The tables of the paper: what each backbone is scored on.
TABLES: dict[str, Sequence[Task]] = {
    "table1": (_ruler(**{"4K": 4096, "8K": 8192}), *map(_babilong, ("2K", "4K", "8K"))),
    "table2": (_ruler(**{"16K": 16384, "32K": 32768}), *map(_babilong, ("16K", "32K"))),
    "table3": (Harness("longbench", tuple((c, f"longbench_{task}", "score") for c, task in _LONGBENCH.items())),),
}

#: In place of the tables' tasks at the other scales. With a vocabulary of 2,048 the question alone of ruler_vt takes
#: more than 1,024 tokens, and lm-eval would try for ever to make it shorter.
RULER_OFFLINE = {
    "cpu": _offline("ruler_offline", "2K", 2048, each=True),
    "small": _offline("ruler_small", "1K", 1024, each=True),
}
