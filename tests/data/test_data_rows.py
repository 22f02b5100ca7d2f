"""Rows from every kind of source, the chats that they become, and the tokens and labels of those."""

import bz2
import gzip
import itertools
import lzma
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from bad_data import BAD
from command_line import error_of
from data_files import ROWS, chats, message_of, write

from dllm_memdlm.config import DataConfig
from dllm_memdlm.data import load_examples, load_rows, train_tokenizer, training_texts


def read(dataset, **settings):
    """The training rows, and those to evaluate on."""
    train, held_out = load_rows(DataConfig(dataset=str(dataset), **{"eval_fraction": 0, **settings}))
    return train.rows.to_list(), held_out and held_out.rows.to_list()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # `datasets` leaves a .csv file open
def test_every_kind_of_local_source_gives_the_same_rows(tmp_path):
    given = [*ROWS, {"instruction": 'a "quoted",\nbroken line', "input": "", "output": "007"}]
    rows, tables = datasets.Dataset.from_list(given), tmp_path / "tables"
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_csv(tmp_path / "rows.csv")
    rows.save_to_disk(tmp_path / "saved")
    write(tmp_path / "rows.jsonl", given, lines=True)
    write(tmp_path / "squad_like.json", {"version": 2, "data": given})
    for folder in ("tables", "lines"):
        (tmp_path / folder).mkdir()
    rows.to_parquet(tables / "train.parquet")
    write(tmp_path / "lines" / "a.jsonl", given[:12], lines=True)
    write(tmp_path / "lines" / "b.jsonl", given[12:], lines=True)
    sources = ["rows.parquet", "rows.csv", "saved", "squad_like.json", "tables", "lines"]
    for name, suffix, pack in (
        ("rows.csv", "gz", gzip.compress),
        ("rows.jsonl", "bz2", bz2.compress),
        ("squad_like.json", "xz", lzma.compress),
    ):
        (tmp_path / suffix).mkdir()
        sources += [f"{name}.{suffix}", suffix]
        for place in (tmp_path / sources[-2], tmp_path / suffix / f"train-0{Path(name).suffix}.{suffix}"):
            place.write_bytes(pack((tmp_path / name).read_bytes()))
    for source in sources:
        assert read(tmp_path / source) == (given, None), source


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_json_and_json_lines_by_either_name_with_a_byte_order_mark_or_without(tmp_path, name):
    for lines, mark in itertools.product((False, True), ("", "\ufeff")):
        write(tmp_path / name, ROWS, lines=lines)
        text = (tmp_path / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(mark + text, encoding="utf-8")
        assert read(tmp_path / name)[0] == ROWS


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_fields_may_begin_in_any_row_within_others_too(tmp_path, name):
    """`datasets` takes the types from a first block of rows."""
    rows = [{"messages": [{"role": "user", "content": "a"}], "n": 1}] * 1500
    rows.append({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}], "n": 0.5, "m": 1})
    write(tmp_path / name, rows, lines=name == "rows.jsonl")
    first, *_, last = read(tmp_path / name)[0]
    assert last == rows[-1]
    assert first == {"messages": [{**rows[0]["messages"][0], "tool_calls": None}], "n": 1.0, "m": None}


