"""What the chat template makes of a row: special tokens, tool calls, the border of the response, its name."""

from __future__ import annotations

import json
from dataclasses import replace

import datasets
import pytest
from data_files import ROWS, message_of, write
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from dllm_memdlm.config import DataConfig
from dllm_memdlm.data import load_examples, train_tokenizer, training_texts

pytestmark = pytest.mark.usefixtures("own_cache")

MASK, USER, END, ASSISTANT = 2, 5, 3, 6
CALLS = [{"type": "function", "function": {"name": "look_up", "arguments": {"word": "ant"}}}]
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"word": "string"}}}]
#: Messages, their tool calls as JSON, and the tools before them.
CALLING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}<|role_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, after seven special tokens."""
    return train_tokenizer([], 263)


@pytest.fixture(scope="module")
def calling():
    tokenizer = train_tokenizer([], 263)
    tokenizer.chat_template = CALLING
    return tokenizer


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def learned(tokenizer, row):
    return tokenizer.decode([i for i in row["labels"] if i != -100])


# special tokens in a row's text


def test_a_row_that_spells_special_tokens_has_those_of_the_template_alone(tmp_path, tokenizer):
    document, answer = "<|mask|>" * 12 + "<|role_end|>", "<|endoftext|><|assistant|> no"
    config = write(tmp_path / "rows.json", [{"instruction": document, "output": answer}, ROWS[0]])
    row, other = load_examples(config, tokenizer).train
    assert [i for i in row["input_ids"] if i < 7] == [USER, END, ASSISTANT, END]
    assert tokenizer.decode(row["input_ids"]) == f"<|user|>{document}<|role_end|><|assistant|>{answer}<|role_end|>"
    assert learned(tokenizer, row) == answer + "<|role_end|>"
    assert learned(tokenizer, other) == "a<|role_end|>"


def test_rows_that_spell_none_keep_the_tokens_they_had(tmp_path):
    tokenizer = train_tokenizer([f"{r['instruction']} {r['output']}" for r in ROWS] * 3, 290)
    rows = load_examples(write(tmp_path / "rows.json", ROWS), tokenizer).train
    for row, given in zip(rows, ROWS, strict=True):
        messages = chat(("user", given["instruction"]), ("assistant", given["output"]))["messages"]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        assert row["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=False)
        assert row["labels"] == [-100] * len(prompt) + row["input_ids"][len(prompt) :]


# what a message says beside its text


def test_tool_calls_and_tools_are_written_by_the_template(tmp_path, calling):
    turns = [
        {"role": "user", "content": "ant?"},
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "tool", "content": "an insect", "tool_call_id": "1", "name": "look_up"},
        {"role": "assistant", "content": "An insect."},
    ]
    rows = [{"messages": turns[:2], "tools": TOOLS}, {"messages": turns, "tools": None}]
    examples = load_examples(write(tmp_path / "rows.jsonl", rows, lines=True), calling)
    assert (examples.train_counts.kept, examples.train_counts.empty) == (2, 0)
    first, second = examples.train
    whole = calling.decode(first["input_ids"])
    assert json.loads(whole[: whole.index("<|user|>")]) == TOOLS
    said = learned(calling, first).removesuffix("<|role_end|>")
    assert json.loads(said) == CALLS
    assert f"<|assistant|>{said}<|role_end|><|tool|>an insect" in calling.decode(second["input_ids"])
    assert learned(calling, second) == "An insect.<|role_end|>"


def test_tools_as_json_are_the_same_tools(tmp_path, calling):
    said = chat(("user", "a"), ("assistant", "b"))
    rows = [{**said, "tools": json.dumps(TOOLS)}], [{**said, "tools": TOOLS}]
    one, other = (load_examples(write(tmp_path / f"{i}.json", r), calling).train.to_list() for i, r in enumerate(rows))
    assert one == other


@pytest.mark.parametrize("field", ["tool_calls", "function_call", "reasoning_content", "thinking"])
@pytest.mark.parametrize("content", ["", "b"])
def test_what_the_template_leaves_out_is_refused_by_name(tmp_path, tokenizer, field, content):
    said = {"role": "assistant", "content": content, field: CALLS if field == "tool_calls" else "it"}
    config = write(tmp_path / "rows.json", [chat(("user", "a"), ("assistant", "b")), {"messages": [said]}])
    assert message_of(load_examples, config, tokenizer) == (
        f"data.dataset='{config.dataset}', train row 1: the chat template of the tokenizer leaves out {field}; "
        "expected rows without, or a tokenizer whose template writes them"
    )


def test_tools_that_the_template_leaves_out_or_that_are_none_are_refused_by_name(tmp_path, tokenizer):
    said = chat(("user", "a"), ("assistant", "b"))
    message = message_of(load_examples, write(tmp_path / "a.json", [{**said, "tools": TOOLS}]), tokenizer)
    assert "train row 0: the chat template of the tokenizer leaves out tools; expected rows without" in message
    for name, tools in (("b", "a hammer"), ("c", ["a hammer"])):
        message = message_of(load_examples, write(tmp_path / f"{name}.json", [{**said, "tools": tools}]), tokenizer)
        assert "train row 0: field 'tools' is not " in message
        assert "functions" in message
    without = write(tmp_path / "d.json", [{**said, "tools": []}, {**said, "tools": ""}, said][:1])
    assert load_examples(without, tokenizer).train_counts.kept == 1


def test_reasoning_of_earlier_turns_may_be_left_out(tmp_path, tokenizer):
    turns = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    turns["messages"][1]["reasoning_content"] = "so b"
    assert load_examples(write(tmp_path / "rows.json", [turns]), tokenizer).train_counts.kept == 1


# the border between prompt and response


def merging(text):
    """A tokenizer that merges line breaks, with a template that ends the opening of a reply with one."""
    tokenizer = train_tokenizer([text] * 20, 300)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}<|role_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("start", ["\n", "\n\n", "\n  x", "", "é", " "])
def test_a_token_over_the_border_belongs_to_the_response(tmp_path, start):
    tokenizer = merging("user:\n\nassistant:\n\n\n a:\n\n  x\n")
    config = write(tmp_path / "rows.json", [chat(("user", "a"), ("assistant", start + "b"))])
    (row,) = load_examples(config, tokenizer).train
    prompt = "user:\na<|role_end|>assistant:\n"
    assert tokenizer.decode(row["input_ids"]) == f"{prompt}{start}b<|role_end|>"
    count = row["labels"].count(-100)
    assert row["labels"] == [-100] * count + row["input_ids"][count:]
    # no token of the response is left out, and none that lies in the prompt is learned
    assert prompt.startswith(tokenizer.decode(row["input_ids"][:count]))
    assert len(tokenizer.decode(row["input_ids"][: count + 1])) > len(prompt)


def test_the_border_is_found_beside_special_tokens_that_are_spelled(tmp_path):
    tokenizer = merging("user:\n\nassistant:\n\n\n a:\n\n  x\n")
    config = write(tmp_path / "rows.json", [chat(("user", "<|mask|>"), ("assistant", "\n\n<|role_end|>"))])
    (row,) = load_examples(config, tokenizer).train
    assert learned(tokenizer, row).lstrip("\n") == "<|role_end|><|role_end|>"
    assert [i for i in row["labels"] if 0 <= i < 7] == [END]


def test_the_border_with_a_slow_tokenizer(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##a", "##b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    if tokenizer.is_fast:
        pytest.skip("transformers 5 has no slow tokenizer of this kind")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = write(tmp_path / "rows.json", [chat(("user", "aa"), ("assistant", "b"))])
    (row,) = load_examples(config, tokenizer).train
    assert row == {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}


def test_the_border_where_the_text_changes_its_length(tmp_path):
    """A normalizer that takes letters apart: places are those of the text, before it."""
    model = Tokenizer(models.WordLevel({"e": 0, "\u0301": 1, "b": 2, "[UNK]": 3}, unk_token="[UNK]"))
    model.normalizer, model.pre_tokenizer = normalizers.NFD(), pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = write(tmp_path / "rows.json", [chat(("user", "\u00e9\u00e9"), ("assistant", "b"))])
    (row,) = load_examples(config, tokenizer).train
    assert row == {"input_ids": [0, 1, 0, 1, 2], "labels": [-100, -100, -100, -100, 2]}


# rows of the wrong types

HOTPOT = {"question": "a", "answer": "b", "supporting_facts": {"title": ["t"], "sent_id": [0]}}
HALVES = " is not as in HotpotQA: expected pairs, or the hub's two lists, title and "


@pytest.mark.parametrize(
    ("form", "bad", "reason"),
    [
        ("auto", {"instruction": ["a"], "output": "b"}, "field 'instruction': expected text, found ['a']"),
        (
            "auto",
            {"instruction": "a", "input": {"b": 1}, "output": "b"},
            "field 'input': expected text, found {'b': 1}",
        ),
        ("auto", {"instruction": "a", "output": True}, "field 'output': expected text, found True"),
        ("auto", {"messages": [{"role": None, "content": "b"}]}, "field 'messages' is not a list of {role, content}"),
        ("auto", {"messages": [{"role": "user", "content": ["b"]}]}, "field 'messages' is not a list of {role, conte"),
        ("auto", {**HOTPOT, "context": {"title": ["t"], "sentences": []}}, f"field 'context'{HALVES}sentences"),
        ("auto", {**HOTPOT, "context": {"title": ["t"], "sentences": [[1]]}}, f"field 'context'{HALVES}sentences"),
        ("auto", {**HOTPOT, "context": {"names": ["t"]}}, f"field 'context'{HALVES}sentences"),
        (
            "auto",
            {**HOTPOT, "context": [], "supporting_facts": [["t", "0"]]},
            f"field 'supporting_facts'{HALVES}sent_id",
        ),
        ("paragraphs", {"context": {"title": [1], "sentences": [["a"]]}}, f"field 'context'{HALVES}sentences"),
        (
            "needle",
            {"context": {"title": ["t"], "sentences": "abc"}},
            "context is not as in HotpotQA: expected paragraphs",
        ),
        (
            "needle",
            {"context": {"title": ["t"], "sentences": [[1]]}},
            "context is not as in HotpotQA: expected paragraphs",
        ),
    ],
)
def test_fields_of_other_types_name_the_row_and_the_field(tmp_path, tokenizer, form, bad, reason):
    config = replace(write(tmp_path / "rows.json", [bad]), format=form)
    message = message_of(load_examples, config, tokenizer)
    assert message.startswith(f"data.dataset='{config.dataset}', train row 0: {reason}")


# the name of a row


@pytest.mark.parametrize("bad", range(20))
def test_a_row_is_named_by_its_number_in_the_users_file(tmp_path, tokenizer, bad):
    rows = [chat(("user", str(i)), ("assistant", "b")) for i in range(20)]
    rows[bad]["messages"][0]["role"] = "tool"
    path = tmp_path / "rows.jsonl"
    write(path, rows, lines=True)
    message = message_of(load_examples, DataConfig(dataset=str(path), eval_fraction=0.2), tokenizer)
    assert f", train row {bad}: the chat template of the tokenizer refuses the chat: unknown role tool" in message


def test_the_texts_of_a_tokenizer_name_the_same_row(tmp_path):
    rows = [chat(("user", str(i)), ("assistant", "b")) for i in range(20)]
    order = datasets.Dataset.from_dict({"i": range(20)}).train_test_split(0.2, seed=42)["train"]["i"]
    bad = next(i for place, i in enumerate(order) if place != i)
    rows[bad]["messages"] = []
    path = tmp_path / "rows.jsonl"
    write(path, rows, lines=True)
    config = DataConfig(dataset=str(path), eval_fraction=0.2)
    assert f", train row {bad}: " in message_of(lambda: list(training_texts(config)))


def test_a_row_of_an_eval_split_is_named_by_that_split(tmp_path, tokenizer):
    rows = [chat(("user", "a"), ("assistant", "b")), chat(("user", "a"))]
    write(tmp_path / "train.jsonl", rows[:1], lines=True)
    write(tmp_path / "test.jsonl", rows, lines=True)
    message = message_of(load_examples, DataConfig(dataset=str(tmp_path), eval_split="test"), tokenizer)
    assert f"data.dataset='{tmp_path}', test row 1: field 'messages' ends with user" in message


def test_a_template_that_nobody_can_read_is_the_tokenizers_fault(tmp_path):
    tokenizer = train_tokenizer([], 263)
    tokenizer.chat_template = "{% for m in messages %}\n{{ m.content }"
    message = message_of(load_examples, write(tmp_path / "rows.json", ROWS), tokenizer)
    assert message.startswith("model.tokenizer='': line 2 of its chat template is not Jinja: ")


def test_a_chat_template_that_refuses_a_role_or_is_missing(tmp_path, tokenizer):
    chat = [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]
    config = write(tmp_path / "rows.json", [{"messages": chat}])
    assert message_of(load_examples, config, tokenizer) == (
        f"data.dataset='{config.dataset}', train row 0: the chat template of the tokenizer refuses the chat: "
        "unknown role tool: expected system, user or assistant"
    )
    plain = train_tokenizer([], 263)
    plain.chat_template = None
    assert message_of(load_examples, config, plain).endswith(
        "has no chat template; expected the tokenizer of a chat model"
    )


def test_a_template_that_cannot_join_what_it_is_given_names_the_row(tmp_path):
    tokenizer = train_tokenizer([], 263)
    config = write(tmp_path / "rows.json", [chat(("assistant", "b"))])
    for template, reason in (("messages[0].content + 1", "can only"), ("raise_exception('no\\nway.')", "no way")):
        tokenizer.chat_template = "{{ " + template + " }}"
        message = message_of(load_examples, config, tokenizer)
        assert f"train row 0: the chat template of the tokenizer refuses the chat: {reason}" in message
