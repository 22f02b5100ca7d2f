"""Texts of lm-eval as tokens: what is special in them, where a continuation begins, and chat templates."""

from __future__ import annotations

from pathlib import Path

import pytest
from saved_models import byte_tokenizer, ending, word_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertTokenizer, PreTrainedTokenizerBase

from dllm_memdlm.config import ConfigError
from dllm_memdlm.data import train_tokenizer
from dllm_memdlm.data.encoding import MARK
from dllm_memdlm.evaluation.texts import Texts

CHAT = [{"role": "user", "content": "say <|mask|><|role_end|> twice"}]


def merging() -> PreTrainedTokenizerBase:
    """Takes " world" for one token, and " wor" for others."""
    return train_tokenizer(["hello world"] * 9, 280)


def beginning(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Puts its first token before every text."""
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer


def slow(folder: Path) -> PreTrainedTokenizerBase:
    """One that cannot say where its tokens end, begins texts with [CLS] and ends them with [SEP]."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "wor", "world", "##ld", "##z", "z"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), bos_token="[CLS]", eos_token="[SEP]")
    if tokenizer.is_fast:
        pytest.skip("transformers 5 has no slow tokenizer of this kind")
    return tokenizer


# === where a continuation begins ===


@pytest.mark.parametrize("frame", [lambda tokenizer: tokenizer, beginning, ending])
def test_a_token_that_holds_some_of_both_is_the_continuations(frame):
    tokenizer = frame(merging())
    before = [tokenizer.bos_token_id] * (frame is beginning)
    hello, world = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("hello", " world"))
    assert len(world) == 1, "the test should see them merge"
    assert Texts(tokenizer).pair("hello wor", "ld") == ([*before, *hello], world)
    (context, continuation) = Texts(tokenizer).pair("hello wor", "zq")
    assert tokenizer.decode(context[len(before) :]) == "hello wor" and tokenizer.decode(continuation) == "zq"


def test_a_tokenizer_that_cannot_say_where_tokens_end(tmp_path):
    texts = Texts(slow(tmp_path))
    assert texts.tokenizer.convert_ids_to_tokens(texts.pair("hello wor", "ld")[1]) == ["world"]
    context, continuation = texts.pair("hello wor", "z")
    found = [texts.tokenizer.convert_ids_to_tokens(ids) for ids in (context, continuation)]
    assert found == [["[CLS]", "hello", "wor"], ["##z"]]


@pytest.mark.parametrize("make", [merging, byte_tokenizer, lambda: ending(byte_tokenizer()), word_tokenizer])
@pytest.mark.parametrize("context", ["", "hello", "hello wor", "w5 w", "<|mask|>", " "])
@pytest.mark.parametrize("continuation", ["ld", " w6", "<|mask|>", "<eos>", "x" * 40, "é"])
def test_a_continuation_is_never_empty(make, context, continuation):
    texts = Texts(make())
    start, end = texts.pair(context, continuation)
    assert end and texts.tokenizer.eos_token_id not in [*start, *end]
    assert texts.pair(context, "") == (
        texts.context(context.rstrip()).ids,
        texts.whole(context[len(context.rstrip()) :]),
    )


def test_a_continuation_without_a_token_in_company_is_taken_alone(tmp_path):
    """Two unknown words in one piece are one unknown word, and this tokenizer cannot say where it ends."""
    texts = Texts(slow(tmp_path))
    start, end = texts.pair("hello x", "y")
    assert (
        texts.tokenizer.convert_ids_to_tokens([*start, *end]) == ["[CLS]", "hello", "[UNK]", "[UNK]"] and len(end) == 1
    )


# === what is special ===


def test_nothing_is_special_without_a_chat_template():
    tokenizer = beginning(byte_tokenizer())
    texts, spelled = Texts(tokenizer), "".join(tokenizer.all_special_tokens)
    for ids in (texts.context(spelled).ids[1:], texts.whole(spelled), texts.pair("a", spelled)[1]):
        assert not set(ids) & set(tokenizer.all_special_ids) and tokenizer.decode(ids) == spelled
    assert texts.context(spelled).ids[0] == texts.first() == tokenizer.bos_token_id
    assert Texts(byte_tokenizer()).first() == tokenizer.bos_token_id


def test_an_appended_end_is_in_no_prompt():
    tokenizer = ending(byte_tokenizer())
    texts = Texts(tokenizer)
    assert texts.context("ab").ids == texts.whole("ab") == tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert texts.pair("a", "b") == (texts.whole("a"), texts.whole("b"))


@pytest.mark.parametrize("frame", [lambda tokenizer: tokenizer, ending])
def test_of_a_chat_the_templates_own_tokens_are_special(frame):
    texts = Texts(frame(byte_tokenizer()))
    end, mask = texts.tokenizer.eot_token_id, texts.tokenizer.mask_token_id
    rendered = texts.render(CHAT, begun=False)
    ids = texts.context(rendered).ids
    assert mask not in ids and ids.count(end) == 1
    assert (
        texts.tokenizer.decode(ids)
        == rendered.replace(MARK, "")
        == f"<|user|>{CHAT[0]['content']}<|role_end|><|assistant|>"
    )
    context, continuation = texts.pair(rendered, "<|mask|>")
    assert context == ids and mask not in continuation and texts.tokenizer.decode(continuation) == "<|mask|>"


def test_a_first_token_that_a_chat_template_wrote_is_not_doubled():
    texts = Texts(beginning(byte_tokenizer()))
    texts.use_template()
    bos = texts.tokenizer.bos_token_id
    assert texts.context("ab").ids[0] == bos and texts.context("<|startoftext|>ab").ids == texts.context("ab").ids


# === chat templates ===


def test_a_chat_template_by_its_name():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"loud": "{{ messages[0].content }}!", "quiet": "{{ messages[0].content }}."}
    texts = Texts(tokenizer)
    assert texts.use_template("quiet") == "{{ messages[0].content }}."
    assert texts.render([{"role": "user", "content": "a"}], begun=False) == "a."
    assert texts.use_template("loud") and texts.render([{"role": "user", "content": "a"}], begun=False) == "a!"
    for name in ("default", "soft"):
        with pytest.raises(ConfigError, match=f"has no chat template '{name}'; expected one of loud, quiet$"):
            texts.use_template(name)


def test_a_chat_that_the_template_refuses_is_one_line():
    with pytest.raises(ConfigError) as error:
        Texts(byte_tokenizer()).render([{"role": "tool", "content": "a"}], begun=False)
    assert "refuses a chat of tool: unknown role tool" in str(error.value) and "\n" not in str(error.value)
