"""Scores of the lm-eval model at their borders: windows of a long text, and continuations that end the text."""

from __future__ import annotations

import math
import shutil

import pytest
from conftest import EOS
from safetensors.torch import load_file, save_file
from saved_models import BYTES, byte_tokenizer, ending, save_model

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lm_eval[ruler]==0.4.13'")

from lm_eval.api.instance import Instance
from local_tasks import generate, save_uniform, score, scoring

from dllm_memdlm.config import ConfigError
from dllm_memdlm.data import train_tokenizer
from dllm_memdlm.evaluation.lm_eval_model import MemDLMEvalLM


def test_windows_hold_all_of_a_text_and_no_more_than_the_model_takes(tmp_path, monkeypatch):
    lm = MemDLMEvalLM(pretrained=save_model(tmp_path, "llama", byte_tokenizer()), mc_num=2, max_length=10)
    windows = []
    monkeypatch.setattr(
        lm, "_log_likelihoods", lambda pairs, *args, **kwargs: windows.extend(pairs) or [0.0] * len(pairs)
    )
    text = "twenty-three characters"
    lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert [token for _, continuation in windows for token in continuation] == lm.tokenizer(text)["input_ids"]
    assert max(len(context) + len(continuation) for context, continuation in windows) == lm.max_length
    assert windows[0][0] == [lm.tokenizer.bos_token_id]


def test_a_continuation_may_end_the_text(tmp_path):
    """This model's likeliest token is always the first one, which is the tokenizer's end of sequence."""
    folder = save_model(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] *= 0
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    lm = MemDLMEvalLM(pretrained=folder, mc_num=2, check_greedy=True)
    assert lm._is_greedy([([5, 6], [EOS, EOS]), ([5, 6], [EOS, 7])], quiet=True) == [True, False]


def test_a_continuation_that_merges_with_its_context_is_scored(tmp_path):
    """By a model that knows nothing: each token costs the same, so what is scored shows in the value."""
    tokenizer = train_tokenizer(["hello world"] * 9, 280)
    lm = MemDLMEvalLM(pretrained=save_uniform(tmp_path, tokenizer), mc_num=2)
    merged, apart = score(lm, ("hello wor", "ld"), ("hello wor", "zq"))
    per_token = -math.log(len(tokenizer))
    assert merged[0] == pytest.approx(per_token) and apart[0] == pytest.approx(2 * per_token)


def test_empty_continuations_are_said(tmp_path, caplog):
    lm = MemDLMEvalLM(pretrained=save_uniform(tmp_path), mc_num=2)
    with caplog.at_level("WARNING", "lm_eval"):
        assert score(lm, ("Ada", ""), ("Ada", "a"))[0] == (0.0, False)
    assert "1 of 2 continuations are empty, and score 0" in caplog.messages


def test_an_end_that_the_tokenizer_appends_changes_nothing(tmp_path):
    """Neither likelihoods nor answers: the end stands behind no prompt and in no context."""
    folder = save_model(tmp_path / "plain", "llama", byte_tokenizer())
    ended = shutil.copytree(folder, tmp_path / "ended")
    ending(byte_tokenizer()).save_pretrained(ended)
    plain, other = (MemDLMEvalLM(pretrained=str(path), mc_num=2) for path in (folder, ended))
    assert other.tokenizer("a")["input_ids"][-1] == other.tokenizer.eos_token_id
    for lm in (plain, other):
        lm.tokenizer.name_or_path = folder
    pairs = [("Ada lives", " here"), ("", "here")]
    assert score(other, *pairs) == score(plain, *pairs)
    assert other.loglikelihood_rolling(scoring(("here",))) == plain.loglikelihood_rolling(scoring(("here",)))
    assert generate(other, "Ada lives") == generate(plain, "Ada lives")


def test_a_prompt_that_spells_a_mask_is_answered_as_any_other(tmp_path):
    """The mask is no token of the prompt, and the whole answer is decoded."""
    lm = MemDLMEvalLM(pretrained=save_model(tmp_path, "llama", byte_tokenizer()), suppress_tokens=[2], block_size=2)
    spelled = "Ada " + lm.tokenizer.mask_token * 12
    assert lm.tokenizer.mask_token_id not in lm.texts.context(spelled).ids
    generate(lm, spelled)
    assert (lm.decoder.answered, lm.get_model_info()["answers_left_masked"]) == (1, 0)


def test_masks_that_are_left_are_said(tmp_path, caplog):
    lm = MemDLMEvalLM(
        pretrained=save_model(tmp_path, "llama", byte_tokenizer()), suppress_tokens=[0, 1, *range(3, BYTES)]
    )
    with caplog.at_level("WARNING", "lm_eval"):
        assert generate(lm, "Ada", "Bob") == ["", ""]
    assert lm.get_model_info()["answers_left_masked"] == 2
    assert any(message.startswith("rank 0: 2 of 2 answers have masks left") for message in caplog.messages)


def test_a_chat_template_that_is_not_there_is_said(tmp_path):
    lm = MemDLMEvalLM(pretrained=save_model(tmp_path, "llama"), mc_num=2)
    for asked in (lambda: lm.chat_template(True), lambda: lm.apply_chat_template([{"role": "user", "content": "w5"}])):
        with pytest.raises(ConfigError, match=r"^--apply_chat_template: tokenizer='.*' has no chat template 'default'"):
            asked()
    assert lm.chat_template(False) is None
