"""What `--model_args` may hold: every name and value is checked before a model is loaded."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from saved_models import random_prompts, save_model

from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.inference.arguments import EvalArguments, Parsed, device_of, parse
from dllm_memdlm.inference.decoding import SAMPLERS
from dllm_memdlm.method.prompt_memory import save_snapshot


def parsed(**values) -> Parsed:
    return parse({"pretrained": "runs/mine", **values})


def message(**values) -> str:
    with pytest.raises(ConfigError) as error:
        parsed(**values)
    assert "\n" not in str(error.value)
    return str(error.value)


# === names ===


def test_defaults():
    found = parsed()
    assert found == Parsed(EvalArguments(pretrained="runs/mine"), {}, {}, False)
    assert found.arguments.mc_num == 128 and found.arguments.max_gen_toks == 256 and found.arguments.batch_size == 1


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("pretraned", "pretrained"),
        ("memory_iner_lr", "memory_inner_lr"),
        ("treshold", "threshold"),
        ("max_gen_tokens", "max_gen_toks"),
        ("mc_nums", "mc_num"),
        ("suppress_token", "suppress_tokens"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, near):
    assert message(**{name: 1}) == f"unknown model argument {name!r}; did you mean {near}?"


def test_a_name_like_no_other_is_refused_with_all():
    text = message(zzz=1)
    assert text.startswith("unknown model argument 'zzz'; known: adapter, attn_implementation, batch_size, ")
    assert "memory_inner_lr" in text and "editing_threshold" in text


@pytest.mark.parametrize("name", ["memory_enabled", "memory_dropout", "memory_weighting", "max_new_tokens"])
def test_what_means_nothing_here_is_refused(name):
    assert message(**{name: 1}).startswith(f"unknown model argument {name!r}; ")


def test_sampler_settings_go_by_their_own_names():
    found = parsed(steps=8, block_size=4, threshold=0.5, suppress_tokens="[5;7]", cfg_keep_tokens="[]", remasking="x")
    expected = {"steps": 8, "block_size": 4, "threshold": 0.5, "suppress_tokens": [5, 7], "cfg_keep_tokens": []}
    assert found.sampler == {**expected, "remasking": "x"}, "their values are checked by the sampler"
    assert found.memory == {} and not found.uses_memory


def test_every_setting_of_a_sampler_and_of_the_memory_is_an_argument():
    per_prompt = {"max_new_tokens", "max_length", "return_dict", "right_shift_logits"}
    for _, config in SAMPLERS.values():
        for name in {f.name for f in dataclasses.fields(config)} - per_prompt:
            assert parsed(**{name: 3}).sampler == {name: 3}
    for field in dataclasses.fields(MemoryConfig):
        if field.name not in {"enabled", "dropout", "weighting", "scope", "sync"}:
            assert parsed(**{f"memory_{field.name}": 3}).memory == {field.name: 3}


def test_values_as_lm_eval_spells_them():
    """It leaves `none` and lists of words as text, and makes 1e3 and -3 floats."""
    found = parsed(block_size="None", steps=8.0, memory_target_modules="[up_proj,down_proj]", adapter="none", seed=-3.0)
    assert found.sampler == {"block_size": None, "steps": 8}
    assert found.memory == {"target_modules": ["up_proj", "down_proj"]}
    assert (found.arguments.adapter, found.arguments.seed) == (None, -3)


@pytest.mark.parametrize(("text", "number"), [("5e-2", 0.05), ("1E+3", 1000), ("-2.e-1", -0.2), (".5e1", 5)])
def test_numbers_that_yaml_takes_for_text(text, number):
    """A recipe takes them for numbers, and so do these arguments, of a task too."""
    found = parsed(memory_inner_lr=text, temperature=text)
    assert found.memory == {"inner_lr": number} and found.sampler == {"temperature": number}
    assert parsed(adapter="5e-adapter").arguments.adapter == "5e-adapter"


def test_a_home_folder_may_be_given_by_its_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert parsed(pretrained="~/runs/mine", adapter="~/other").arguments.adapter == "/home/ada/other"


def test_none_is_a_choice_as_well():
    found = parsed(cache="none", memory_clip="none")
    assert found.sampler == {"cache": "none"} and found.memory == {"clip": "none"}


# === the memory ===


@pytest.mark.parametrize(
    ("values", "uses"),
    [
        ({}, False),
        ({"memory": True}, True),
        ({"memory_rank": 4}, True),
        ({"memory_rank": 4, "memory": False}, False),
        ({"memory": True, "memory_scope": "prefix"}, True),
        ({"memory_inner_lr": 0.1, "memory_scope": "prefix"}, True),
        ({"fast_weights": "a.safetensors"}, False),
    ],
)
def test_the_memory_is_on_where_it_or_one_of_its_settings_is_given(values, uses):
    assert parsed(**values).uses_memory is uses


def test_memory_settings():
    found = parsed(memory_inner_lr=1, memory_target_modules="[gate_proj; up_proj]", memory_strategy="anchor_only")
    assert found.memory == {
        "inner_lr": 1,
        "target_modules": ["gate_proj", "up_proj"],
        "strategy": "anchor_only",
    }


def test_a_saved_memory_takes_no_settings():
    for values in ({"memory_rank": 4}, {"memory": True}):
        assert message(fast_weights="a.safetensors", **values).startswith("model_args.")
    assert message(memory_scope="prefix") == "model_args.memory_scope='prefix': expected memory=true beside it"
    assert "memory_scope" in message(memory_scope="prefix", fast_weights="a.safetensors")


# === values ===


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"pretrained": ""}, "model_args.pretrained='': expected folder or hub name"),
        ({"pretrained": 5}, "model_args.pretrained=5: expected folder or hub name"),
        ({"batch_size": 0}, "model_args.batch_size=0: expected a number of at least 1, or auto"),
        ({"batch_size": "-1"}, "model_args.batch_size='-1': expected a number of at least 1, or auto"),
        ({"batch_size": "many"}, "model_args.batch_size='many': expected a number of at least 1, or auto"),
        ({"max_batch_size": 0}, "model_args.max_batch_size=0: expected whole number of at least 1 or none"),
        ({"max_length": 1}, "model_args.max_length=1: expected whole number of at least 2 or none"),
        ({"batch_size": "auto:x"}, "model_args.batch_size='auto:x': expected a number of at least 1, or auto"),
        ({"seed": 2**80}, f"model_args.seed={2**80}: expected a number of at most 62 bits"),
        ({"max_gen_toks": 0}, "model_args.max_gen_toks=0: expected whole number of at least 1"),
        ({"mc_num": 0}, "model_args.mc_num=0: expected whole number of at least 1"),
        ({"mc_num": "many"}, "model_args.mc_num='many': expected whole number of at least 1"),
        ({"check_greedy": "yes"}, "model_args.check_greedy='yes': expected true or false"),
        ({"dtype": "int8"}, "model_args.dtype='int8': expected one of auto, float32, bfloat16, float16"),
        ({"sampler": "ddim"}, "model_args.sampler='ddim': expected one of auto, mdlm, llada21"),
        ({"memory_scope": "all"}, "model_args.memory_scope='all': expected one of prompt, prefix"),
        ({"memory_attention": "causal"}, "model_args.memory_attention='causal': expected one of full, block_causal"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(values, text):
    assert message(**values) == text


@pytest.mark.parametrize("size", [1, "1", 64, "64", "auto", "auto:2"])
def test_batch_sizes_as_lm_eval_gives_them(size):
    assert parsed(batch_size=size).arguments.batch_size == size


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there(name, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING, "lm_eval"):
        assert device_of(name) == torch.device("cpu")
    assert caplog.messages == [f"device={name}: there is none; using the CPU"]
    caplog.clear()
    assert device_of(None) == device_of("cpu") == torch.device("cpu") and caplog.messages == []


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:x", "cuda:-1", "cpu:"])
def test_a_device_that_is_none(name):
    with pytest.raises(ConfigError, match=f"device='{name}': expected cpu, cuda, cuda:N or mps"):
        device_of(name)


# === opened ===


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    memory = {"rank": 4, "alpha": 8.0, "layer_fraction": 0.4, "inner_lr": 0.3}
    return save_model(tmp_path_factory.mktemp("model"), "llada2", recipe={"memory": memory})


def test_what_is_opened_has_the_settings_that_were_given(folder):
    values = {"memory_steps": 3, "memory_attention": "block_causal", "seed": 7, "max_length": 99, "dtype": "bfloat16"}
    decoder = parse({"pretrained": folder, "block_size": 16, "threshold": 0.5, **values}).open()
    assert decoder.sampler == "llada21" and decoder.max_length == 99
    assert decoder.settings == {"block_size": 16, "threshold": 0.5}
    memory = decoder.memory
    assert (memory.seed, memory.attention, memory.block_size) == (7, "block_causal", 16)
    expected = {"steps": 3, "rank": 4, "alpha": 8.0, "inner_lr": 0.3, "weighting": "uniform"}
    assert {name: getattr(memory.memory.config, name) for name in expected} == expected
    assert decoder.pretrained.model.dtype == torch.bfloat16
    plain = parse({"pretrained": folder}).open()
    assert plain.memory is None and plain.max_length == plain.pretrained.model.config.max_position_embeddings


def test_a_saved_memory_is_opened(folder, tmp_path):
    path, text = tmp_path / "memory.safetensors", random_prompts(9)[0]
    written = parse({"pretrained": folder, "memory": True}).open().memory
    fast = written.recall([text])
    save_snapshot(path, fast, folder, written.memory.config, text)
    memory = parse({"pretrained": folder, "fast_weights": str(path)}).open().memory
    assert all(torch.equal(memory.fixed.tensors[name], tensor) for name, tensor in fast.tensors.items())


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"memory_rank": 0}, "memory.rank=0"),
        ({"memory_target_modules": "[nothing]"}, "nothing"),
        ({"threshold": "high"}, "sampler.threshold='high'"),
        ({"remasking": "random"}, "remasking"),
        ({"fast_weights": "/no/such"}, "/no/such"),
        ({"adapter": "/no/such"}, "adapter='/no/such'"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(values, name, folder):
    with pytest.raises(ConfigError) as error:
        parse({"pretrained": folder, **values}).open()
    assert name in str(error.value) and "\n" not in str(error.value)