@pytest.mark.parametrize("folder", [False, True])
def test_lines_of_another_kind_are_named_behind_many_others(tmp_path, folder):
    lines = ['{"a": "b"}', '{"a": "b", "c": "d"}', *['{"a": "b"}'] * 1500, '{"a": ["b"]}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    message = message_of(read, tmp_path if folder else tmp_path / "rows.jsonl")
    assert f"split 'train': {'rows.jsonl, ' * folder}line 1503: Field a " in message


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


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, after seven special tokens."""
    return train_tokenizer([], 263)


def test_instruction_and_input_are_joined_by_a_blank_line_and_stay_as_they_are(tmp_path):
    given = [("Go on:", "    def f():\n", "        return 1\n"), ("Do it.", " \n", "done"), ("Do it.", None, None)]
    expected = [["Go on:\n\n    def f():\n", "        return 1\n"], ["Do it.", "done"], ["Do it.", ""]]
    for names in (("instruction", "input", "output"), ("q", "context", "a")):
        config = write(tmp_path / "rows.json", [dict(zip(names, row, strict=True)) for row in given])
        fields = dict(zip(("instruction_field", "input_field", "output_field"), names, strict=True))
        found = chats(replace(config, **fields))
        assert [[message["content"] for message in chat] for chat in found] == expected
        assert [[message["role"] for message in chat] for chat in found] == [["user", "assistant"]] * 3


def test_messages_are_taken_as_they_stand_and_before_an_instruction(tmp_path):
    chat = [{"role": r, "content": c, "id": 1} for r, c in [("system", "s "), ("user", "u"), ("assistant", " a")]]
    assert chats(write(tmp_path / "rows.json", [{"messages": chat, "instruction": "a", "output": "b"}])) == [chat]


def test_tokens_and_labels_are_exact(tmp_path, tokenizer):
    config = write(tmp_path / "rows.json", [{"instruction": "hi", "output": "yo"}])
    h, i, y, o = (tokenizer.convert_tokens_to_ids(letter) for letter in "hiyo")
    user, assistant, turn_end = 5, 6, 3
    whole = [user, h, i, turn_end, assistant, y, o, turn_end]
    assert load_examples(config, tokenizer).train.to_list() == [
        {"input_ids": whole, "labels": [-100] * 5 + [y, o, turn_end]}
    ]
    unmasked = load_examples(replace(config, mask_prompt=False), tokenizer).train.to_list()
    assert unmasked == [{"input_ids": whole, "labels": whole}]
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    config = write(tmp_path / "rows.json", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    (row,) = load_examples(config, tokenizer).train
    labels = [*tokenizer("d")["input_ids"], turn_end]  # the last turn alone
    assert row["labels"] == [-100] * (len(row["input_ids"]) - 2) + labels and row["input_ids"][-2:] == labels


def test_of_a_text_alone_every_token_is_learned_or_all_but_its_opening(tmp_path, tokenizer):
    config = write(tmp_path / "rows.json", [{"messages": [{"role": "assistant", "content": "some text"}]}])
    (whole,) = load_examples(replace(config, mask_prompt=False), tokenizer).train
    assert whole["labels"] == whole["input_ids"]
    (row,) = load_examples(config, tokenizer).train
    assert row == {"input_ids": whole["input_ids"], "labels": [-100, *whole["labels"][1:]]}


def test_long_and_empty_examples_are_dropped_and_counted(tmp_path, tokenizer):
    # 4 special tokens, then a byte a token: lengths 6, 9, 10, and two without a response
    rows = [{"instruction": "p", "output": "r" * n} for n in (1, 4, 5)] + [{"instruction": "p", "output": "  "}]
    config = replace(write(tmp_path / "rows.json", rows), max_length=9)
    examples = load_examples(config, tokenizer)
    assert [len(row["input_ids"]) for row in examples.train] == [6, 9]
    assert examples.train_counts == (2, 1, 1, 9, 7.5, 0)
    assert (examples.eval, examples.eval_counts) == (None, None)
    assert examples.train.column_names == ["input_ids", "labels"]
    assert "longest 9 (dropped 1 too long, 1 without a response); eval: none" in examples.summary()
    says = "data.max_length=5: none of the 4 train examples of "
    assert message_of(load_examples, replace(config, max_length=5), tokenizer).startswith(says)


def test_examples_of_an_eval_split_are_filtered_counted_and_named_too(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl", ROWS[:1], lines=True)
    write(tmp_path / "test.jsonl", ROWS[:3], lines=True)
    config = DataConfig(dataset=str(tmp_path), eval_split="test", max_length=11)
    examples = load_examples(config, tokenizer)
    assert (len(examples.train), len(examples.eval), examples.eval_counts.too_long) == (1, 2, 1)
    assert examples.summary().endswith("; eval: " + str(examples.eval_counts))
    write(tmp_path / "test.jsonl", ROWS[9:], lines=True)
    assert "none of the 11 eval examples" in message_of(load_examples, config, tokenizer)
    refusing = train_tokenizer([], 263)
    refusing.chat_template = "{{ raise_exception('no') if messages[0].content == 'say 11' }}" + tokenizer.chat_template
    assert f"data.dataset='{tmp_path}', test row 2: the chat" in message_of(load_examples, config, refusing)


def test_training_texts_are_the_messages_of_the_training_rows(tmp_path):
    config = replace(write(tmp_path / "rows.json", ROWS), eval_fraction=0.1)
    rows = load_rows(config)[0].rows
    assert list(training_texts(config)) == [text for r in rows for text in (r["instruction"], r["output"])]


def test_processes_change_nothing(tmp_path, tokenizer):
    config = write(tmp_path / "rows.json", ROWS)
    one, two = (load_examples(replace(config, num_proc=n), tokenizer) for n in (1, 2))
    assert one.train.to_list() == two.train.to_list()
    bad = write(tmp_path / "bad.json", [{"messages": []}] * 20)
    assert "train row " in message_of(load_examples, replace(bad, num_proc=2), tokenizer)


def test_a_second_load_comes_from_the_cache_but_not_with_other_settings(tmp_path, tokenizer, monkeypatch):
    config = write(tmp_path / "rows.json", ROWS)
    first, second = (load_examples(config, tokenizer).train for _ in range(2))
    assert first.cache_files == second.cache_files != []
    assert load_examples(replace(config, mask_prompt=False), tokenizer).train.cache_files != first.cache_files
    monkeypatch.setattr("dllm_memdlm.data.examples.VERSION", -1)
    assert load_examples(config, tokenizer).train.cache_files != first.cache_files


@pytest.mark.parametrize("bad", range(0, 20, 4))
def test_a_row_is_named_by_its_number_in_the_users_file(tmp_path, tokenizer, bad):
    rows = [{"messages": [{"role": ("assistant", "tool")[i == bad], "content": "b"}]} for i in range(20)]
    config = replace(write(tmp_path / "rows.jsonl", rows, lines=True), eval_fraction=0.2)
    assert f", train row {bad}: field 'messages' ends with tool" in message_of(load_examples, config, tokenizer)
    if bad in load_rows(config)[0].numbers:
        assert f", train row {bad}: " in message_of(lambda: list(training_texts(config)))


@pytest.mark.parametrize(("files", "overrides", "says"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
@pytest.mark.usefixtures("as_from_a_shell")
def test_bad_data_is_one_line(files, overrides, says, recipe, tmp_path, capsys):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = error_of(capsys, recipe, *overrides)
    assert [part for part in says if part not in message] == [], message
