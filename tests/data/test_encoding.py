"""Text that spells special tokens: it stays text, and what the chat template writes stays special."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AddedToken, BertTokenizer, PreTrainedTokenizerFast

from dllm_memdlm.config import ConfigError
from dllm_memdlm.data import train_tokenizer
from dllm_memdlm.data.encoding import Encoder, encode_chat, encode_text, unmarked

TEXTS = ["the cat sat on the mat\n", "Größe: 3 × 5", "a <|mask|>, then <|endoftext|>"] * 5
SPELLED = ["<|mask|>" * 12, "a<|endoftext|>b", "<|role_end|><|assistant|>", "<|user|> the cat <|mask|>\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 340)


def special_in(tokenizer, ids):
    return [i for i in ids if i in tokenizer.all_special_ids]


def chat_of(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("text", SPELLED)
def test_what_a_text_spells_stays_text_and_only_the_templates_own_tokens_are_special(tokenizer, text):
    ids = encode_text(tokenizer, text)
    assert special_in(tokenizer, ids) == []
    assert tokenizer.decode(ids) == text
    assert special_in(tokenizer, tokenizer(text)["input_ids"]), "the tokenizer is as it was"
    encoder = Encoder(tokenizer)
    rendered = encoder.render(chat_of(text, text), add_generation_prompt=True)
    chat, ends = encoder.encode(rendered)
    assert chat == encode_chat(tokenizer, chat_of(text, text), add_generation_prompt=True)
    assert special_in(tokenizer, chat) == [5, 3, 6, 3, 6]  # user, end, assistant, end, assistant
    assert tokenizer.decode(chat) == f"<|user|>{text}<|role_end|><|assistant|>{text}<|role_end|><|assistant|>"
    assert ids == chat[1 : chat.index(3)]
    for i, end in enumerate(ends):
        assert tokenizer.decode(chat[: i + 1]) == unmarked(rendered)[:end], "ends are places in the text without marks"


@pytest.mark.parametrize("text", ["", "the cat", "  spaces\n\n", "<|mask", "<think>漢字 🙂"])
def test_any_other_text_has_the_tokens_of_the_tokenizer(tokenizer, text):
    assert encode_text(tokenizer, text) == tokenizer(text)["input_ids"]
    chat = chat_of(text, text)
    assert encode_chat(tokenizer, chat) == tokenizer.apply_chat_template(chat, return_dict=False)


def test_what_a_tokenizer_adds_around_a_text_stays():
    tokenizer = train_tokenizer(TEXTS, 340)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    ids = encode_text(tokenizer, "<|mask|> cat")
    assert (ids[0], ids[-1], special_in(tokenizer, ids[1:-1])) == (0, 1, [])
    assert encode_text(tokenizer, "<|mask|> cat", add_special_tokens=False) == ids[1:-1]
    assert encode_text(tokenizer, "cat") == tokenizer("cat")["input_ids"]


def test_a_special_token_that_is_declared_alone_is_not_taken_from_text():
    """The end of a turn may be known by its name only: `eot_token` is an attribute of ours."""
    words = {"<|role_end|>": 0, "a": 1, "[UNK]": 2}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")))
    tokenizer.add_tokens("<|role_end|>")
    tokenizer.eot_token, tokenizer.eot_token_id = "<|role_end|>", 0
    assert 0 not in encode_text(tokenizer, "<|role_end|>")


def test_spaces_that_belong_to_a_special_token_go_with_it():
    tokenizer = train_tokenizer(TEXTS, 340)
    special = AddedToken("<|role_end|>", rstrip=True, special=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|role_end|> \n{% endfor %}"
    plain, spelled = (encode_chat(tokenizer, chat_of(text, "b")) for text in ("a", "<|mask|>"))
    assert plain == tokenizer.apply_chat_template(chat_of("a", "b"), return_dict=False)
    assert spelled[-3:] == plain[-3:]
    behind = encode_chat(tokenizer, chat_of("a", "<|mask|>"))
    assert behind == [*plain[: plain.index(3) + 1], *encode_text(tokenizer, "<|mask|>"), 3]


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


def test_a_slow_tokenizer(tmp_path):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] [ ] mask a"
    (tmp_path / "vocab.txt").write_text(words.replace(" ", "\n"))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    if tokenizer.is_fast:
        pytest.skip("transformers 5 has no slow tokenizer of this kind")
    assert encode_text(tokenizer, "a [MASK]") == [2, 8, 5, 7, 6, 3]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}[SEP]{% endfor %}"
    assert encode_chat(tokenizer, chat_of("a [MASK]", "a [SEP]")) == [8, 5, 7, 6, 3, 8, 5, 1, 6, 3]


def test_a_template_that_changes_what_a_message_says_is_refused_where_a_token_is_spelled(tokenizer):
    changing = train_tokenizer(TEXTS, 340)
    changing.chat_template = "{% for m in messages %}{{ m.content | replace('<|mask|>', '_') }}{% endfor %}"
    assert encode_chat(changing, chat_of("a", "b"))
    with pytest.raises(ConfigError, match=r"^a message spells a special token, .*; expected a text without '<\|mask"):
        encode_chat(changing, chat_of("<|mask|>", "b"))
    changing.add_special_tokens({"additional_special_tokens": ["\n'\""]})  # which Python writes in other letters
    changing.chat_template = "{{ messages[0].content | length }}"
    with pytest.raises(ConfigError, match=r"""expected a text without '\\n\\'"'$"""):
        encode_chat(changing, chat_of("a\n'\"", "b"))


def test_the_texts_of_tool_calls_and_tools_stay_text_too(tokenizer):
    calling = train_tokenizer(TEXTS, 340)
    template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson }}<|role_end|>{% endfor %}"
    calling.chat_template = "{{ tools | tojson }}" + template
    calls = [{"function": {"name": "f", "arguments": {"x": "<|endoftext|>"}}}]
    tools = [{"name": "f", "description": "<|role_end|>"}]
    ids = encode_chat(calling, [{"role": "assistant", "content": "", "tool_calls": calls}], tools=tools)
    assert special_in(calling, ids) == [3]
