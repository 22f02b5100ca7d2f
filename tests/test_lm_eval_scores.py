"""Scores of the lm-eval model at their borders: windows of a long text, and continuations that end the text."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file, save_file
from saved_models import byte_tokenizer, save_model

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lm_eval[ruler]==0.4.13'")

from lm_eval.api.instance import Instance
from local_tasks import score

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
    assert [greedy for _, greedy in score(lm, ("w5 w6", " <eos> <eos>"), ("w5 w6", " <eos> w7"))] == [True, False]
