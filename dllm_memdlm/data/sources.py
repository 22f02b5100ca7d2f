"""Where rows come from: the hub, or local files and folders."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pandas
import pyarrow
import pyarrow.parquet

from ..config import ConfigError, DataConfig
from .json_rows import COMPRESSED, EMPTY, joined, kind_of, merged, opened, read_table

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
SPLIT_SEED = 42  # dllm's, so that both hold the same rows out

HUB_HINT = "expected a hub name (with network, or downloaded before), or a local file or folder"
MADE_HERE = "; in a checkout `make data` writes it, elsewhere set data.dataset to rows of your own"
FOLDER_HINT = f"expected a folder with files of {', '.join(SUFFIXES)}, or one that save_to_disk has written"


class Rows(NamedTuple):
    """Rows, with the number of each in the split that it comes from, counted from 0, and that split's name."""

    rows: datasets.Dataset | datasets.IterableDataset
    numbers: Sequence[int]
    split: str

    def first(self, size: int | None) -> Rows:
        """Return the first `size` rows, or all of them."""
        if size is None:
            return self
        if isinstance(self.rows, datasets.IterableDataset):
            return self._replace(rows=self.rows.take(size))
        return Rows(self.rows.select(range(min(size, len(self.rows)))), self.numbers[:size], self.split)


def load_rows(config: DataConfig) -> tuple[Rows, Rows | None]:
    """Return the training rows, and those to evaluate on (none when eval_split is unset and eval_fraction is 0).

    With `streaming` the training rows are read as they are asked for, and what is wrong with them is said then.

    Raises:
        ConfigError: no such dataset, file or split; no network and no local copy; unreadable content; or eval_fraction
            leaves no row to train on.
    """
    train, held_out = _load_split(config, config.split), None
    if config.eval_split is not None:
        held_out = _load_split(replace(config, streaming=False), config.eval_split)
    elif config.eval_fraction > 0:
        both = (train.rows, datasets.Dataset.from_dict({"number": train.numbers}))  # two of one length are split alike
        try:
            rows, numbered = (d.train_test_split(test_size=config.eval_fraction, seed=SPLIT_SEED) for d in both)
        except ValueError:
            raise ConfigError(
                f"data.eval_fraction={config.eval_fraction}: leaves no row to train on, of the {len(train.rows)} in "
                f"{config.dataset}; expected less, or 0 to hold none out"
            ) from None
        train, held_out = (Rows(rows[part], numbered[part]["number"][:], config.split) for part in ("train", "test"))
    return train.first(config.train_size), None if held_out is None else held_out.first(config.eval_size)


def _load_split(config: DataConfig, split: str) -> Rows:
    """Read one split through the cache of `datasets`. Local paths are absolute there: it knows no working folder."""
    dataset = str(config.dataset)  # one of several has a config of its own
    path = _local_path(dataset)
    try:
        if path is not None:
            rows = _read_local(path, split)
        else:
            rows = datasets.load_dataset(dataset, split=split, streaming=config.streaming)
        if isinstance(rows, datasets.Dataset) and not len(rows):
            raise ValueError(EMPTY)
        if path is not None:
            rows.data.validate(full=True)  # pyarrow reads text that is not UTF-8, and nobody can use it
    except Exception as error:  # of any kind: whatever a file of another form leads to
        reason = reason_of(error)
        if reason.startswith("Unrecognized instruction format"):
            reason += "; expected the name of a split, or a part of one such as train[:100]"
        elif not reason.startswith(("Unknown split", "Bad split")) and "expected" not in reason:
            reason += f"; {HUB_HINT if path is None else FOLDER_HINT if path.is_dir() else 'expected a whole file'}"
        raise ConfigError(f"data.dataset={config.dataset!r}, split {split!r}: {reason}") from error
    if config.streaming:
        return Rows(rows if path is None else rows.to_iterable_dataset(), range(sys.maxsize), split)
    return Rows(rows, range(len(rows)), split)


