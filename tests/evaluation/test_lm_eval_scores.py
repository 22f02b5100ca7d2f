"""Scores of the lm-eval model at their borders: where continuations begin and end, and windows of a long text."""

from __future__ import annotations

import functools
import math
import shutil

import pytest
from conftest import EOS
from saved_models import BYTES, byte_tokenizer, ending, save_model, word_tokenizer

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'dllm-memdlm[eval]'")

from local_tasks import generate, rolling, save_uniform, score, values

from dllm_memdlm.data import train_tokenizer
from dllm_memdlm.evaluation.lm_eval_model import MemDLMEvalLM

TOKEN = -math.log(BYTES)  #: the log-likelihood of a token to a model that knows nothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), "llama", byte_tokenizer(), {"memory": {"rank": 4}})


def test_where_the_continuation_begins_and_the_context_is_cut(folder, caplog):
    model = functools.partial(MemDLMEvalLM, pretrained=folder, mc_num=8)
    lm = model()
    assert values(lm, ("Ada lives ", "here")) == values(lm, ("Ada lives", " here"))
    assert len({*values(lm, ("", "here")), *values(lm, ("Ada", "here")), *values(lm, (" ", "here"))}) == 3
    with caplog.at_level("WARNING", "lm_eval"):
        assert score(lm, ("Ada", ""), ("Ada", "a"))[0] == (0.0, False)
    assert any("1 of 2 continuations are empty" in message for message in caplog.messages)
    lm, long = model(max_length=30), "x" * 50 + "Ada lives by the river and"
    assert values(lm, (long, " so")) == values(lm, (long[-27:], " so"))
    assert values(model(max_length=30, memory=True), (long, " so")) == values(lm, (long, " so"))
    assert values(lm, ("Ada", "y" * 10 + "z" * 30)) == values(lm, ("", "z" * 30))


def test_every_token_is_counted_once(tmp_path):
    """By a model that knows nothing, each costs the same. The first one before a text is no part of it."""
    uniform = MemDLMEvalLM(pretrained=save_uniform(tmp_path / "bytes"), mc_num=5, max_length=16)
    pairs = [("Ada", " here"), ("x" * 40, "ab"), ("", "here")]
    assert values(uniform, *pairs) == pytest.approx([5 * TOKEN, 2 * TOKEN, 4 * TOKEN])
    texts = ["here", "x" * 15, "x" * 16, "x" * 100]
    assert rolling(uniform, *texts) == pytest.approx([len(text) * TOKEN for text in texts])
    tokenizer = train_tokenizer(["hello world"] * 9, 280)  # which takes " world" for one token
    lm = MemDLMEvalLM(pretrained=save_uniform(tmp_path / "merging", tokenizer), mc_num=2)
    token = -math.log(len(tokenizer))
    assert values(lm, ("hello wor", "ld"), ("hello wor", "zq")) == pytest.approx([token, 2 * token])
    # its likeliest token is the first one: in this tokenizer the end of sequence, with which a continuation may end
    lm = MemDLMEvalLM(pretrained=save_uniform(tmp_path / "words", word_tokenizer()), mc_num=2, check_greedy=True)
    assert lm._is_greedy([([5, 6], [EOS, EOS]), ([5, 6], [EOS, 7])], quiet=True) == [True, False]


def test_windows_hold_all_of_a_text_and_no_more_than_the_model_takes(folder, monkeypatch):
    lm, windows, text = MemDLMEvalLM(pretrained=folder, max_length=10), [], "twenty-three characters"
    monkeypatch.setattr(lm, "_log_likelihoods", lambda pairs, *_, **__: windows.extend(pairs) or [0.0] * len(pairs))
    rolling(lm, text)
    assert [token for _, continuation in windows for token in continuation] == lm.tokenizer(text)["input_ids"]
    assert max(len(context) + len(continuation) for context, continuation in windows) == lm.max_length
    assert windows[0][0] == [lm.tokenizer.bos_token_id]


def test_an_end_that_the_tokenizer_appends_changes_nothing(folder, tmp_path):
    """Neither likelihoods nor answers: the end stands behind no prompt and in no context."""
    ended = shutil.copytree(folder, tmp_path / "ended")
    ending(byte_tokenizer()).save_pretrained(ended)
    plain, other = (MemDLMEvalLM(pretrained=str(path), mc_num=2) for path in (folder, ended))
    assert other.tokenizer("a")["input_ids"][-1] == other.tokenizer.eos_token_id
    pairs = [("Ada lives", " here"), ("", "here")]
    assert score(other, *pairs) == score(plain, *pairs) and rolling(other, "here") == rolling(plain, "here")
    assert generate(other, "Ada lives") == generate(plain, "Ada lives")
