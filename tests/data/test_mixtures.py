"""Rows as people have them: ShareGPT's, parts of text, tables and packed files; several datasets; cut; streamed."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import ROWS, message_of, write
from saved_models import byte_tokenizer, save_model, weights_of
from small_run import write_recipe

from dllm_memdlm.config import ConfigError, DataConfig
from dllm_memdlm.data import choose_format, load_examples, load_rows, train_tokenizer, training_texts
from dllm_memdlm.evaluation.texts import Texts
from dllm_memdlm.inference.conversation import Conversation
from dllm_memdlm.inference.decoding import Decoder
from dllm_memdlm.inference.pretrained import load_pretrained
from dllm_memdlm.training import run
from dllm_memdlm.training.recipe import load_recipe


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a byte, after seven special tokens."""
    return train_tokenizer([], 263)


def chat_of(config: DataConfig) -> list[dict[str, Any]]:
    rows = load_rows(config)[0].rows
    return choose_format(config, rows.column_names)(rows[0], config).messages


def tokens_of(config: DataConfig, tokenizer: Any) -> list[list[int]]:
    return [row["input_ids"] for row in load_examples(config, tokenizer).train]


def test_sharegpt_is_a_chat_in_other_words(tmp_path):
    turns = [("system", "Be brief."), ("human", "Ü?"), ("gpt", "b"), ("observation", "3"), ("assistant", "c")]
    rows = [{"id": "x", "conversations": [{"from": who, "value": said, "weight": None} for who, said in turns]}]
    roles = ("system", "user", "assistant", "tool", "assistant")
    expected = [{"role": role, "content": said} for role, (_, said) in zip(roles, turns, strict=True)]
    assert chat_of(write(tmp_path / "shared.json", rows)) == expected
    rows = [{"conversations": expected, "instruction": "of", "output": "no use"}]
    assert chat_of(write(tmp_path / "named.json", rows)) == expected
    config = replace(write(tmp_path / "talk.json", [{"talk": rows[0]["conversations"]}]), messages_field="talk")
    assert chat_of(config) == expected


def test_a_content_in_parts_is_the_text_of_them(tmp_path):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "c"}]}]
    expected = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    assert chat_of(write(tmp_path / "rows.json", [{"messages": chat}])) == expected


def test_tables_and_packed_files_give_the_same_rows(tmp_path):
    rows = [*ROWS, {"instruction": 'a "quoted",\nbroken line', "input": "", "output": "007"}]
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ROWS[0])
        table.writeheader()
        table.writerows(rows)
    write(tmp_path / "rows.jsonl", rows, lines=True)
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    for name, (suffix, pack) in zip(("rows.csv", "rows.jsonl", "rows.jsonl"), packed.items(), strict=True):
        (tmp_path / f"{name}{suffix}").write_bytes(pack((tmp_path / name).read_bytes()))
        folder = tmp_path / f"folder{suffix}"
        folder.mkdir()
        (folder / f"train-0{Path(name).suffix}{suffix}").write_bytes(pack((tmp_path / name).read_bytes()))
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(json.dumps({"data": rows}).encode()))
    names = ("rows.csv", "rows.csv.gz", "rows.jsonl.bz2", "rows.jsonl.xz", "rows.json.gz")
    for name in (*names, *(f"folder{suffix}" for suffix in packed)):
        assert load_rows(DataConfig(dataset=str(tmp_path / name), eval_fraction=0))[0].rows.to_list() == rows, name


@pytest.fixture
def two(tmp_path) -> tuple[str, str]:
    """Two datasets of different fields: twenty rows that say `say`, and eighty that say `z`."""
    write(tmp_path / "a.json", ROWS)
    chat = [{"role": "user", "content": "z"}, {"role": "assistant", "content": "z"}]
    rows = [{"messages": [chat[0], {**chat[1], "content": f"z{i}"}]} for i in range(80)]
    write(tmp_path / "b.jsonl", rows, lines=True)
    return str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")


def test_several_datasets_follow_each_other(two, tokenizer):
    config = DataConfig(dataset=two, eval_fraction=0)
    alone = [replace(config, dataset=name) for name in two]
    assert tokens_of(config, tokenizer) == [row for part in alone for row in tokens_of(part, tokenizer)]
    assert list(training_texts(config)) == [text for part in alone for text in training_texts(part)]
    examples = load_examples(replace(config, eval_fraction=0.1, eval_size=3), tokenizer)
    assert (examples.train_counts.kept, examples.eval_counts.kept) == (18 + 72, 2 + 3)
    lengths = [len(row["input_ids"]) for row in examples.train]
    assert examples.train_counts == (90, 0, 0, max(lengths), sum(lengths) / 90, 0)


def test_shares_say_how_often_each_dataset_is_drawn_from(two, tokenizer):
    config = DataConfig(dataset={two[0]: 3, two[1]: 1}, eval_fraction=0)
    mixed = tokens_of(config, tokenizer)
    first, second = (tokens_of(replace(config, dataset=name), tokenizer) for name in two)
    from_first, rest = [row for row in mixed if row in first], [row for row in mixed if row not in first]
    assert from_first == first and rest == second[: len(rest)], "in their order, until one has no more"
    assert 0.6 < 20 / len(mixed) < 0.9
    assert tokens_of(config, tokenizer) == mixed != tokens_of(replace(config, dataset=[*two]), tokenizer)