def _local_path(dataset: str) -> Path | None:
    """Return the absolute path of a local dataset, or None for a hub name."""
    path = Path(os.path.abspath(os.path.expanduser(dataset)))
    if os.path.isfile(path) and kind_of(path) not in SUFFIXES:
        kinds = f"{', '.join(SUFFIXES)}, also with {', '.join(COMPRESSED)} behind it"
        raise ConfigError(f"data.dataset={dataset!r}: a file of type {kind_of(path)!r}; expected {kinds}")
    if os.path.exists(path):
        return path
    if kind_of(path) in SUFFIXES or dataset.startswith(("/", ".", "~")):
        made = MADE_HERE if dataset.startswith("data/") else ""
        raise ConfigError(f"data.dataset={dataset!r}: no such file or folder ({path}){made}; {HUB_HINT}")
    return None


def _read_local(path: Path, split: str) -> datasets.Dataset:
    if path.is_dir() and any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
        rows = datasets.load_from_disk(path)
        splits = rows if isinstance(rows, datasets.DatasetDict) else {"train": rows}
        if split not in splits:
            raise ValueError(f"Unknown split {split!r}: the saved folder has only {', '.join(map(repr, splits))}")
        return splits[split]
    if path.is_dir():
        builder = datasets.load_dataset_builder(str(path))
        files = builder.config.data_files
        if all(kind_of(Path(file)) in SUFFIXES for of_split in files.values() for file in of_split):
            builder = LocalFiles(data_files=files, base_path=str(path))
    else:
        builder = LocalFiles(data_files={"train": glob.escape(str(path))})
    builder.download_and_prepare()
    return builder.as_dataset(split)


class LocalFiles(datasets.ArrowBasedBuilder):
    """Brings local files to the cache of `datasets`, which reads them again once they have been edited.

    The reader of JSON in `datasets` takes the types from a first block of rows, in which no message may have called a
    tool yet, and names no line. Its builders are written by defining the three methods that follow.
    """

    VERSION = datasets.Version("1.0.0")  # of the cache: another one for other tables from the same files

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        tables = {split: self._joined(files) for split, files in self.config.data_files.items()}
        schema = merged(table.schema for table in tables.values())
        self.info.features = datasets.Features.from_arrow_schema(schema)
        return [datasets.SplitGenerator(str(split), {"table": table}) for split, table in tables.items()]

    def _generate_tables(self, table: pyarrow.Table) -> Any:
        for number, batch in enumerate(table.to_batches()):
            yield number, pyarrow.Table.from_batches([batch])

    def _joined(self, files: Sequence[str]) -> pyarrow.Table:
        tables = [self._read(file) for file in files]
        for file, table in zip(files, tables, strict=True):
            if other := set(table.column_names) ^ set(tables[0].column_names):
                one, two = (os.path.relpath(name, self.base_path) for name in (files[0], file))
                raise ValueError(f"{one} and {two} differ in {', '.join(sorted(other))}; expected the same fields")
        if not sum(table.num_rows for table in tables):
            raise ValueError(EMPTY)
        return joined(tables)

    def _read(self, file: str) -> pyarrow.Table:
        path = Path(file)
        try:
            if kind_of(path) in (".json", ".jsonl"):
                return read_table(path)
            with opened(path) as file_object:
                if kind_of(path) == ".parquet":
                    return pyarrow.parquet.read_table(file_object)
                # Text throughout, as a number in an answer is text
                table = pandas.read_csv(file_object, dtype=str, keep_default_na=False)
                return pyarrow.Table.from_pandas(table, preserve_index=False)
        except ValueError as error:
            if self.base_path is None:
                raise
            raise ValueError(f"{os.path.relpath(file, self.base_path)}, {error}") from None


def reason_of(error: BaseException) -> str:
    """Say in a line of at most 300 letters why something cannot be read, as the error that was met first says it."""
    while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()).rstrip(".")
    if " " not in text:  # a KeyError says no more than the key
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= 300 else text[:299] + "…"
