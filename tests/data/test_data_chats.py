"""What the chat template makes of a row: special tokens, tool calls, the border of the response."""

from __future__ import annotations

import json

import pytest
from data_files import ROWS, message_of, write
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from dllm_memdlm.data import load_examples, train_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")

USER, END, ASSISTANT = 5, 3, 6
CALLS = [{"type": "function", "function": {"name": "look_up", "arguments": {"word": "ant"}}}]
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"word": "string"}}}]
#: Messages, their tool calls as JSON, and the tools before them.
CALLING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}<|role_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
#: A reply is opened with a line break, with which a tokenizer may merge those that the reply begins with.
MERGING = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}<|role_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
CONTENTS = "{% for m in messages %}{{ m.content }}{% endfor %}"


def trained(template=None, texts=(), size=263):
    """By default one token a byte, after seven special tokens."""
    tokenizer = train_tokenizer(texts, size)
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def learned(tokenizer, row):
    return tokenizer.decode([i for i in row["labels"] if i != -100])


def test_a_row_that_spells_special_tokens_has_those_of_the_template_alone(tmp_path):
    tokenizer, document, answer = trained(), "<|mask|>" * 12 + "<|role_end|>", "<|endoftext|><|assistant|> no"
    config = write(tmp_path / "rows.json", [{"instruction": document, "output": answer}, ROWS[0]])
    row, other = load_examples(config, tokenizer).train
    assert [i for i in row["input_ids"] if i < 7] == [USER, END, ASSISTANT, END]
    assert tokenizer.decode(row["input_ids"]) == f"<|user|>{document}<|role_end|><|assistant|>{answer}<|role_end|>"
    assert learned(tokenizer, row) == answer + "<|role_end|>"
    assert learned(tokenizer, other) == "a<|role_end|>"


def test_tool_calls_and_tools_are_written_by_the_template(tmp_path):
    calling = trained(CALLING)
    turns = [{"role": "user", "content": "ant?"}, {"role": "assistant", "content": None, "tool_calls": CALLS}]
    turns += [{"role": "tool", "content": "an insect", "tool_call_id": "1", "name": "look_up"}]
    turns += [{"role": "assistant", "content": "An insect."}]
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


def test_tools_as_json_are_the_same_tools_and_none_are_none(tmp_path):
    said = chat(("user", "a"), ("assistant", "b"))
    given = [json.dumps(TOOLS), TOOLS, "", [], None]
    one, other, *without = (
        load_examples(write(tmp_path / f"{i}.json", [{**said, "tools": tools}]), trained(CALLING)).train.to_list()
        for i, tools in enumerate(given)
    )
    assert one == other
    assert without == [load_examples(write(tmp_path / "said.json", [said]), trained(CALLING)).train.to_list()] * 3


def test_what_an_earlier_turn_holds_must_be_written_but_for_its_reasoning(tmp_path):
    turns = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    turns["messages"][1]["reasoning_content"] = "so b"
    assert load_examples(write(tmp_path / "rows.json", [turns]), trained()).train_counts.kept == 1
    turns["messages"][1]["tool_calls"] = CALLS
    message = message_of(load_examples, write(tmp_path / "rows.json", [turns]), trained())
    assert "train row 0: the chat template of the tokenizer leaves out tool_calls; expected" in message


@pytest.mark.parametrize("start", ["\n", "\n\n", "\n  x", "", "é", " "])
def test_a_token_over_the_border_belongs_to_the_response(tmp_path, start):
    tokenizer = trained(MERGING, ["user:\n\nassistant:\n\n\n a:\n\n  x\n"] * 20, 300)
    config = write(tmp_path / "rows.json", [chat(("user", "a"), ("assistant", start + "b"))])
    (row,) = load_examples(config, tokenizer).train
    prompt = "user:\na<|role_end|>assistant:\n"
    assert tokenizer.decode(row["input_ids"]) == f"{prompt}{start}b<|role_end|>"
    count = row["labels"].count(-100)
    assert row["labels"] == [-100] * count + row["input_ids"][count:]
    # no token of the response is left out, and none that lies in the prompt is learned
    assert prompt.startswith(tokenizer.decode(row["input_ids"][:count]))
    assert len(tokenizer.decode(row["input_ids"][: count + 1])) > len(prompt)
    spelled = chat(("user", "<|mask|>"), ("assistant", start + "<|role_end|>"))
    (row,) = load_examples(write(tmp_path / "rows.json", [spelled]), tokenizer).train
    assert learned(tokenizer, row).endswith(start + "<|role_end|><|role_end|>")
    assert [i for i in row["labels"] if 0 <= i < 7] == [END]


def test_the_border_with_a_slow_tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##a", "##b"]))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    if tokenizer.is_fast:
        pytest.skip("transformers 5 has no slow tokenizer of this kind")
    tokenizer.chat_template = CONTENTS
    config = write(tmp_path / "rows.json", [chat(("user", "aa"), ("assistant", "b"))])
    assert load_examples(config, tokenizer).train.to_list() == [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}]


def test_the_border_where_the_text_changes_its_length(tmp_path):
    """A normalizer that takes letters apart: places are those of the text, before it."""
    model = Tokenizer(models.WordLevel({"e": 0, "\u0301": 1, "b": 2, "[UNK]": 3}, unk_token="[UNK]"))
    model.normalizer, model.pre_tokenizer = normalizers.NFD(), pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", chat_template=CONTENTS)
    config = write(tmp_path / "rows.json", [chat(("user", "\u00e9\u00e9"), ("assistant", "b"))])
    (row,) = load_examples(config, tokenizer).train
    assert row == {"input_ids": [0, 1, 0, 1, 2], "labels": [-100, -100, -100, -100, 2]}
