"""The lm-eval model `memdlm`: evaluations of small local tasks, requests one by one, and scores at their borders."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EOS
from processes import launch
from saved_models import BYTES, byte_tokenizer, save_model, word_tokenizer

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'dllm-memdlm[eval]'")

import evaluate_in_processes
from lm_eval.api.model import CachingLM, hash_args
from local_tasks import (
    DOCUMENTS,
    ROWS,
    asking,
    data_in,
    decoded,
    evaluate,
    generate,
    responses,
    rolling,
    save_uniform,
    score,
    values,
    write_tasks,
)

from dllm_memdlm.data import train_tokenizer
from dllm_memdlm.evaluation import plugin
from dllm_memdlm.evaluation.likelihood import log_likelihoods, states
from dllm_memdlm.evaluation.lm_eval_model import MemDLMEvalLM
from dllm_memdlm.inference import arguments
from dllm_memdlm.inference.decoding import Decoder, memory_for
from dllm_memdlm.inference.pretrained import load_pretrained
from dllm_memdlm.method.prompt_memory import Tally, save_snapshot

MEMORY = {"rank": 4, "alpha": 8.0, "layer_fraction": 0.4, "inner_lr": 1.0}
KINDS_OF_TASK = ["tiny_generate", "tiny_choose", "tiny_roll"]
TEXTS = [row["question"] for row in ROWS]
LETTERS = [*range(7), *range(100, BYTES)]  #: tokens that are none


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    plugin.install()
    with data_in(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), "llama", byte_tokenizer(), {"memory": MEMORY})


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def model(folder):
    """Builds the model with these arguments."""
    return lambda **arguments: MemDLMEvalLM(**{"pretrained": folder, "device": "cpu", "mc_num": 4, **arguments})


@pytest.fixture(scope="module")
def runs(folder, tasks, tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same evaluations in this process, and in two as torchrun starts them (gloo)."""
    results = tmp_path_factory.mktemp("processes") / "results.json"
    launch(2, results.parent, evaluate_in_processes.write_all, folder, tasks, results)
    one = evaluate_in_processes.evaluate_all(folder, tasks)
    return json.loads(json.dumps(one)), json.loads(results.read_text())


def same(found: Any, expected: Any) -> bool:
    """Answers, or likelihoods with whether they are greedy; numbers up to rounding."""
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == (pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else expected)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["off", "prompt", "prefix"])
def test_every_kind_of_task(way, runs, folder):
    found = runs[0][way]
    prefixes = [DOCUMENTS[0] + "Wh"] * 3 + [DOCUMENTS[1]] * 2  # with which the questions begin
    memories = {"off": None, "prefix": prefixes, "prompt": TEXTS}[way]
    expected = [answer.split("\n")[0] for answer in decoded(folder, TEXTS, memories)]
    assert found["answers"][0] == [[[answer]] for answer in expected]
    tally = found["tally"]
    assert (tally is None) is (memories is None)
    if memories:
        assert tally["written"] >= 2 and tally["without"] == tally["not_finite"] == 0 and 0 < tally["hit_rate"] < 1
        assert runs[1]["prefix"]["tally"]["written"] < runs[1]["prompt"]["tally"]["written"]
    if way == "prefix":  # what is shared depends on the prompts of a process
        assert len(runs[1][way]["answers"][0]) == len(ROWS)
        return

    pretrained = load_pretrained(folder)
    decoder = Decoder(pretrained, memory=memory_for(pretrained, {}) if memories else None)
    for row, choices in zip(ROWS, found["answers"][1], strict=True):
        context = pretrained.tokenizer.encode(row["question"])
        for choice, ((value, greedy),) in zip(row["choices"], choices, strict=True):
            items = list(states(0, context, pretrained.tokenizer.encode(f" {choice}"), 4, 0))
            with decoder.recalled([context]):
                expected = sum(log_likelihoods(pretrained.model, items, pretrained.tokenizer.mask_token_id))
            assert value == pytest.approx(expected, rel=1e-5) and greedy is False
    assert found["scores"][2]["bits_per_byte,none"] > 1

    for one, two in zip(*(run[way]["answers"] for run in runs), strict=True):
        assert len(two) == len(ROWS), "every document once, though they do not divide by two"
        # the process with fewer documents answers its last one twice, so that both work on as many
        assert same(*([[request[0] for request in document] for document in found] for found in (two, one)))
    for one, two in zip(*(run[way]["scores"] for run in runs), strict=True):
        numbers = {name: value for name, value in one.items() if isinstance(value, float)}
        assert two["sample_len"] == len(ROWS) and numbers == pytest.approx({name: two[name] for name in numbers})


def test_the_same_prompt_is_sampled_anew_in_every_process(runs):
    one, two = ([document[0][0] for document in found["sampled"]["answers"][0]] for found in runs)
    assert one == two and len(set(one)) == len(ROWS)


