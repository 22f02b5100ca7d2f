"""Rows of JSON files with their names, and why a file of rows cannot be read: which line or row, what was expected.

`datasets` says at length that something went wrong, and pyarrow counts rows from the start of a block of the file. So
a file that they refuse is read again here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

#: A row's place in its file, and the row.
Named = tuple[str, dict[str, Any]]

LONGEST = 300  #: letters of a reason
EMPTY = "has no rows; expected at least one"

#: What `datasets` says of JSON Lines, and of parquet, without rows.
NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0, got 0")

KINDS = {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}


def rows_of(path: Path) -> Iterator[Named]:
    """The rows of a JSON document, a list of objects or an object with that list under `data`, or of JSON Lines.

    Raises:
        ValueError: the file is none of these; the message names the line.
    """
    text = _decoded(path.read_bytes(), "the file").removeprefix("\ufeff")
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError("is too deeply nested; expected a list of objects") from None
    except json.JSONDecodeError as error:
        if not text.strip():
            raise ValueError(EMPTY) from None
        if error.msg != "Extra data":  # which is what follows a first line that is whole
            raise ValueError(f"is not JSON: {error}; expected a list of objects") from None
        yield from lines_of(path)
        return
    rows = document.get("data") if isinstance(document, dict) else document
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects, at least one, or an object with such a list under `data`")
    yield from ((f"row {number}", row) for number, row in enumerate(rows))


def is_document(path: Path) -> bool:
    """Whether a file holds one JSON document, by its name or by how it begins."""
    if path.suffix == ".json":
        return True
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def lines_of(path: Path) -> Iterator[Named]:
    """The rows of a JSON Lines file. Raises ValueError at the first line that is no object of JSON."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        where = f"line {number}"
        text = _decoded(line, where).removeprefix("\ufeff")
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_once)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where} is not JSON: {error.msg}, column {error.colno}; expected one object a line"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} is {_kind(row)}; expected an object")
        yield where, row


def fault_in(path: Path, rows: Iterator[Named] | None = None) -> str | None:
    """What is wrong with the rows of a file, or of the JSON files of a folder; none where nothing is."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*.json*")) if file.suffix in (".json", ".jsonl")]
        found = ((file.relative_to(path), fault_in(file)) for file in files)
        fault = next((f"{file}, {fault}" for file, fault in found if fault), None)
        return fault or _other_columns(path, files)
    try:
        return None if _check_kinds(rows or (rows_of if is_document(path) else lines_of)(path)) else EMPTY
    except (ValueError, OSError) as error:
        return str(error)


def _other_columns(folder: Path, files: list[Path]) -> str | None:
    first: tuple[Path, set[str]] | None = None
    for file in files:
        names = {name for _, row in (rows_of if is_document(file) else lines_of)(file) for name in row}
        first = first or (file, names)
        if other := ", ".join(sorted(names ^ first[1])):
            one, two = (found.relative_to(folder) for found in (file, first[0]))
            return f"All the data files must have the same columns; {one} and {two} differ in {other}"
    return None


def reason_of(error: BaseException) -> str:
    """What the error that was met first says, in one line: `datasets` wraps what went wrong while reading."""
    generation = datasets.exceptions.DatasetGenerationError
    while isinstance(error, generation) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, datasets.arrow_writer.SchemaInferenceError) or any(words in str(error) for words in NO_ROWS):
        return EMPTY
    text = one_line(error)
    spoken = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    if not text or not isinstance(error, spoken):  # a KeyError says no more than the key
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    text = text.removeprefix("An error occurred while generating the dataset ").partition(" Please either edit")[0]
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split()).rstrip(".")


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(f"{where} is UTF-16; expected UTF-8") from None
        raise ValueError(
            f"{where} is not UTF-8: its byte {error.start + 1} is {data[error.start]:#04x}; expected UTF-8"
        ) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, each of whose names stands once."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"field {name!r} stands twice in one object; expected once")
        found[name] = value
    return found


def _check_kinds(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> int:
    """The number of rows. Raises ValueError at the first value that no table holds beside those before it."""
    kinds: dict[str, tuple[str, str]] = {}
    count = 0
    for where, row in rows:
        for name, kind in _kinds(row, "", where):
            before, first = kinds.setdefault(name, (kind, where))
            if kind != before:
                raise ValueError(f"{where}: field {name!r} is {kind}; expected {before}, as in {first}")
        count += 1
    return count


def _kinds(value: Any, name: str, where: str) -> Iterator[tuple[str, str]]:
    """The names of all fields that have a value, those within others too, and the kind of each value."""
    if name and value is not None:
        yield name, _kind(value)
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{where}: field {name!r} has half a surrogate pair; expected whole characters")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{where}: field {name!r} is {str(value)[:20]}…; expected numbers of 64 bits")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _kinds(item, f"{name}.{key}" if name else key, where)
    elif isinstance(value, list):
        for item in value:
            yield from _kinds(item, f"{name}[]", where)


def _kind(value: Any) -> str:
    return KINDS.get(type(value), "null")
