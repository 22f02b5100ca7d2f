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


@pytest.mark.parametrize("frame", [lambda tokenizer: tokenizer, beginning, ending])
def test_a_token_that_holds_some_of_both_is_the_continuations(frame):
    tokenizer = frame(merging())
    before = [tokenizer.bos_token_id] * (frame is beginning)
    hello, world = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("hello", " world"))
    assert len(world) == 1, "the test should see them merge"
    assert Texts(tokenizer).pair("hello wor", "ld") == ([*before, *hello], world)
    (context, continuation) = Texts(tokenizer).pair("hello wor", "zq")
    assert tokenizer.decode(context[len(before) :]) == "hello wor" and tokenizer.decode(continuation) == "zq"


@pytest.mark.parametrize(
    ("text", "end", "expected"),
    [
        ("hello wor", "ld", (["[CLS]", "hello"], ["world"])),
        ("hello wor", "z", (["[CLS]", "hello", "wor"], ["##z"])),
        # two unknown words in one piece are one unknown word: of the two together none is the continuation's
        ("hello x", "y", (["[CLS]", "hello", "[UNK]"], ["[UNK]"])),
    ],
)
def test_a_tokenizer_that_cannot_say_where_tokens_end(text, end, expected, tmp_path):
    texts = Texts(slow(tmp_path))
    assert tuple(map(texts.tokenizer.convert_ids_to_tokens, texts.pair(text, end))) == expected


@pytest.mark.parametrize("make", [merging, byte_tokenizer, lambda: ending(byte_tokenizer()), word_tokenizer])
def test_a_continuation_is_never_empty(make):
    texts = Texts(make())
    for context in ("", "hello", "hello wor", "w5 w", "<|mask|>", " "):
        for continuation in ("ld", " w6", "<|mask|>", "<eos>", "x" * 40, "é"):
            start, end = texts.pair(context, continuation)
            assert end and texts.tokenizer.eos_token_id not in [*start, *end]
        spaces = context[len(context.rstrip()) :]
        assert texts.pair(context, "") == (texts.context(context.rstrip()).ids, texts.whole(spaces))


def test_nothing_is_special_without_a_chat_template():
    tokenizer = beginning(byte_tokenizer())
    texts, spelled = Texts(tokenizer), "".join(tokenizer.all_special_tokens)
    for ids in (texts.context(spelled).ids[1:], texts.whole(spelled), texts.pair("a", spelled)[1]):
        assert not set(ids) & set(tokenizer.all_special_ids) and tokenizer.decode(ids) == spelled
    assert texts.context(spelled).ids[0] == texts.first() == tokenizer.bos_token_id
    assert Texts(byte_tokenizer()).first() == tokenizer.bos_token_id
    texts = Texts(ending(byte_tokenizer()))  # an end that it appends is in no prompt
    assert texts.context("ab").ids == texts.whole("ab") == [*texts.whole("a"), *texts.whole("b")]
    assert texts.pair("a", "b") == (texts.whole("a"), texts.whole("b"))


@pytest.mark.parametrize("frame", [lambda tokenizer: tokenizer, ending])
def test_of_a_chat_the_templates_own_tokens_are_special(frame):
    texts, said = Texts(frame(byte_tokenizer())), "say <|mask|><|role_end|> twice"
    decode, mask = texts.tokenizer.decode, texts.tokenizer.mask_token_id
    rendered = texts.render([{"role": "user", "content": said}], begun=False)
    ids = texts.context(rendered).ids
    assert mask not in ids and ids.count(texts.tokenizer.eot_token_id) == 1
    assert decode(ids) == rendered.replace(MARK, "") == f"<|user|>{said}<|role_end|><|assistant|>"
    context, continuation = texts.pair(rendered, "<|mask|>")
    assert context == ids and mask not in continuation and decode(continuation) == "<|mask|>"
    texts = Texts(beginning(byte_tokenizer()))
    texts.use_template()
    ids = texts.context("ab").ids
    assert ids[0] == texts.tokenizer.bos_token_id and texts.context("<|startoftext|>ab").ids == ids, "not doubled"


def test_a_chat_template_by_its_name_and_what_it_refuses():
    tokenizer, chat = byte_tokenizer(), [{"role": "user", "content": "a"}]
    with pytest.raises(ConfigError, match=r"refuses a chat of tool \(unknown role tool"):
        Texts(tokenizer).render([{"role": "tool", "content": "a"}], begun=False)
    tokenizer.chat_template = {"loud": "{{ messages[0].content }}!", "quiet": "{{ messages[0].content }}."}
    texts = Texts(tokenizer)
    assert texts.use_template("quiet") == "{{ messages[0].content }}." and texts.render(chat, begun=False) == "a."
    assert texts.use_template("loud") and texts.render(chat, begun=False) == "a!"
    with pytest.raises(ConfigError, match=r"no chat template .default.; expected one of loud, quiet$"):
        texts.use_template()
