"""What the chat template makes of a row: special tokens, tool calls, the border of the response.

Text that spells special tokens stays text, and what the template writes stays special.
"""

from __future__ import annotations

import json

import pytest
from data_files import message_of, write
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AddedToken, BertTokenizer, PreTrainedTokenizerFast

from dllm_memdlm.config import ConfigError
from dllm_memdlm.data import load_examples, train_tokenizer
from dllm_memdlm.data.encoding import Encoder, encode_chat, unmarked

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
TEXTS = ["the cat sat on the mat\n", "Größe: 3 × 5", "a <|mask|>, then <|endoftext|>"] * 5
SPELLED = ["<|mask|>" * 12, "a<|endoftext|>b", "<|role_end|><|assistant|>", "<|user|> the cat <|mask|>\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 340)


@pytest.fixture
def slow(tmp_path):
    """Makes a tokenizer of these words that cannot say where its tokens end."""

    def make(words, template):
        (tmp_path / "vocab.txt").write_text(words.replace(" ", "\n"))
        tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
        if tokenizer.is_fast:
            pytest.skip("transformers 5 has no slow tokenizer of this kind")
        tokenizer.chat_template = template
        return tokenizer

    return make


def trained(template=None, texts=(), size=263):
    """By default one token a byte, after seven special tokens."""
    tokenizer = train_tokenizer(texts, size)
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def chat_of(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def ids_of(tokenizer, text):
    return Encoder(tokenizer).text(text).ids


def special_in(tokenizer, ids):
    return [i for i in ids if i in tokenizer.all_special_ids]


def learned(tokenizer, row):
    return tokenizer.decode([i for i in row["labels"] if i != -100])


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


def test_the_border_with_a_slow_tokenizer(slow, tmp_path):
    tokenizer = slow("[PAD] [UNK] [CLS] [SEP] [MASK] a ##a ##b", CONTENTS)
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


@pytest.mark.parametrize("text", SPELLED)
def test_what_a_text_spells_stays_text_and_only_the_templates_own_tokens_are_special(tokenizer, text):
    ids = ids_of(tokenizer, text)
    assert special_in(tokenizer, ids) == []
    assert tokenizer.decode(ids) == text
    assert special_in(tokenizer, tokenizer(text)["input_ids"]), "the tokenizer is as it was"
    encoder = Encoder(tokenizer)
    rendered = encoder.render(chat_of(text, text), add_generation_prompt=True)
    chat, ends = encoder.encode(rendered)
    assert chat == encode_chat(tokenizer, chat_of(text, text), add_generation_prompt=True)
    assert special_in(tokenizer, chat) == [USER, END, ASSISTANT, END, ASSISTANT]
    assert tokenizer.decode(chat) == f"<|user|>{text}<|role_end|><|assistant|>{text}<|role_end|><|assistant|>"
    assert ids == chat[1 : chat.index(3)]
    for i, end in enumerate(ends):
        assert tokenizer.decode(chat[: i + 1]) == unmarked(rendered)[:end], "ends are places in the text without marks"


@pytest.mark.parametrize("text", ["", "the cat", "  spaces\n\n", "<|mask", "<think>漢字 🙂"])
def test_any_other_text_has_the_tokens_of_the_tokenizer(tokenizer, text):
    assert ids_of(tokenizer, text) == tokenizer(text)["input_ids"]
    chat = chat_of(text, text)
    assert encode_chat(tokenizer, chat) == tokenizer.apply_chat_template(chat, return_dict=False)


def test_a_prompt_begins_as_the_tokenizer_begins_a_text_and_does_not_end_so():
    tokenizer = train_tokenizer(TEXTS, 340)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    encoder, ids = Encoder(tokenizer), ids_of(tokenizer, "<|mask|> cat")
    assert special_in(tokenizer, ids) == [] and encoder.prompt("<|mask|> cat").ids == [0, *ids]
    assert [*encoder.prompt("cat").ids, 1] == tokenizer("cat")["input_ids"]


def test_a_special_token_that_is_declared_alone_is_not_taken_from_text():
    """The end of a turn may be known by its name only: `eot_token` is an attribute of ours."""
    words = {"<|role_end|>": 0, "a": 1, "[UNK]": 2}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")))
    tokenizer.add_tokens("<|role_end|>")
    tokenizer.eot_token, tokenizer.eot_token_id = "<|role_end|>", 0
    assert 0 not in ids_of(tokenizer, "<|role_end|>")


def test_spaces_that_belong_to_a_special_token_go_with_it():
    tokenizer = train_tokenizer(TEXTS, 340)
    special = AddedToken("<|role_end|>", rstrip=True, special=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|role_end|> \n{% endfor %}"
    plain, spelled = (encode_chat(tokenizer, chat_of(text, "b")) for text in ("a", "<|mask|>"))
    assert plain == tokenizer.apply_chat_template(chat_of("a", "b"), return_dict=False)
    assert spelled[-3:] == plain[-3:]
    behind = encode_chat(tokenizer, chat_of("a", "<|mask|>"))
    assert behind == [*plain[: plain.index(3) + 1], *ids_of(tokenizer, "<|mask|>"), 3]


def test_texts_beside_the_one_that_spells_keep_their_tokens():
    """A tokenizer that puts a space before the first word alone, as Llama's does."""
    words = {"<s>": 0, "<m>": 1, "\u2581the": 2, "the": 3, "[UNK]": 4}
    model = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", mask_token="<m>", unk_token="[UNK]")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<s>{% endfor %}"
    plain, spelled = (encode_chat(tokenizer, chat_of("the", text, "the")) for text in ("a", "<m>"))
    assert plain == [2, 0, 4, 0, 3, 0]
    assert (spelled[:2], spelled[-3:]) == ([2, 0], [0, 3, 0])
    assert 1 not in spelled


def test_a_slow_tokenizer(slow):
    template = "{% for m in messages %}{{ m.content }}[SEP]{% endfor %}"
    tokenizer = slow("[PAD] [UNK] [CLS] [SEP] [MASK] [ ] mask a", template)
    assert ids_of(tokenizer, "a [MASK]") == [8, 5, 7, 6]
    assert encode_chat(tokenizer, chat_of("a [MASK]", "a [SEP]")) == [8, 5, 7, 6, 3, 8, 5, 1, 6, 3]


def test_a_template_that_changes_what_a_message_says_is_refused_where_a_token_is_spelled():
    changing = trained("{% for m in messages %}{{ m.content | replace('<|mask|>', '_') }}{% endfor %}", TEXTS, 340)
    assert encode_chat(changing, chat_of("a", "b"))
    with pytest.raises(ConfigError, match=r"^a message spells a special token, .*; expected a text without '<\|mask"):
        encode_chat(changing, chat_of("<|mask|>", "b"))
    changing.add_special_tokens({"additional_special_tokens": ["\n'\""]})  # which Python writes in other letters
    changing.chat_template = "{{ messages[0].content | length }}"
    with pytest.raises(ConfigError, match=r"""expected a text without '\\n\\'"'$"""):
        encode_chat(changing, chat_of("a\n'\"", "b"))


def test_the_texts_of_tool_calls_and_tools_stay_text_too():
    calling = trained(CALLING)
    calls = [{"function": {"name": "f", "arguments": {"x": "<|endoftext|>"}}}]
    tools = [{"name": "f", "description": "<|role_end|>"}]
    ids = encode_chat(calling, [{"role": "assistant", "content": "", "tool_calls": calls}], tools=tools)
    assert special_in(calling, ids) == [ASSISTANT, END]
