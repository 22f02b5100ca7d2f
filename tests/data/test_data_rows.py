"""Rows from every kind of source."""

import json
from dataclasses import replace

import datasets
import pytest
from data_files import ROWS, message_of, write

from dllm_memdlm.config import DataConfig
from dllm_memdlm.data import load_rows

pytestmark = pytest.mark.usefixtures("own_cache")


def read(dataset, **settings):
    """The training rows, and those to evaluate on."""
    train, held_out = load_rows(DataConfig(dataset=str(dataset), **{"eval_fraction": 0, **settings}))
    return train.rows.to_list(), held_out and held_out.rows.to_list()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # `datasets` leaves a .csv file open
def test_every_kind_of_local_source_gives_the_same_rows(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    for name in ("lines", "tables", "csv"):
        (tmp_path / name).mkdir()
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_parquet(tmp_path / "tables" / "train.parquet")
    rows.to_csv(tmp_path / "csv" / "rows.csv")
    rows.save_to_disk(tmp_path / "saved")
    write(tmp_path / "squad_like.json", {"version": 2, "data": ROWS})
    write(tmp_path / "lines" / "a.jsonl", ROWS[:12], lines=True)
    write(tmp_path / "lines" / "b.jsonl", ROWS[12:], lines=True)
    for source in ("rows.parquet", "tables", "saved", "squad_like.json", "lines"):
        assert read(tmp_path / source) == (ROWS, None), source
    assert [row["output"] for row in read(tmp_path / "csv")[0]] == [row["output"] for row in ROWS]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_json_and_json_lines_by_either_name_with_a_byte_order_mark_or_without(tmp_path, name, lines, mark):
    write(tmp_path / name, ROWS, lines=lines)
    text = (tmp_path / name).read_text(encoding="utf-8")
    (tmp_path / name).write_text(mark + text, encoding="utf-8")
    assert read(tmp_path / name)[0] == ROWS


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("size", [1, 2**13])
def test_fields_may_begin_in_any_row_within_others_too(tmp_path, name, size):
    """`datasets` takes the types from a first block: a thousand rows, or ten megabytes."""
    rows = [{"messages": [{"role": "user", "content": "a" * size}], "n": 1}] * 1500
    rows.append({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}], "n": 0.5, "m": 1})
    write(tmp_path / name, rows, lines=name == "rows.jsonl")
    first, *_, last = read(tmp_path / name)[0]
    assert last == rows[-1]
    assert first == {"messages": [{**rows[0]["messages"][0], "tool_calls": None}], "n": 1.0, "m": None}


@pytest.mark.parametrize("folder", [False, True])
def test_lines_of_another_kind_are_named_behind_many_others(tmp_path, folder):
    lines = ['{"a": "b"}', *[json.dumps({"a": "b", "c": "d" * 2**20})] * 12, *['{"a": "b"}'] * 1500, '{"a": ["b"]}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    message = message_of(read, tmp_path if folder else tmp_path / "rows.jsonl")
    assert f"split 'train': {'rows.jsonl, ' * folder}line 1514: Field a " in message


def test_rows_are_held_out_as_dllm_does(tmp_path):
    write(tmp_path / "rows.json", ROWS)
    expected = datasets.Dataset.from_list(ROWS).train_test_split(test_size=0.1, seed=42)
    train, held_out = expected["train"].to_list(), expected["test"].to_list()
    assert (len(train), len(held_out)) == (18, 2)
    assert read(tmp_path / "rows.json", eval_fraction=0.1) == (train, held_out)
    assert read(tmp_path / "rows.json", eval_fraction=0.1, train_size=3, eval_size=1) == (train[:3], held_out[:1])
    assert read(tmp_path / "rows.json", eval_fraction=0.1, train_size=99) == (train, held_out)


def test_splits_parts_of_splits_and_saved_splits(tmp_path):
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", ROWS[:12], lines=True)
    write(tmp_path / "files" / "test.jsonl", ROWS[12:], lines=True)
    rows, others = (datasets.Dataset.from_list(part) for part in (ROWS[:12], ROWS[12:]))
    datasets.DatasetDict({"train": rows, "test": others}).save_to_disk(tmp_path / "saved")
    for source in ("files", "saved"):
        assert read(tmp_path / source, eval_split="test") == (ROWS[:12], ROWS[12:])
    assert read(tmp_path / "files", split="train[:5]", eval_split="test[50%:]") == (ROWS[:5], ROWS[16:])
    write(tmp_path / "files" / "test.jsonl", [{"more": 1, "output": "a"}], lines=True)
    assert read(tmp_path / "files", eval_split="test")[1] == [dict.fromkeys(ROWS[0]) | {"more": 1, "output": "a"}]
    message = message_of(lambda: read(tmp_path / "saved", split="dev"))
    assert "split 'dev': Unknown split 'dev'" in message and "'train', 'test'" in message
    next((tmp_path / "saved" / "train").glob("*.arrow")).unlink()
    assert "or one that save_to_disk has written" in message_of(read, tmp_path / "saved")


def test_relative_paths_belong_to_the_working_folder_and_edits_are_seen(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        for output in (name, "edited"):
            for file in ("rows.json", "[1]*.jsonl"):
                write(tmp_path / name / file, [{"output": output}], lines=file == "[1]*.jsonl")
                assert read(file)[0] == [{"output": output}]


def test_every_row_keeps_its_number(tmp_path):
    config = replace(write(tmp_path / "rows.json", [{"output": str(i)} for i in range(20)]), eval_fraction=0.2)
    for source in load_rows(config):
        assert [str(number) for number in source.numbers] == source.rows["output"][:]
