"""What a user can get wrong, and the settings objects that samplers take."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from conftest import make_tokenizer
from naive_samplers import decoder, prompts

from dllm_memdlm.config import ConfigError
from dllm_memdlm.inference.samplers import LLaDA21Sampler, LLaDA21SamplerConfig, MDLMSampler, MDLMSamplerConfig

SAMPLERS = {"mdlm": MDLMSampler, "llada21": LLaDA21Sampler}


@pytest.fixture(scope="module")
def model():
    return decoder("llama")


def one_line(raised: pytest.ExceptionInfo) -> str:
    message = str(raised.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("sampler", "settings", "message"),
    [
        ("mdlm", {"temprature": 0.5}, "unknown sampler setting 'temprature'; did you mean temperature?"),
        ("mdlm", {"zzz": 1}, "unknown sampler setting 'zzz'; known: begin_suppress_tokens, block_size, cache, "),
        ("mdlm", {"block_size": 0}, "sampler.block_size=0: expected at least 1"),
        ("mdlm", {"steps": 0}, "sampler.steps=0: expected at least 1"),
        ("mdlm", {"remasking": "lowest"}, "sampler.remasking='lowest': expected one of low_confidence, random"),
        ("mdlm", {"cache": "full"}, "sampler.cache='full': expected one of none, prefix, dual"),
        (
            "mdlm",
            {"max_new_tokens": None, "max_length": 9},
            "sampler.max_length=9: expected more than the prompt's 9 tokens",
        ),
        ("llada21", {"editing_treshold": 0.5}, "unknown sampler setting 'editing_treshold'; did you mean editing_thre"),
        ("llada21", {"steps": 8}, "unknown sampler setting 'steps'; "),
        ("llada21", {"block_size": 0}, "sampler.block_size=0: expected at least 1"),
        ("llada21", {"num_to_transfer": 0}, "sampler.num_to_transfer=0: expected at least 1"),
        ("llada21", {"max_post_steps": -1}, "sampler.max_post_steps=-1: expected at least 0"),
        ("llada21", {"block_steps": 0}, "sampler.block_steps=0: expected at least 1"),
        (
            "llada21",
            {"max_new_tokens": None, "max_length": 5},
            "sampler.max_length=5: expected more than the prompt's 9 tokens",
        ),
    ],
)
def test_a_wrong_setting_is_one_line(sampler, settings, message, model, tokenizer):
    with pytest.raises(ConfigError) as raised:
        SAMPLERS[sampler](model, tokenizer).sample(prompts(4, 9), **settings)
    assert one_line(raised).startswith(message)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_new_tokens": None, "max_length": None}, "max_length"),
        ({"max_new_tokens": -3}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"block_size": "32"}, "block_size"),
    ],
)
def test_no_setting_ends_in_a_traceback(sampler, settings, named, model, tokenizer):
    with pytest.raises(ConfigError) as raised:
        SAMPLERS[sampler](model, tokenizer).sample(prompts(4, 9), **settings)
    assert f"sampler.{named}=" in one_line(raised)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_seeds_are_one_for_each_prompt(sampler, model, tokenizer):
    with pytest.raises(ConfigError) as raised:
        SAMPLERS[sampler](model, tokenizer).sample(prompts(4, 9), seeds=[1])
    assert one_line(raised) == "1 seeds for 2 prompts: expected one for each"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_prompt(sampler, model, tokenizer):
    with pytest.raises(ConfigError, match="no prompt to decode"):
        SAMPLERS[sampler](model, tokenizer).sample([])


def test_filling_in_takes_no_cache(model, tokenizer):
    with pytest.raises(ConfigError) as raised:
        MDLMSampler(model, tokenizer).infill(prompts(4), cache="dual")
    assert one_line(raised) == "sampler.cache='dual': expected none when filling in"


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_a_canvas_needs_a_mask_and_an_end_of_sequence(sampler, model):
    with pytest.raises(ConfigError, match="tokenizer without mask_token_id"):
        sampler(model, make_tokenizer(bos_token="<bos>"))
    with pytest.raises(ConfigError, match="tokenizer without eos_token_id"):
        sampler(model, types.SimpleNamespace(mask_token_id=2, eos_token_id=None))


def test_a_model_without_stages_is_refused(tokenizer):
    with pytest.raises(TypeError, match="Linear"):
        MDLMSampler(torch.nn.Linear(2, 2), tokenizer)


# === settings objects ===


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_keywords_come_before_the_object(sampler, model, tokenizer):
    decode = SAMPLERS[sampler](model, tokenizer).sample
    config = {"mdlm": MDLMSamplerConfig, "llada21": LLaDA21SamplerConfig}[sampler](max_new_tokens=6, block_size=4)
    assert decode(prompts(4), config).shape[1] == decode(prompts(4), max_new_tokens=6, block_size=4).shape[1]
    assert len(decode(prompts(4), config, return_dict=True).histories) > 1
    assert torch.equal(decode(prompts(4), config, block_size=3), decode(prompts(4), max_new_tokens=6, block_size=3))
    assert config.block_size == 4, "the caller's object stays as it was"


@pytest.mark.dllm
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_dllms_settings_are_ours_without_what_we_added(sampler, model, tokenizer):
    """Same names, same defaults; and its objects will do."""
    from dllm.core.samplers import MDLMSamplerConfig as TheirMDLM
    from dllm.pipelines.llada21.sampler import LLaDA21SamplerConfig as TheirLLaDA21

    ours, theirs = {
        "mdlm": (MDLMSamplerConfig, TheirMDLM),
        "llada21": (LLaDA21SamplerConfig, TheirLLaDA21),
    }[sampler]
    mine, yours = dataclasses.asdict(ours()), dataclasses.asdict(theirs())
    assert {name: mine[name] for name in yours} == yours
    assert (
        mine.keys() - yours.keys() == {"mdlm": {"cache", "threshold"}, "llada21": {"use_cache", "block_steps"}}[sampler]
    )
    changes = {"max_new_tokens": 7, "block_size": 3}
    decode = SAMPLERS[sampler](model, tokenizer).sample
    assert torch.equal(decode(prompts(5), theirs(**changes)), decode(prompts(5), ours(**changes)))
    assert torch.equal(decode(prompts(5), theirs(), **changes), decode(prompts(5), ours(**changes)))