def test_chats_with_shots_and_a_begun_answer(folder, tasks):
    settings = {"num_fewshot": 1, "apply_chat_template": True, "fewshot_as_multiturn": True}
    results = evaluate(tasks, ["tiny_generate", "tiny_prefixed"], {"pretrained": folder}, **settings)
    for task, begun in (("tiny_generate", ""), ("tiny_prefixed", "Well,")):
        prompts = [sample["arguments"][0][0] for sample in results["samples"][task]]
        assert all(prompt.count("<|user|>") == prompt.count("<|assistant|>") == 2 for prompt in prompts)
        assert all(prompt.count("<|role_end|>") == 3 for prompt in prompts), "the answer's turn has not ended"
        assert all(prompt.rpartition("<|assistant|>")[2].strip() == begun for prompt in prompts)
        expected = [answer.split("\n")[0] for answer in decoded(folder, prompts, None)]
        assert responses(results, task) == [[[answer]] for answer in expected]


def test_a_second_run_is_answered_from_the_cache(folder, tasks, tmp_path):
    cache, given = str(tmp_path / "cache"), {"pretrained": folder, "mc_num": 2}
    first = evaluate(tasks, KINDS_OF_TASK, given, use_cache=cache)
    other = {**given, "memory": True, "seed": 1}
    again, fresh = evaluate(tasks, KINDS_OF_TASK, other, use_cache=cache), evaluate(tasks, KINDS_OF_TASK, other)
    for name in KINDS_OF_TASK:
        assert responses(again, name) == responses(first, name) != responses(fresh, name)
    assert again["config"]["memory_tally"]["written"] == 0


def test_what_was_answered_before_a_failure_is_in_the_cache(model, tmp_path, monkeypatch):
    lm, answers = model(), iter([[[10]], [[11]]])
    caching = CachingLM(lm, str(tmp_path / "cache.db"))
    monkeypatch.setattr(lm.decoder, "answers", lambda *args, **kw: next(answers))
    with pytest.raises(RuntimeError):
        caching.generate_until(asking(*TEXTS))
    assert sum(hash_args("generate_until", request.args) in caching.dbdict for request in asking(*TEXTS)) == 2
    caching.dbdict.close()


