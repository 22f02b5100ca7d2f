"""Settings of the samplers: what is refused, and the objects that they may come in."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from conftest import KINDS, MASK, make_tokenizer
from naive_samplers import decoder, prompts

from dllm_memdlm.config import ConfigError
from dllm_memdlm.inference.samplers import LLaDA21Sampler, MDLMSampler

SAMPLERS = {"mdlm": MDLMSampler, "llada21": LLaDA21Sampler}
both = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


@pytest.fixture(scope="module")
def model():
    return decoder("llama")


@both
@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"temprature": 0.5}, ["temprature", " sampler", "known: ", "block_size, "]),
        ({"max_new_tokens": None, "max_length": 9}, ["sampler.max_length=9", "more than the prompt's 9"]),
        ({"max_new_tokens": None, "max_length": None}, ["sampler.max_length=None"]),
        ({"max_new_tokens": -3}, ["sampler.max_new_tokens=-3", "at least 1"]),
        ({"block_size": "32"}, ["sampler.block_size='32'", "whole number"]),
        ({"seeds": [1]}, ["1 seeds for 2 prompts"]),
    ],
)
def test_a_wrong_setting_is_one_line(sampler, settings, parts, model, tokenizer):
    with pytest.raises(ConfigError) as raised:
        sampler(model, tokenizer).sample(prompts(9, 4), **settings)
    message = str(raised.value)
    assert "\n" not in message and [part for part in parts if part not in message] == [], message


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
        sampler(model, tokenizer).infill(prompts(4), **{"cache": "dual"} if sampler is MDLMSampler else {})


@both
def test_keywords_come_before_the_object(sampler, model, tokenizer):
    decode, config = sampler(model, tokenizer).sample, sampler.CONFIG(max_new_tokens=6, block_size=4)
    assert decode(prompts(4), config).shape[1] == decode(prompts(4), max_new_tokens=6, block_size=4).shape[1]
    assert len(decode(prompts(4), config, return_dict=True).histories) > 1
    assert torch.equal(decode(prompts(4), config, block_size=3), decode(prompts(4), max_new_tokens=6, block_size=3))
    assert config.block_size == 4, "the caller's object stays as it was"


@both
def test_steps_yield_the_canvas_as_it_changes(sampler, model, tokenizer):
    sampler, settings, (prompt,) = sampler(model, tokenizer), {"max_new_tokens": 7, "block_size": 4}, prompts(9)
    canvases = sampler.steps([prompt], **settings)
    first = next(canvases)
    assert first[0, :16].tolist() == [*prompt, *[tokenizer.mask_token_id] * 7]
    assert torch.is_grad_enabled(), "between two steps the caller's own mode holds"
    seen = [first.clone(), *(canvas.clone() for canvas in canvases if canvas is first)]
    output = sampler.sample([prompt], **settings, return_dict=True)
    assert [c.tolist() for c in seen] == [c.tolist() for c in output.histories]
    assert torch.equal(first, output.sequences) and torch.equal(sampler.sample([prompt], **settings), first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_in_bfloat16(kind, temperature, tokenizer):
    model, settings = decoder(kind, torch.bfloat16), {"max_new_tokens": 13, "temperature": temperature}
    for changes in ({}, {"cache": "dual"}, {"cache": "prefix", "cfg_scale": 0.5}):
        tokens = MDLMSampler(model, tokenizer).sample(prompts(9, 5), block_size=5, steps=13, **settings, **changes)
        assert tokens.dtype == torch.long and not (tokens == MASK).any()
    for cached in (True, False):
        more = {"threshold": 0.3, "editing_threshold": 0.3, "top_k": 20, "top_p": 0.9, "use_cache": cached}
        tokens = LLaDA21Sampler(model, tokenizer).sample(prompts(9, 3), block_size=4, **settings, **more)
        assert tokens.dtype == torch.long and not (tokens == MASK)[0].any()


@pytest.mark.dllm
@pytest.mark.parametrize("name", SAMPLERS)
def test_dllms_settings_are_ours_without_what_we_added(name, model, tokenizer):
    """Same names, same defaults; and its objects will do."""
    from dllm.core.samplers import MDLMSamplerConfig as TheirMDLM
    from dllm.pipelines.llada21.sampler import LLaDA21SamplerConfig as TheirLLaDA21

    ours, theirs = SAMPLERS[name].CONFIG, {"mdlm": TheirMDLM, "llada21": TheirLLaDA21}[name]
    mine, yours = dataclasses.asdict(ours()), dataclasses.asdict(theirs())
    assert {name: mine[name] for name in yours} == yours
    added = {"mdlm": {"cache", "threshold"}, "llada21": {"use_cache", "block_steps"}}
    assert mine.keys() - yours.keys() == added[name]
    decode, changes = SAMPLERS[name](model, tokenizer).sample, {"max_new_tokens": 7, "block_size": 3}
    assert torch.equal(decode(prompts(5), theirs(**changes)), decode(prompts(5), ours(**changes)))
    assert torch.equal(decode(prompts(5), theirs(), **changes), decode(prompts(5), ours(**changes)))
