"""Answers to prompts: the sampler that suits a model, its settings, with and without a memory of the prompts."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from conftest import EOS, KINDS, MASK, SHIFTED, make_tokenizer, tiny
from data_files import message_of
from naive_samplers import decoder as decoding_model
from naive_samplers import prompts as texts_of
from saved_models import answers_of, decoder_with, pretrained_of, prompt_memory, random_prompts
from steps import memory_for

from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.inference import decoding
from dllm_memdlm.inference.decoding import Decoder
from dllm_memdlm.inference.decoding import memory_for as memory_of
from dllm_memdlm.inference.samplers import DreamSampler, LLaDA21Sampler, MDLMSampler, completions
from dllm_memdlm.method.prompt_memory import save_snapshot

NEW = 6


def decoder_of(kind: str, dtype: torch.dtype = torch.float32, shift: bool = False, **settings) -> Decoder:
    model = tiny(kind, dtype)
    return decoder_with(prompt_memory(model, memory_for(kind), shift, **settings), model)


def without(decoder: Decoder) -> Decoder:
    """The same model without memory."""
    return Decoder(decoder.pretrained, settings=decoder.settings)


def test_the_sampler_is_what_the_model_was_made_for():
    found = [decoder_with(None, tiny(kind)).sampler for kind in (*KINDS, SHIFTED)]
    assert found == ["mdlm", "llada21", "mdlm", "mdlm", "dream"]
    assert decoder_with(None, tiny("llada2", lora=True)).sampler == "llada21"
    forced = Decoder(pretrained_of(tiny("llada2")), "mdlm")
    assert forced.sampler == "mdlm" and forced.config_for(9).steps == 9


@pytest.mark.parametrize("name", decoding.SAMPLERS)
def test_every_sampler_decodes_by_its_name(name):
    kind = {"dream": SHIFTED}.get(name, "llada2")
    settings = {"suppress_tokens": [MASK]} if name in ("mdlm", "dream") else {}
    decoder = Decoder(pretrained_of(tiny(kind), shift=kind == SHIFTED), name, settings)
    assert name == decoder.config_for(7).NAME
    assert [len(answer) for answer in decoder.answers([[5, 6, 7]], 7, whole=True)] == [7]
    if name == "llada2":
        config = decoder.config_for(7)
        assert (config.editing_threshold, config.block_steps) == (None, 32)


def test_the_papers_decoding_is_the_default_then_come_the_users_settings_then_the_requests():
    """LLaDA-MoE: one block, as many steps as tokens. LLaDA2.1: blocks of 32, a threshold of 0.95. Dream: as its own."""
    config = decoder_with(None, tiny("llada_moe")).config_for(40)
    assert (config.max_new_tokens, config.block_size, config.steps, config.temperature) == (40, 40, 40, 0.0)
    assert config.remasking == "low_confidence" and config.right_shift_logits is False
    config = decoder_with(None, tiny("llada2")).config_for(40)
    assert (config.max_new_tokens, config.block_size, config.threshold) == (40, 32, 0.95)
    assert Decoder(pretrained_of(tiny("llama"), shift=True)).config_for(4).right_shift_logits is True
    config = decoder_with(None, tiny("llama"), steps=3, temperature=0.5).config_for(40, temperature=0.25)
    assert (config.steps, config.temperature, config.block_size) == (3, 0.25, 40)
    config = decoder_with(None, tiny(SHIFTED)).config_for(40)
    assert (config.steps, config.alg, config.temperature) == (40, "entropy", 0.0)
    assert Decoder(pretrained_of(tiny("llama")), "dream", {"alg": "origin"}).config_for(4).alg == "origin"
    assert Decoder(pretrained_of(tiny("llama")), "dream").config_for(4).right_shift_logits is False


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


@pytest.mark.parametrize("way", ["answers", "stream"])
def test_answers_that_are_left_masked_are_counted(way):
    """This model chooses the mask for some tokens, and its text leaves those out."""
    model, prompts = tiny("llama"), random_prompts(5, 9, 7, 8)
    with torch.no_grad():
        model.lm_head.weight[MASK] = 1.1 * model.lm_head.weight[42]
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


@pytest.mark.parametrize(
    ("kind", "shift", "attention"),
    [
        *((kind, kind == SHIFTED, "full") for kind in (*KINDS, SHIFTED)),
        ("llama", True, "block_causal"),
    ],
)
def test_a_batch_answers_as_each_prompt_alone(kind, shift, attention):
    decoder = decoder_of(kind, torch.float64, shift, attention=attention, block_size=8)
    prompts, turned = random_prompts(9, 30, 16, 1, 23), [3, 0, 4, 1, 2]
    alone, plain = [answers_of(decoder, [prompt])[0] for prompt in prompts], answers_of(without(decoder), prompts)
    assert answers_of(decoder, prompts) == alone != plain
    assert answers_of(decoder, [prompts[i] for i in turned]) == [alone[i] for i in turned]
    with decoder.recalled([None, prompts[1], [], *prompts[3:]]):
        assert decoder.answers(prompts, NEW, whole=True) == [plain[0], alone[1], plain[2], *alone[3:]]


def test_the_memory_has_the_settings_of_training_but_for_changes_or_those_it_was_saved_with(tmp_path):
    of_training = {"enabled": False, "dropout": 0.5, "scope": "batch", "sync": True, "prompt_loss": 0.3}
    trained = MemoryConfig(rank=4, layer_fraction=0.4, inner_lr=0.7, **of_training)
    pretrained, path = pretrained_of(tiny("llama"), trained, shift=True), tmp_path / "memory"
    memory = memory_of(pretrained, {"inner_lr": 0.3}, seed=5, attention="block_causal")
    expected = MemoryConfig(rank=4, layer_fraction=0.4, inner_lr=0.3, weighting="uniform", source="prompt")
    assert memory.memory.config == expected and memory.memory.right_shift_logits
    assert (memory.seed, memory.attention, memory.fixed) == (5, "block_causal", None)
    (text,) = random_prompts(9)
    save_snapshot(path, memory.recall([text]), "tiny", expected, text)
    assert memory_of(pretrained, {}, path).memory.config == expected
    with pytest.raises(ConfigError, match=r"give no others \(rank\)$"):
        memory_of(pretrained, {"rank": 4}, path)
    with pytest.raises(ConfigError, match="fast weights that do not fit this model"):
        memory_of(pretrained_of(tiny("llama", num_hidden_layers=5)), {}, path)


def test_what_a_model_sees_and_what_a_memory_reads():
    text, model = random_prompts(20)[0], tiny("llama")

    def parts(prompt: list[int], window: int | None = None, **settings: int) -> tuple:
        memory = prompt_memory(model, memory_for("llama", window=window))
        return Decoder(pretrained_of(model), memory=memory, max_length=16, **settings).parts(prompt, 4)

    assert parts(text) == (text[-12:], None) and parts(text[:12]) == (text[:12], text[:12])
    assert parts(text, window=8) == (text[-12:], text)
    assert parts(text, window=8, visible=5) == (text[-5:], text)
    assert parts(text[:12], visible=5) == (text[7:12], text[:12])
    assert parts(text, visible=5) == (text[-5:], None)
    # as a run's recipe says, unless told otherwise
    trained = dataclasses.replace(pretrained_of(model), visible=7)
    assert Decoder(trained).visible == 7 and Decoder(trained, visible=3).visible == 3


IN_BLOCKS = {"mdlm": MDLMSampler, "llada21": LLaDA21Sampler}
SAMPLERS = {**IN_BLOCKS, "dream": DreamSampler}  # which has tests of its own
both = pytest.mark.parametrize("sampler", IN_BLOCKS.values(), ids=IN_BLOCKS)


@pytest.fixture(scope="module")
def model():
    return decoding_model("llama")


@both
@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"temprature": 0.5}, ["unknown setting of the ", " sampler 'temprature'; did you mean temperature?"]),
        ({"max_new_tokens": None, "max_length": 9}, ["sampler.max_length=9", "more than the prompt's 9"]),
        ({"max_new_tokens": None, "max_length": None}, ["sampler.max_length=None"]),
        ({"zzz": 1}, ["'zzz'", "known: ", "block_size, "]),
        ({"max_new_tokens": -3}, ["sampler.max_new_tokens=-3", "at least 1"]),
        ({"block_size": "32"}, ["sampler.block_size='32'", "whole number"]),
        ({"seeds": [1]}, ["1 seeds for 2 prompts"]),
    ],
)
def test_a_wrong_setting_is_one_line(sampler, settings, parts, model, tokenizer):
    message = message_of(lambda: sampler(model, tokenizer).sample(texts_of(9, 4), **settings))
    assert [part for part in parts if part not in message] == [], message


@both
def test_what_cannot_be_decoded_is_refused(sampler, model, tokenizer):
    """Filling in takes no cache, and no blocks from left to right."""
    with pytest.raises(ConfigError, match="no prompt to decode"):
        sampler(model, tokenizer).sample([])
    with pytest.raises(ConfigError, match="tokenizer without mask_token_id"):
        sampler(model, make_tokenizer(bos_token="<bos>"))
    with pytest.raises(ConfigError, match="tokenizer without eos_token_id"):
        sampler(model, types.SimpleNamespace(mask_token_id=2, eos_token_id=None))
    with pytest.raises(TypeError, match="Linear"):
        sampler(torch.nn.Linear(2, 2), tokenizer)
    with pytest.raises((ConfigError, TypeError), match=r"sampler\.cache='dual': expected none|MDLMSampler\.infill can"):
        sampler(model, tokenizer).infill(texts_of(4), **{"cache": "dual"} if sampler is MDLMSampler else {})


@both
def test_keywords_come_before_the_object(sampler, model, tokenizer):
    decode, config = sampler(model, tokenizer).sample, sampler.CONFIG(max_new_tokens=6, block_size=4)
    assert decode(texts_of(4), config).shape[1] == decode(texts_of(4), max_new_tokens=6, block_size=4).shape[1]
    assert len(decode(texts_of(4), config, return_dict=True).histories) > 1
    assert torch.equal(decode(texts_of(4), config, block_size=3), decode(texts_of(4), max_new_tokens=6, block_size=3))
    assert config.block_size == 4, "the caller's object stays as it was"


@both
def test_steps_yield_the_canvas_as_it_changes(sampler, model, tokenizer):
    sampler, settings, (prompt,) = sampler(model, tokenizer), {"max_new_tokens": 7, "block_size": 4}, texts_of(9)
    canvases = sampler.steps([prompt], **settings)
    first = next(canvases)
    assert first[0, :16].tolist() == [*prompt, *[tokenizer.mask_token_id] * 7]
    assert torch.is_grad_enabled(), "between two steps the caller's own mode holds"
    seen = [first.clone(), *(canvas.clone() for canvas in canvases if canvas is first)]
    output = sampler.sample([prompt], **settings, return_dict=True)
    assert [c.tolist() for c in seen] == [c.tolist() for c in output.histories]
    assert torch.equal(first, output.sequences) and torch.equal(sampler.sample([prompt], **settings), first)


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_in_bfloat16(temperature, tokenizer):
    model, settings = decoding_model("llama", torch.bfloat16), {"max_new_tokens": 13, "temperature": temperature}
    found = []
    for changes in ({}, {"cache": "dual"}, {"cache": "prefix", "cfg_scale": 0.5}):
        changes |= {"block_size": 5, "steps": 13, "suppress_tokens": [MASK]}  # it may be drawn
        found.append(MDLMSampler(model, tokenizer).sample(texts_of(9, 5), **settings, **changes))
    for alg in ("origin", "maskgit_plus", "topk_margin", "entropy"):
        changes = {"alg": alg, "steps": 5, "suppress_tokens": [MASK]}
        found.append(DreamSampler(model, tokenizer).sample(texts_of(9, 5), **settings, **changes))
    for cached in (True, False):
        more = {"threshold": 0.3, "editing_threshold": 0.3, "top_k": 20, "top_p": 0.9, "use_cache": cached}
        found.append(LLaDA21Sampler(model, tokenizer).sample(texts_of(9, 3), block_size=4, **settings, **more)[:1])
    assert all(tokens.dtype == torch.long and not (tokens == MASK).any() for tokens in found)


@pytest.mark.dllm
@pytest.mark.parametrize("name", SAMPLERS)
def test_dllms_settings_are_ours_without_what_we_added(name, model, tokenizer):
    from dllm.core.samplers import MDLMSamplerConfig as TheirMDLM
    from dllm.pipelines.dream.sampler import DreamSamplerConfig as TheirDream
    from dllm.pipelines.llada21.sampler import LLaDA21SamplerConfig as TheirLLaDA21

    ours, theirs = SAMPLERS[name].CONFIG, {"mdlm": TheirMDLM, "llada21": TheirLLaDA21, "dream": TheirDream}[name]
    mine, yours = dataclasses.asdict(ours()), dataclasses.asdict(theirs())
    assert {name: mine[name] for name in yours} == yours
    added = {"mdlm": {"cache", "threshold"}, "llada21": {"use_cache", "block_steps"}, "dream": {"suppress_tokens"}}
    assert mine.keys() - yours.keys() == added[name]
    changes = {
        "max_new_tokens": 7,
        **({"alg": "entropy", "temperature": 0.0} if name == "dream" else {"block_size": 3}),
    }
    decode = SAMPLERS[name](model, tokenizer).sample
    assert torch.equal(decode(texts_of(5), theirs(**changes)), decode(texts_of(5), ours(**changes)))
    assert torch.equal(decode(texts_of(5), theirs(), **changes), decode(texts_of(5), ours(**changes)))