def test_arguments_of_the_command_line(folder, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = f"pretrained={folder},memory=true,memory_steps=3,suppress_tokens=[5;7],steps=3,memory_inner_lr=2"
    lm = MemDLMEvalLM.create_from_arg_string(text, {"batch_size": "auto:2", "device": "cuda:0"})
    assert lm.decoder.config_for(6).suppress_tokens == [5, 7] and lm.decoder.config_for(6).steps == 3
    assert lm.device.type == "cpu" and any(message.startswith("device=cuda:0: ") for message in caplog.messages)
    info = lm.get_model_info()
    assert info["memory"]["steps"] == 3 and info["memory"]["inner_lr"] == 2.0
    assert info["sampler"] == "mdlm" and info["sampler_settings"] == {"suppress_tokens": [5, 7], "steps": 3}


def test_where_an_answer_ends(model, caplog):
    (whole,) = generate(model(), TEXTS[0])
    assert generate(model(), TEXTS[0], until=["zzz", "", whole[2]]) == [whole[: whole.index(whole[2])]]
    lm = model(max_gen_toks=5, batch_size=4, suppress_tokens=LETTERS)  # a letter a token
    requests = asking(TEXTS[0], max_gen_toks=9) + asking(TEXTS[1], max_gen_toks=None)
    assert [len(answer) for answer in lm.generate_until(requests, disable_tqdm=True)] == [9, 5]
    lm = model(suppress_tokens=[0, 1, *range(3, BYTES)])  # so that masks are left, which is said
    with caplog.at_level("WARNING", "lm_eval"):
        assert generate(lm, "Ada", "Bob") == ["", ""] and lm.get_model_info()["answers_left_masked"] == 2
    assert any("2 of 2 answers have masks left" in message for message in caplog.messages)


def test_a_saved_memory_is_in_place_for_every_prompt(model, folder, tmp_path):
    path, pretrained = tmp_path / "memory.safetensors", load_pretrained(folder)
    written, text = memory_for(pretrained, {}), pretrained.tokenizer.encode(DOCUMENTS[0])
    save_snapshot(path, written.recall([text]), folder, written.memory.config, text)
    lm = model(fast_weights=str(path))
    assert generate(lm, *TEXTS) == decoded(folder, TEXTS, [DOCUMENTS[0]] * len(TEXTS)) != generate(model(), *TEXTS)
    assert rolling(lm, "Ada") != rolling(model(), "Ada")


def test_generators_of_the_program_go_on_as_if_nothing_had_been_drawn(model, monkeypatch):
    """Whatever draws while a model is loaded; tasks draw their data after it."""

    def numbers() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def drawn_after(work: Callable[[], Any]) -> tuple[float, float, float]:
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        work()
        return numbers()

    lm, expected = model(memory=True), drawn_after(lambda: None)
    monkeypatch.setattr(arguments, "load_pretrained", lambda *args, **kw: (numbers(), load_pretrained(*args, **kw))[1])
    assert drawn_after(lambda: model(memory=True)) == expected
    assert drawn_after(lambda: generate(lm, TEXTS[0], temperature=1.0)) == expected
    assert drawn_after(lambda: score(lm, (TEXTS[0], " yes"))) == expected


@pytest.mark.parametrize("memory", [False, True])
def test_whether_a_continuation_is_the_models_own(memory, model):
    lm = model(check_greedy=True, memory=memory, suppress_tokens=LETTERS)
    own = [(text, answer) for text, answer in zip(TEXTS, generate(lm, *TEXTS), strict=True)]
    others = [(context, answer[:-1] + "~") for context, answer in own]
    found = score(lm, *own, *others, (TEXTS[0], ""))
    assert [greedy for _, greedy in found] == [True] * 5 + [False] * 5 + [True]
    blind = model(memory=memory, suppress_tokens=[5])
    assert [greedy for _, greedy in score(blind, *own)] == [False] * 5
    assert values(blind, *own, *others, (TEXTS[0], "")) == [value for value, _ in found]


def test_the_tally_counts_prompts(model):
    """Not the masks from which their likelihood is estimated; and whole texts have no prompt to adapt to."""
    lm = model(memory=True, mc_num=16, batch_size=4)
    score(lm, (TEXTS[0], " first"), (TEXTS[0], " second"), (TEXTS[1], " third"))
    assert (lm.memory.tally.written, lm.memory.tally.reused, lm.memory.tally.without) == (2, 1, 0)
    lm = model(memory=True, mc_num=16, max_length=40)
    score(lm, (TEXTS[0], " one"), ("", "two"))
    assert (lm.memory.tally.written, lm.memory.tally.without) == (0, 2)
    lm = model(memory=True, max_length=40)
    assert rolling(lm, TEXTS[0], "Ada") == rolling(model(max_length=40), TEXTS[0], "Ada")
    assert lm.memory.tally == Tally()


def test_overlong_prompts_have_memories_where_these_read_windows(model):
    found = {}
    for window in (None, 16):
        settings = {"memory_window": window, "memory_strategy": "cover", "memory_inner_lr": 3.0, "max_length": 48}
        lm = model(memory=True, max_gen_toks=4, **settings)
        found[window] = [generate(lm, TEXTS[0]), score(lm, (TEXTS[0], "Ada"))]
        assert (lm.memory.tally.without, lm.memory.tally.written) == ((2, 0) if window is None else (0, 1))
    assert all(one != other for one, other in zip(*found.values(), strict=True))


def test_where_the_continuation_begins_and_the_context_is_cut(model, caplog):
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
    token = -math.log(BYTES)
    uniform = MemDLMEvalLM(pretrained=save_uniform(tmp_path / "bytes"), mc_num=5, max_length=16)
    pairs = [("Ada", " here"), ("x" * 40, "ab"), ("", "here")]
    assert values(uniform, *pairs) == pytest.approx([5 * token, 2 * token, 4 * token])
    texts = ["here", "x" * 15, "x" * 16, "x" * 100]
    assert rolling(uniform, *texts) == pytest.approx([len(text) * token for text in texts])
    tokenizer = train_tokenizer(["hello world"] * 9, 280)  # which takes " world" for one token
    lm = MemDLMEvalLM(pretrained=save_uniform(tmp_path / "merging", tokenizer), mc_num=2)
    token = -math.log(len(tokenizer))
    assert values(lm, ("hello wor", "ld"), ("hello wor", "zq")) == pytest.approx([token, 2 * token])
    # its likeliest token is the first one: in this tokenizer the end of sequence, with which a continuation may end
    lm = MemDLMEvalLM(pretrained=save_uniform(tmp_path / "words", word_tokenizer()), mc_num=2, check_greedy=True)
    assert lm._is_greedy([([5, 6], [EOS, EOS]), ([5, 6], [EOS, 7])], quiet=True) == [True, False]


def test_windows_hold_all_of_a_text_and_no_more_than_the_model_takes(model, monkeypatch):
    lm, windows, text = model(max_length=10), [], "twenty-three characters"
    monkeypatch.setattr(lm, "_log_likelihoods", lambda pairs, *_, **__: windows.extend(pairs) or [0.0] * len(pairs))
    rolling(lm, text)
    assert [token for _, continuation in windows for token in continuation] == lm.tokenizer(text)["input_ids"]
    assert max(len(context) + len(continuation) for context, continuation in windows) == lm.max_length
    assert windows[0][0] == [lm.tokenizer.bos_token_id]
