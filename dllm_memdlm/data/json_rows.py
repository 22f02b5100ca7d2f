"""Rows of JSON files as tables. What cannot be read is named by its line, or by its row in a list."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import itertools
import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow

Row = dict[str, Any]

BLOCK = 1000  #: rows that become a table at a time
EMPTY = "has no rows; expected at least one"
#: What opens a file that is compressed, by the end of its name.
COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def kind_of(path: Path) -> str:
    """Return the suffix of a file's name, or the one before that of its compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def opened(path: Path) -> Any:
    """Open a file to read its bytes as they were before they were compressed."""
    return COMPRESSED.get(path.suffix, open)(path, "rb")


def read_table(path: Path) -> pyarrow.Table:
    """Read a list of objects, an object with that list under `data`, or JSON Lines, by what the file holds.

    Fields may begin in any row, also those within others: a row without one has null there.

    Raises:
        ValueError: the file is none of these or has no rows, or the values of a field are of several types.
    """
    rows, tables, schema = rows_of(path), [], pyarrow.schema([])
    while block := list(itertools.islice(rows, BLOCK)):
        try:
            tables.append(_table([row for _, row in block]))
            schema = merged([schema, tables[-1].schema])
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(_misfit(schema, block) or error) from error
    if not tables:
        raise ValueError(EMPTY)
    try:
        return joined(tables)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{error}; expected rows that fit in one table") from error


def joined(tables: Iterable[pyarrow.Table]) -> pyarrow.Table:
    """Put tables one behind the other: whole numbers become floats where others are, and what one lacks is null."""
    return pyarrow.concat_tables(tables, promote_options="permissive")


def merged(schemas: Iterable[pyarrow.Schema]) -> pyarrow.Schema:
    """Return the schema of such a table. Raises TypeError where a field is of several types."""
    return pyarrow.unify_schemas(list(schemas), promote_options="permissive")


def rows_of(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the place of each row in its file, and the row. Raises ValueError at the first that is none."""
    with opened(path) as file:
        data = file.read().removeprefix(codecs.BOM_UTF8)
    if kind_of(path) == ".json" or data[:64].lstrip().startswith(b"["):
        try:
            rows = _parsed(data)
            rows = rows.get("data") if isinstance(rows, dict) else rows
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError("expected a list of objects, or an object with such a list under `data`")
            yield from ((f"row {number}", row) for number, row in enumerate(rows))
            return
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # which is what follows a first line that is whole
                raise ValueError(f"is not JSON: {error}; expected a list of objects") from None
    for number, line in enumerate(io.BytesIO(data), 1):
        if not line.strip():
            continue
        try:
            row = _parsed(line.rstrip())
        except json.JSONDecodeError as error:
            reason = f"line {number} is not JSON: {error.msg}, column {error.colno}"
            raise ValueError(f"{reason}; expected one object a line") from None
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is {row!s:.20}; expected an object")
        yield f"line {number}", row


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data.decode(), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise ValueError(f"{error}; expected UTF-8") from None
    except RecursionError:
        raise ValueError("too deeply nested; expected objects") from None


def _once(pairs: list[tuple[str, Any]]) -> Row:
    """Return an object of JSON, each of whose names must stand once."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} stands twice in one object; expected once")
    return dict(pairs)


def _misfit(schema: pyarrow.Schema, block: list[tuple[str, Row]]) -> str | None:
    """Say which row is the first that does not go with those before it, and why."""
    for where, row in block:
        try:
            schema = merged([schema, _table([row]).schema])
        except (ValueError, TypeError, OverflowError) as error:
            reason = str(error).rpartition("Unable to merge: ")[2]  # of the innermost field
            return f"{where}: {reason}; expected rows that fit in one table"
    return None


def _table(rows: list[Row]) -> pyarrow.Table:
    return pyarrow.Table.from_struct_array(pyarrow.array(rows))