def test_longer_examples_are_cut_where_the_prompt_leaves_room(tmp_path, tokenizer):
    # 4 special tokens, then a byte a token: lengths 6, 9, 15, and a prompt of 12
    rows = [{"instruction": "p", "output": "r" * n} for n in (1, 4, 10)] + [{"instruction": "p" * 9, "output": "r"}]
    config = replace(write(tmp_path / "rows.json", rows), max_length=9, truncation="right")
    examples, whole = load_examples(config, tokenizer), load_examples(replace(config, max_length=99), tokenizer)
    assert [row["input_ids"] for row in examples.train] == [row["input_ids"][:9] for row in whole.train][:3]
    assert [row["labels"] for row in examples.train] == [row["labels"][:9] for row in whole.train][:3]
    assert examples.train_counts == (3, 1, 0, 9, 8.0, 1)
    assert "dropped 1 too long, 0 without a response; cut 1)" in examples.summary()
    seen = load_examples(replace(config, visible=2, max_length=4), tokenizer).train
    assert [len(row["input_ids"]) for row in seen] == [4] * 4, "of what the model sees"
    assert seen[3]["prompt_ids"] == whole.train[3]["input_ids"][:12]


THINKING = "{{ '<think>' if enable_thinking | default(true) }}"


def test_the_template_gets_its_arguments_in_training_and_in_use(tmp_path, as_from_a_shell):
    """From the recipe that stands beside the weights, where a chat is asked, and in lm-eval."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINKING + tokenizer.chat_template
    base = save_model(tmp_path / "base", "llama", tokenizer)
    config = replace(write(tmp_path / "rows.jsonl", ROWS, lines=True), template={"enable_thinking": False})
    (plain, *_), (thinking, *_) = (tokens_of(replace(config, template=own), tokenizer) for own in (config.template, {}))
    assert len(thinking) > len(plain)
    recipe = write_recipe(tmp_path)
    settings = (f"model.path={base}", "model.dimensions={}", "data.template={enable_thinking: false}")
    run.train(load_recipe(recipe, ["training.max_steps=1", "training.output_dir=" + str(tmp_path / "run"), *settings]))
    loaded = load_pretrained(str(tmp_path / "run"))
    assert loaded.template == {"enable_thinking": False}
    asked = Conversation(Decoder(loaded), "", new_tokens=4).prompt("Hi?", [])
    chat = [{"role": "user", "content": "Hi?"}]
    settings = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
    assert asked == loaded.tokenizer.apply_chat_template(chat, **settings)
    assert "<think>" not in Texts(loaded.tokenizer, loaded.template).render(chat, begun=False)
    assert "<think>" in Texts(loaded.tokenizer).render(chat, begun=False)


def test_a_stream_has_the_examples_of_the_whole_dataset(two, tokenizer):
    for dataset in (two[1], [*two], {two[0]: 1, two[1]: 1}):
        config = DataConfig(dataset=dataset, eval_fraction=0, max_length=11)
        streamed = load_examples(replace(config, streaming=True), tokenizer)
        rows, again = ([row["input_ids"] for row in streamed.train] for _ in range(2))
        expected = tokens_of(config, tokenizer)
        assert rows == again != expected
        if isinstance(dataset, dict):  # which ends with one of the two, now shuffled
            every = tokens_of(replace(config, dataset=[*two]), tokenizer)
            assert 4 < len(rows) < len(every) and all(row in every for row in rows)
        else:
            assert sorted(rows) == sorted(expected)
        assert streamed.summary() == "train: streamed; eval: none"
    rows = load_examples(replace(config, streaming=True, dataset=two[1], train_size=7), tokenizer).train
    assert len([*rows]) == 7


def test_a_wrong_row_of_a_stream_is_named_when_it_comes(tmp_path, tokenizer):
    config = replace(write(tmp_path / "rows.jsonl", ROWS, lines=True), streaming=True)
    refusing = train_tokenizer([], 263)
    refusing.chat_template = "{{ raise_exception('no') if messages[0].content == 'say 11' }}" + tokenizer.chat_template
    with pytest.raises(ConfigError, match=r"train row 11: the chat template of the tokenizer refuses the chat: .*no"):
        [*load_examples(config, refusing).train]
    wrong = replace(write(tmp_path / "other.jsonl", [{"text": "a"}], lines=True), streaming=True)
    assert "has the fields text; expected messages" in message_of(load_examples, wrong, tokenizer)


def test_a_run_on_a_stream_goes_on_where_it_stopped(tmp_path, as_from_a_shell):
    base = save_model(tmp_path / "base", "llama", byte_tokenizer())
    write_recipe(tmp_path)
    settings = (f"model.path={base}", "model.dimensions={}", "data.streaming=true", "data.eval_fraction=0")

    def trained(name: str, *more: str, resume: bool = False) -> Any:
        own = (f"training.output_dir={tmp_path / name}", *more)
        return run.train(load_recipe(tmp_path / "tiny.yaml", [*settings, *own]), resume)

    says = message_of(trained, "whole", "training.max_steps=-1")
    assert says == "training.max_steps=-1: expected at least 1 with data.streaming"
    whole = trained("whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    parts = trained("parts", resume=True)
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    one, other = (weights_of(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
