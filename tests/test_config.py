"""Settings: the paper's defaults, the types that are taken, and what every refusal names."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from dllm_memdlm.config import ConfigError, DataConfig, LoraConfig, MemoryConfig, ModelConfig, refuse_unknown

SECTIONS = {"memory": MemoryConfig, "model": ModelConfig, "lora": LoraConfig, "data": DataConfig}


def build(section: str, **values: typing.Any) -> typing.Any:
    needed = {"model": {"path": "some/model"}, "data": {"dataset": "some/data"}}.get(section, {})
    return SECTIONS[section](**(needed | values))


def test_defaults_are_the_papers():
    memory, lora = MemoryConfig(), LoraConfig()
    assert (memory.strategy, memory.steps, memory.epochs) == ("anchor_consistent", 2, 1)
    assert (memory.pre_anchor_scale, memory.targets, memory.objective) == (1.5, "masked", "cross_entropy")
    assert (memory.start_ratio, memory.anchor_ratio, memory.weighting) == (0.8, 0.2, "scheduler")
    assert (memory.inner_lr, memory.clip, memory.grad_clip, memory.dropout) == (0.1, "local", 1.0, 0.0)
    assert (memory.kind, memory.rank, memory.alpha, memory.layer_fraction) == ("lora", 32, 64.0, 0.1)
    assert (memory.enabled, memory.scope, memory.sync) == (True, "sample", False)
    assert memory.target_modules == ("gate_proj", "up_proj", "down_proj")
    assert (lora.enabled, lora.r, lora.alpha, lora.dropout) == (True, 32, 64, 0.05)
    assert (lora.target_modules, lora.bias, lora.path) == ("all-linear", "none", None)
    scalings = [memory.scaling, MemoryConfig(rank=8, alpha=4).scaling, MemoryConfig(rank=8, kind="full").scaling]
    assert scalings == [2.0, 0.5, 1.0]
    data, model = build("data"), build("model")
    assert (data.max_length, data.mask_prompt, data.split, data.format) == (4096, True, "train", "auto")
    assert (model.dtype, model.load_in_4bit, model.trust_remote_code) == ("auto", False, False)


# fmt: off
REFUSED: list[tuple[str, str, list[typing.Any], str]] = [
    # section, field, values, what is said to be accepted
    ("memory", "objective", ["distil"], "one of cross_entropy, kl, reverse_kl, hidden_mse, hidden_cosine"),
    ("memory", "strategy", ["anchor"], "one of anchor_consistent, inconsistent, pre_anchor_only, anchor_only, cover"),
    ("memory", "clip", [False, None, ["local"], "Local"], "one of local, global, none"),
    ("memory", "weighting", ["Uniform"], "one of scheduler, uniform"),
    ("memory", "kind", ["LoRA"], "one of lora, full"),
    ("memory", "scope", ["token"], "one of sample, batch"),
    ("memory", "enabled", [1, "yes"], "true or false"),
    ("memory", "steps", [True, 2.0, "2", 0], "whole number of at least 1"),
    ("memory", "epochs", [-1], "whole number of at least 0"),
    ("memory", "rank", [0, None], "whole number of at least 1"),
    ("memory", "inner_lr", [True, "1e-1", -0.1, float("nan"), float("inf")], "number of at least 0"),
    ("memory", "grad_clip", [-1], "number of at least 0"),
    ("memory", "pre_anchor_scale", [0.5, float("inf")], "number of at least 1"),
    ("memory", "alpha", [0], "number above 0"),
    ("memory", "dropout", [1.5, -0.1], "number in [0, 1]"),
    ("memory", "start_ratio", [0], "number in (0, 1]"),
    ("memory", "anchor_ratio", [1.01], "number in (0, 1]"),
    ("memory", "layer_fraction", [0, 1.5], "number in (0, 1]"),
    ("memory", "target_modules", ["up_proj", ["up_proj", 3], []], "list of at least one name"),
    ("model", "path", [3, ""], "folder or hub name or none"),
    ("model", "dtype", ["int8"], "one of auto, float32, bfloat16, float16"),
    ("model", "dimensions", [[1]], "mapping"),
    ("lora", "bias", ["some"], "one of none, all, lora_only"),
    ("lora", "target_modules", [3], "text or list of at least one name"),
    ("lora", "alpha", [1.5], "whole number"),
    ("lora", "r", [0], "whole number of at least 1"),
    ("lora", "dropout", [1], "number in [0, 1)"),
    ("data", "train_size", ["all", False, 0], "whole number of at least 1 or none"),
    ("data", "eval_size", [-3], "whole number of at least 1 or none"),
    ("data", "dataset", [""], "a dataset name or path"),
    ("data", "format", ["alpaca"], "one of auto, instruction, messages"),
    ("data", "eval_fraction", [1, "half"], "number in [0, 1)"),
    ("data", "max_length", [0, 1.5], "whole number of at least 1"),
    ("data", "num_proc", [0], "whole number of at least 1"),
    ("data", "mask_prompt", [1], "true or false"),
    ("data", "split", [None], "text"),
    ("data", "output_field", [None], "text"),
]
# fmt: on


@pytest.mark.parametrize(("section", "name", "values", "accepted"), REFUSED, ids=lambda v: str(v)[:12])
def test_a_value_is_refused_with_its_name_and_what_is_accepted(section, name, values, accepted):
    for value in values:
        with pytest.raises(ConfigError) as error:
            build(section, **{name: value})
        assert str(error.value) == f"{section}.{name}={value!r}: expected {accepted}"


@pytest.mark.parametrize(
    ("section", "values", "says"),
    [
        ("memory", {"strategy": "inconsistent", "start_ratio": 0.1}, "at least memory.anchor_ratio, 0.2"),
        ("memory", {"sync": True}, "false with memory.scope: sample"),
        ("model", {"path": None}, "neither path nor architecture"),
        ("model", {"path": None, "architecture": "A", "load_in_4bit": True}, "expected a model.path"),
        ("lora", {"path": "x", "enabled": False}, "none with lora.enabled=False"),
        ("data", {"perbatch_cutoff": True, "resp_cutoff_ratio": 0.5}, "expected 0 with data.perbatch_cutoff"),
        ("data", {"perbatch_cutoff": True, "mask_prompt": False}, "expected none with data.mask_prompt=False"),
        ("data", {"resp_cutoff_ratio": 0.5, "mask_prompt": False}, "expected none with data.mask_prompt=False"),
        ("data", {"visible": 4, "mask_prompt": False}, "data.visible=4: expected none with data.mask_prompt=False"),
    ],
)
def test_settings_that_do_not_go_together(section, values, says):
    with pytest.raises(ConfigError, match=section) as error:
        build(section, **values)
    assert says in str(error.value)


def test_an_unknown_name_is_refused_with_the_nearest_or_with_all():
    refuse_unknown("key", ["rank"], ["rank", "alpha"])
    for name, advice in (("rnk", "did you mean memory.rank?"), ("zzz", "known: rank, alpha")):
        with pytest.raises(ConfigError) as error:
            refuse_unknown("key", [name], ["rank", "alpha"], "memory.")
        assert str(error.value) == f"unknown key 'memory.{name}'; {advice}"
    for positional, named in (((), {"objektive": "kl"}), ((True,), {})):
        with pytest.raises(TypeError):
            MemoryConfig(*positional, **named)
    assert issubclass(ConfigError, ValueError)


ENDS = [
    ("memory", {"epochs": 0, "pre_anchor_scale": 1, "inner_lr": 0, "grad_clip": 0, "dropout": 1}),
    ("memory", {"start_ratio": 1, "anchor_ratio": 1, "layer_fraction": 1, "dropout": 0}),
    ("model", {"path": None, "architecture": "SomeModel"}),
    ("lora", {"dropout": 0}),
    ("data", {"eval_fraction": 0, "train_size": 1, "eval_size": None}),
]


@pytest.mark.parametrize(("section", "values"), ENDS)
def test_ends_of_the_ranges_are_taken(section, values):
    config = build(section, **values)
    assert {name: getattr(config, name) for name in values} == values


def test_values_are_brought_to_their_types(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    config = MemoryConfig(inner_lr=1, alpha=8, target_modules=["q_proj"])
    assert (type(config.inner_lr), type(config.alpha), type(config.rank)) == (float, float, int)
    assert config.target_modules == LoraConfig(target_modules=["q_proj"]).target_modules == ("q_proj",)
    assert build("model", path="~/mine").path == "/home/ada/mine"


def test_configs_are_frozen_and_mappings_copied():
    dimensions = {"hidden_size": 64}
    config = ModelConfig(architecture="SomeModel", dimensions=dimensions)
    dimensions["hidden_size"] = 32
    assert config.dimensions == {"hidden_size": 64}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.path = "other"
    with pytest.raises(ConfigError):
        dataclasses.replace(MemoryConfig(), steps=0)
    build("model").dimensions["x"] = 1
    assert build("model").dimensions == {}
