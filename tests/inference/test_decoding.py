"""Answers to prompts: the sampler that suits a model and its settings, with and without a memory of the prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import AMPLIFIED, EOS, KINDS, MASK, tiny
from inputs import poisoned
from saved_models import answers_of, decoder_with, pretrained_of, prompt_memory, random_prompts, save_model, state_of
from steps import memory_for

import dllm_memdlm
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.inference.decoding import Decoder
from dllm_memdlm.inference.decoding import memory_for as memory_of
from dllm_memdlm.inference.pretrained import load_pretrained
from dllm_memdlm.inference.samplers import completions
from dllm_memdlm.method.prompt_memory import save_snapshot

POISON = 47
NEW = 6
LOAD_AND_ANSWER = """
import json, sys
from dllm_memdlm.inference.decoding import Decoder, memory_for
from dllm_memdlm.inference.pretrained import load_pretrained

for folder, prompts in json.loads(sys.argv[1]):
    pretrained = load_pretrained(folder)
    decoder = Decoder(pretrained, memory=memory_for(pretrained, {}, f"{folder}/memory.safetensors"))
    with decoder.recalled(prompts):
        print(json.dumps(decoder.answers(prompts, 6, whole=True)))
"""
every_kind = pytest.mark.parametrize("kind", KINDS)


def decoder_of(kind: str, dtype: torch.dtype = torch.float32, shift: bool = False, **settings) -> Decoder:
    model = tiny(kind, dtype)
    return decoder_with(prompt_memory(model, memory_for(kind), shift, **settings), model)


def without(decoder: Decoder) -> Decoder:
    """The same model without memory."""
    return Decoder(decoder.pretrained, settings=decoder.settings)


def favouring_the_mask():
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[MASK] = 1.1 * model.lm_head.weight[42]
    return model


def test_the_sampler_is_what_the_model_was_made_for():
    assert [decoder_with(None, tiny(kind)).sampler for kind in KINDS] == ["mdlm", "llada21", "mdlm"]
    assert decoder_with(None, tiny("llada2", lora=True)).sampler == "llada21"
    forced = Decoder(pretrained_of(tiny("llada2")), "mdlm")
    assert forced.sampler == "mdlm" and forced.config_for(9).steps == 9


def test_the_papers_decoding_is_the_default_then_come_the_users_settings_then_the_requests():
    """LLaDA-MoE: one block, as many steps as tokens. LLaDA2.1: blocks of 32, a threshold of 0.95."""
    config = decoder_with(None, tiny("llada_moe")).config_for(40)
    assert (config.max_new_tokens, config.block_size, config.steps, config.temperature) == (40, 40, 40, 0.0)
    assert config.remasking == "low_confidence" and config.right_shift_logits is False
    config = decoder_with(None, tiny("llada2")).config_for(40)
    assert (config.max_new_tokens, config.block_size, config.threshold) == (40, 32, 0.95)
    assert Decoder(pretrained_of(tiny("llama"), shift=True)).config_for(4).right_shift_logits is True
    config = decoder_with(None, tiny("llama"), steps=3, temperature=0.5).config_for(40, temperature=0.25)
    assert (config.steps, config.temperature, config.block_size) == (3, 0.25, 40)


def test_an_answer_ends_with_the_text_or_the_turn(monkeypatch):
    """The canvas is given here, as these models end no text."""
    pretrained = pretrained_of(tiny("llama"))
    pretrained.tokenizer.eot_token_id = 9
    decoder, prompts = Decoder(pretrained), [[0, 5], [7]]
    canvas = torch.tensor([[0, 5, 3, 4, 0, 5], [7, 8, 9, 3, 4, 0]])
    monkeypatch.setattr(decoder._sampler, "sample", lambda *args: canvas)
    assert decoder.answers(prompts, 4) == [[3, 4], [8]]
    assert decoder.answers(prompts, 4, whole=True) == [[3, 4, 0, 5], [8, 9, 3, 4]]


def test_an_empty_prompt_has_an_answer_of_its_own_length():
    """Shifted logits need a token before the first one: the sampler puts it there, but it is no part of the answer."""
    for shift in (False, True):
        decoder = Decoder(pretrained_of(tiny("llama"), shift=shift))
        (answer,) = decoder.answers([[]], NEW, whole=True)
        assert len(answer) == NEW
    assert [answer] == decoder.answers([[decoder.pretrained.tokenizer.bos_token_id]], NEW, whole=True)


@every_kind
def test_a_stream_ends_with_the_answer(kind):
    decoder, prompts = decoder_of(kind), random_prompts(9, 14)
    with decoder.recalled(prompts):
        steps = [completions(canvas, [9, 14], NEW, ()) for canvas in decoder.stream(prompts, NEW)]
    assert steps[0] == [[MASK] * NEW] * 2 and steps[-1] == answers_of(decoder, prompts) and len(steps) > 2


def test_seeds_choose_the_answer():
    decoder, prompts = decoder_with(None, tiny("llama")), random_prompts(9, 14)
    draws = [decoder.answers(prompts, 12, seeds, temperature=1.0, whole=True) for seeds in ([1, 2], [1, 2], [3, 2])]
    assert draws[0] == draws[1] and draws[0][0] != draws[2][0] and draws[0][1] == draws[2][1]


@pytest.mark.parametrize("way", ["answers", "stream"])
def test_answers_that_are_left_masked_are_counted(way):
    """This model chooses the mask for some tokens, and its text leaves those out."""
    model, prompts = favouring_the_mask(), random_prompts(5, 9, 7, 8)
    decoder = decoder_with(None, model, block_size=4)
    if way == "answers":
        answers = decoder.answers(prompts, 12)
    else:
        *_, canvas = decoder.stream(prompts, 12)
        answers = completions(canvas, [5, 9, 7, 8], 12, [EOS])
    left = sum(MASK in answer for answer in answers)
    assert 0 < left == decoder.left_masked and decoder.answered == 4
    assert f"{left} of 4 answers" in decoder.unfinished() and "suppress_tokens=[2]" in decoder.unfinished()
    kept = decoder_with(None, model, block_size=4, suppress_tokens=[MASK])
    kept.answers(prompts, 12)
    assert (kept.answered, kept.left_masked, kept.unfinished()) == (4, 0, "")


@pytest.mark.parametrize("attention", ["full", "block_causal"])
@pytest.mark.parametrize(("kind", "shift"), [*((kind, False) for kind in KINDS), ("llama", True)])
def test_a_batch_answers_as_each_prompt_alone(kind, shift, attention):
    decoder = decoder_of(kind, torch.float64, shift, attention=attention, block_size=8)
    prompts = random_prompts(9, 30, 16, 1, 23)
    together = answers_of(decoder, prompts)
    assert together == [answers_of(decoder, [prompt])[0] for prompt in prompts]
    assert together != answers_of(without(decoder), prompts), "the memory should change something"
    turned = [3, 0, 4, 1, 2]
    assert answers_of(decoder, [prompts[i] for i in turned]) == [together[i] for i in turned]


@every_kind
def test_without_a_text_the_model_answers_by_itself(kind):
    decoder, prompts = decoder_of(kind), random_prompts(9, 14)
    plain = answers_of(without(decoder), prompts)
    with decoder.recalled([None, []]):
        assert decoder.answers(prompts, NEW, whole=True) == plain
    with decoder.recalled([None, prompts[1]]):
        one = decoder.answers(prompts, NEW, whole=True)
    assert one[0] == plain[0] and one[1] == answers_of(decoder, prompts[1:])[0]


@every_kind
def test_a_prompt_that_is_not_finite_leaves_the_others(kind):
    decoder, good = decoder_of(kind, torch.float64), random_prompts(12, 16, 9)
    poisoned(decoder.pretrained.model, POISON)
    bad = [*good[1][:-1], POISON]
    answers = answers_of(decoder, [good[0], bad, good[2]])
    assert decoder.memory.tally.not_finite == 1
    assert [answers[0], answers[2]] == answers_of(decoder, [good[0], good[2]])
    assert answers[1] == answers_of(without(decoder), [bad])[0]


@every_kind
def test_after_decoding_the_model_is_as_before(kind):
    decoder, prompts = decoder_of(kind), random_prompts(9, 14)
    model = decoder.pretrained.model
    before, plain = state_of(model), answers_of(without(decoder), prompts)
    answers_of(decoder, prompts)
    with pytest.raises(ConfigError, match="not a setting"), decoder.recalled(prompts):
        decoder.answers(prompts, NEW, colour="red")
    assert answers_of(without(decoder), prompts) == plain
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_memory_has_the_settings_of_training_but_for_changes():
    trained = MemoryConfig(rank=4, layer_fraction=0.4, inner_lr=0.7, dropout=0.5, scope="batch")
    pretrained = pretrained_of(tiny("llama"), trained, shift=True)
    memory = memory_of(pretrained, {"inner_lr": 0.3}, seed=5, attention="block_causal")
    expected = MemoryConfig(rank=4, layer_fraction=0.4, inner_lr=0.3, weighting="uniform")
    assert memory.memory.config == expected and memory.memory.right_shift_logits
    assert (memory.seed, memory.attention, memory.fixed) == (5, "block_causal", None)


def test_a_saved_memory_gives_the_same_answers_in_a_new_process(tmp_path):
    jobs, expected = [], []
    for kind in KINDS:
        settings = {**AMPLIFIED[kind], "rank": 4, "alpha": 8.0, "layer_fraction": 0.4}
        folder = save_model(tmp_path / kind, kind, recipe={"memory": settings})
        pretrained, prompts = load_pretrained(folder), random_prompts(20, 14)
        memory = memory_of(pretrained, {"steps": 3})
        fast = memory.recall(prompts[:1])
        save_snapshot(f"{folder}/memory.safetensors", fast, folder, memory.memory.config, prompts[0])
        jobs.append((folder, prompts))
        with memory.memory.holding(fast):
            expected.append(Decoder(pretrained).answers(prompts, NEW, whole=True))
        assert expected[-1] != answers_of(Decoder(pretrained), prompts)
    environment = {**os.environ, "PYTHONPATH": str(Path(dllm_memdlm.__file__).parents[1])}
    command = [sys.executable, "-c", LOAD_AND_ANSWER, json.dumps(jobs)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in found.stdout.splitlines()] == expected


def test_a_saved_memory_is_for_its_model_and_brings_its_settings(tmp_path):
    path, text = tmp_path / "memory.safetensors", random_prompts(12)[0]
    pretrained = pretrained_of(tiny("llama"), memory_for("llama"))
    written = memory_of(pretrained, {"rank": 3})
    save_snapshot(path, written.recall([text]), "tiny", written.memory.config, text)
    assert memory_of(pretrained, {}, path).memory.config.rank == 3
    with pytest.raises(ConfigError, match=r"give no others \(rank\)$"):
        memory_of(pretrained, {"rank": 4}, path)
    with pytest.raises(ConfigError, match="fast weights that do not fit this model"):
        memory_of(pretrained_of(tiny("llama", num_hidden_layers=5)), {}, path)
    save_snapshot(path, written.recall([text]), "another", written.memory.config, text)
    with pytest.raises(ConfigError, match="written with the model 'another', not 'tiny'"):
        memory_of(pretrained, {}, path)
