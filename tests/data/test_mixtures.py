"""Rows as people have them: ShareGPT's, parts of text; several datasets; cut; in part; streamed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from data_files import ROWS, chats, message_of, write
from saved_models import byte_tokenizer, save_model, weights_of
from small_run import write_recipe
from transformers import DataCollatorForSeq2Seq

from dllm_memdlm.config import ConfigError, DataConfig, MemoryConfig
from dllm_memdlm.data import load_examples, train_tokenizer, training_texts
from dllm_memdlm.evaluation.texts import Texts
from dllm_memdlm.inference.conversation import Conversation
from dllm_memdlm.inference.decoding import Decoder
from dllm_memdlm.inference.pretrained import load_pretrained
from dllm_memdlm.training import run
from dllm_memdlm.training.collator import AnchorTrajectoryCollator
from dllm_memdlm.training.example_ids import EXAMPLE_ID, digest_of, prompt_of
from dllm_memdlm.training.recipe import load_recipe


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a byte, after seven special tokens."""
    return train_tokenizer([], 263)


def tokens_of(config: DataConfig, tokenizer: Any) -> list[list[int]]:
    return [row["input_ids"] for row in load_examples(config, tokenizer).train]


def test_sharegpt_is_a_chat_in_other_words(tmp_path):
    turns = [("system", "Be brief."), ("human", "Ü?"), ("gpt", "b"), ("observation", "3"), ("assistant", "c")]
    rows = [{"id": "x", "conversations": [{"from": who, "value": said, "weight": None} for who, said in turns]}]
    roles = ("system", "user", "assistant", "tool", "assistant")
    expected = [{"role": role, "content": said} for role, (_, said) in zip(roles, turns, strict=True)]
    assert chats(write(tmp_path / "shared.json", rows)) == [expected]
    rows = [{"conversations": expected, "instruction": "of", "output": "no use"}]
    assert chats(write(tmp_path / "named.json", rows)) == [expected]
    config = replace(write(tmp_path / "talk.json", [{"talk": rows[0]["conversations"]}]), messages_field="talk")
    assert chats(config) == [expected]


def test_a_content_in_parts_is_the_text_of_them(tmp_path):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "c"}]}]
    expected = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    assert chats(write(tmp_path / "rows.json", [{"messages": chat}])) == [expected]


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


def test_a_model_sees_the_end_of_a_prompt_which_goes_along_whole_for_a_memory(tmp_path, tokenizer):
    rows = [{"instruction": "abcdefgh", "output": "yes"}, {"instruction": "a", "output": "no"}]
    config = write(tmp_path / "rows.json", rows)
    whole, cut = (load_examples(replace(config, visible=n, max_length=16), tokenizer).train for n in (None, 4))
    assert whole.column_names == ["input_ids", "labels"]
    for full, seen in zip(whole, cut, strict=True):
        prompt = prompt_of(full)
        assert seen["prompt_ids"] == prompt_of(seen) == prompt
        start = max(0, len(prompt) - 4)
        assert seen["input_ids"] == full["input_ids"][start:] and seen["labels"] == full["labels"][start:]
    assert [len(row["prompt_ids"]) for row in cut] == [11, 4]
    # what is seen is what may not be too long, and both are what a run is made of
    assert len(load_examples(replace(config, visible=4, max_length=8), tokenizer).train) == 2
    other = load_examples(replace(config, visible=3), tokenizer).train
    assert len({digest_of(rows) for rows in (whole, cut, other)}) == 3
    padding = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=tokenizer.pad_token_id)
    collator = AnchorTrajectoryCollator(padding, MemoryConfig(source="prompt", window=4, prompt_loss=0.1))
    batch = collator([{**row, EXAMPLE_ID: number} for number, row in enumerate(cut)])
    assert batch["input_ids"].shape[1] == len(cut[0]["input_ids"]) and "prompt_ids" not in batch
    lengths = [batch[f"window_{n}_maskable"].sum(-1).tolist() for n in range(3)]
    assert lengths == [[3, 4], [4, 0], [4, 0]] and "window_3_maskable" not in batch
    assert batch["prompt_input_ids"].shape == batch["prompt_anchor_mask"].shape


THINKING = "{{ '<think>' if enable_thinking | default(true) }}"


def test_the_template_gets_its_arguments_in_training_and_in_use(tmp_path):
    """From the recipe that stands beside the weights, where a chat is asked, and in lm-eval."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINKING + tokenizer.chat_template
    config = replace(write(tmp_path / "rows.jsonl", ROWS, lines=True), template={"enable_thinking": False})
    (plain, *_), (thinking, *_) = (tokens_of(replace(config, template=own), tokenizer) for own in (config.template, {}))
    assert len(thinking) > len(plain)
    loaded = load_pretrained(save_model(tmp_path / "run", "llama", tokenizer, {"data": {"template": config.template}}))
    assert loaded.template == config.template
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
