"""The chats that rows become, and the tokens and labels of those."""

from dataclasses import replace

import pytest
from data_files import ROWS, message_of, write

from dllm_memdlm.config import DataConfig
from dllm_memdlm.data import choose_format, load_examples, load_rows, train_tokenizer, training_texts

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, after seven special tokens."""
    return train_tokenizer([], 263)


def chats(config):
    rows = load_rows(config)[0].rows
    to_chat = choose_format(config, rows.column_names)
    return [to_chat(row, config).messages for row in rows]


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
    assert examples.train_counts == (2, 1, 1, 9, 7.5)
    assert (examples.eval, examples.eval_counts) == (None, None)
    assert examples.train.column_names == ["input_ids", "labels"]
    assert examples.summary() == (
        "train: 2 examples, mean 7.5 tokens, longest 9 (dropped 1 too long, 1 without a response); eval: none"
    )
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
