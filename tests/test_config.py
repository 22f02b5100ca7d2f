"""Settings: the paper's defaults, the types that are taken, and the words of every refusal."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from dllm_memdlm.config import ConfigError, DataConfig, LoraConfig, MemoryConfig, ModelConfig, describe_type

SECTIONS = {"memory": MemoryConfig, "model": ModelConfig, "lora": LoraConfig, "data": DataConfig}


def build(section: str, **values: typing.Any) -> typing.Any:
    needed = {"model": {"path": "some/model"}, "data": {"dataset": "some/data"}}.get(section, {})
    return SECTIONS[section](**(needed | values))


# --- defaults ---


def test_defaults_of_the_memory_are_the_papers():
    assert dataclasses.asdict(MemoryConfig()) == {
        "enabled": True,
        "strategy": "anchor_consistent",
        "steps": 2,
        "epochs": 1,
        "pre_anchor_scale": 1.5,
        "targets": "masked",
        "start_ratio": 0.8,
        "anchor_ratio": 0.2,
        "objective": "cross_entropy",
        "weighting": "scheduler",
        "inner_lr": 0.1,
        "clip": "local",
        "grad_clip": 1.0,
        "kind": "lora",
        "rank": 32,
        "alpha": 64.0,
        "scope": "sample",
        "sync": False,
        "target_modules": ("gate_proj", "up_proj", "down_proj"),
        "layer_fraction": 0.1,
        "dropout": 0.0,
    }


def test_defaults_of_the_lora_are_the_papers():
    assert dataclasses.asdict(LoraConfig()) == {
        "enabled": True,
        "r": 32,
        "alpha": 64,
        "dropout": 0.05,
        "target_modules": "all-linear",
        "bias": "none",
        "path": None,
    }


def test_defaults_of_data_and_model():
    data, model = build("data"), build("model")
    assert (data.max_length, data.mask_prompt, data.split, data.format) == (4096, True, "train", "auto")
    assert (data.instruction_field, data.output_field) == ("instruction", "output")
    assert (model.dtype, model.load_in_4bit, model.trust_remote_code) == ("auto", False, False)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_has_help_and_a_default_of_its_type(section):
    config = build(section)
    hints = typing.get_type_hints(SECTIONS[section])
    for f in dataclasses.fields(config):
        assert f.metadata["help"], f.name
        assert describe_type(hints[f.name]) != str(hints[f.name]), f.name  # it is described in words


def test_scaling():
    assert MemoryConfig().scaling == 2.0
    assert MemoryConfig(rank=8, alpha=4).scaling == 0.5
    assert MemoryConfig(rank=8, alpha=4, kind="full").scaling == 1.0


# --- refusals ---

MESSAGES = [
    # among the choices
    (
        "memory",
        {"objective": "distil"},
        "memory.objective='distil': expected one of cross_entropy, kl, reverse_kl, hidden_mse, hidden_cosine",
    ),
    (
        "memory",
        {"strategy": "anchor"},
        "memory.strategy='anchor': expected one of anchor_consistent, inconsistent, pre_anchor_only, anchor_only",
    ),
    ("memory", {"targets": None}, "memory.targets=None: expected one of masked, newly_revealed"),
    ("memory", {"clip": False}, "memory.clip=False: expected one of local, global, none"),
    ("memory", {"clip": ["local"]}, "memory.clip=['local']: expected one of local, global, none"),
    ("memory", {"weighting": "Uniform"}, "memory.weighting='Uniform': expected one of scheduler, uniform"),
    ("memory", {"kind": "LoRA"}, "memory.kind='LoRA': expected one of lora, full"),
    ("memory", {"scope": "token"}, "memory.scope='token': expected one of sample, batch"),
    ("model", {"dtype": "int8"}, "model.dtype='int8': expected one of auto, float32, bfloat16, float16"),
    ("lora", {"bias": "some"}, "lora.bias='some': expected one of none, all, lora_only"),
    (
        "data",
        {"format": "csv"},
        "data.format='csv': expected one of auto, instruction, messages",
    ),
    # of the type
    ("memory", {"enabled": 1}, "memory.enabled=1: expected true or false"),
    ("memory", {"enabled": "yes"}, "memory.enabled='yes': expected true or false"),
    ("memory", {"steps": True}, "memory.steps=True: expected whole number"),
    ("memory", {"steps": 2.0}, "memory.steps=2.0: expected whole number"),
    ("memory", {"steps": "2"}, "memory.steps='2': expected whole number"),
    ("memory", {"inner_lr": True}, "memory.inner_lr=True: expected number"),
    ("memory", {"inner_lr": "1e-1"}, "memory.inner_lr='1e-1': expected number"),
    ("memory", {"target_modules": "up_proj"}, "memory.target_modules='up_proj': expected list of text"),
    ("memory", {"target_modules": ["up_proj", 3]}, "memory.target_modules=['up_proj', 3]: expected list of text"),
    ("model", {"dimensions": [1]}, "model.dimensions=[1]: expected mapping"),
    ("model", {"path": 3}, "model.path=3: expected text or none"),
    ("lora", {"target_modules": 3}, "lora.target_modules=3: expected text or list of text"),
    ("lora", {"alpha": 1.5}, "lora.alpha=1.5: expected whole number"),
    ("data", {"train_size": "all"}, "data.train_size='all': expected whole number or none"),
    ("data", {"train_size": False}, "data.train_size=False: expected whole number or none"),
    # in range
    ("memory", {"steps": 0}, "memory.steps=0: expected at least 1"),
    ("memory", {"epochs": -1}, "memory.epochs=-1: expected at least 0 (0 trains with empty fast weights)"),
    ("memory", {"pre_anchor_scale": 0.5}, "memory.pre_anchor_scale=0.5: expected at least 1"),
    ("memory", {"inner_lr": -0.1}, "memory.inner_lr=-0.1: expected at least 0"),
    ("memory", {"inner_lr": float("nan")}, "memory.inner_lr=nan: expected number"),
    ("memory", {"grad_clip": -1}, "memory.grad_clip=-1.0: expected at least 0"),
    ("memory", {"rank": 0}, "memory.rank=0: expected at least 1"),
    ("memory", {"alpha": 0}, "memory.alpha=0.0: expected more than 0"),
    ("memory", {"target_modules": []}, "memory.target_modules=(): expected at least one module name"),
    ("memory", {"dropout": 1.5}, "memory.dropout=1.5: expected in [0, 1]"),
    ("memory", {"dropout": -0.1}, "memory.dropout=-0.1: expected in [0, 1]"),
    ("memory", {"start_ratio": 0}, "memory.start_ratio=0.0: expected in (0, 1]"),
    ("memory", {"anchor_ratio": 1.01}, "memory.anchor_ratio=1.01: expected in (0, 1]"),
    ("memory", {"layer_fraction": 0}, "memory.layer_fraction=0.0: expected in (0, 1]"),
    ("lora", {"r": 0}, "lora.r=0: expected at least 1"),
    ("lora", {"dropout": 1}, "lora.dropout=1.0: expected in [0, 1)"),
    ("model", {"path": None}, "model: neither path nor architecture is set; give one of them"),
    ("data", {"dataset": ""}, "data.dataset='': expected a dataset name or path"),
    ("data", {"eval_fraction": 1}, "data.eval_fraction=1.0: expected in [0, 1)"),
    ("data", {"max_length": 0}, "data.max_length=0: expected at least 1"),
    ("data", {"train_size": 0}, "data.train_size=0: expected at least 1"),
    ("data", {"eval_size": -3}, "data.eval_size=-3: expected at least 1"),
    ("data", {"num_proc": 0}, "data.num_proc=0: expected at least 1"),
]


@pytest.mark.parametrize(("section", "values", "message"), MESSAGES, ids=lambda v: v if isinstance(v, str) else "")
def test_message(section, values, message):
    with pytest.raises(ConfigError) as error:
        build(section, **values)
    assert str(error.value) == message


def test_config_error_is_a_value_error():
    assert issubclass(ConfigError, ValueError)


def test_unknown_and_positional_settings():
    with pytest.raises(TypeError, match="objektive"):
        MemoryConfig(objektive="kl")
    with pytest.raises(TypeError):
        MemoryConfig(True)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("memory", {"epochs": 0}),
        ("memory", {"pre_anchor_scale": 1}),
        ("memory", {"inner_lr": 0}),
        ("memory", {"grad_clip": 0}),
        ("memory", {"dropout": 1}),
        ("memory", {"dropout": 0}),
        ("memory", {"start_ratio": 1, "anchor_ratio": 1, "layer_fraction": 1}),
        ("model", {"path": None, "architecture": "SomeModel"}),
        ("lora", {"dropout": 0}),
        ("data", {"eval_fraction": 0, "train_size": 1, "eval_size": None}),
    ],
)
def test_ends_of_the_ranges_are_taken(section, values):
    config = build(section, **values)
    assert {name: getattr(config, name) for name in values} == values


# --- types ---


def test_whole_numbers_become_floats():
    config = MemoryConfig(inner_lr=1, alpha=8, pre_anchor_scale=2)
    for value in (config.inner_lr, config.alpha, config.pre_anchor_scale):
        assert type(value) is float
    assert type(MemoryConfig(rank=8).rank) is int


def test_lists_become_tuples():
    assert MemoryConfig(target_modules=["q_proj", "k_proj"]).target_modules == ("q_proj", "k_proj")
    assert LoraConfig(target_modules=["q_proj"]).target_modules == ("q_proj",)
    assert LoraConfig(target_modules="all-linear").target_modules == "all-linear"


def test_frozen():
    config = MemoryConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3
    assert dataclasses.replace(config, steps=3).steps == 3 and config.steps == 2
    with pytest.raises(ConfigError):
        dataclasses.replace(config, steps=0)


def test_mappings_are_copied():
    dimensions = {"hidden_size": 64}
    config = ModelConfig(architecture="SomeModel", dimensions=dimensions)
    dimensions["hidden_size"] = 32
    assert config.dimensions == {"hidden_size": 64}
    first, second = ModelConfig(path="a"), ModelConfig(path="b")
    first.dimensions["x"] = 1
    assert second.dimensions == {}


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (bool, "true or false"),
        (int, "whole number"),
        (float, "number"),
        (str, "text"),
        (str | None, "text or none"),
        (typing.Optional[int], "whole number or none"),  # noqa: UP045
        (typing.Literal["a", "b"], "one of a, b"),
        (tuple[str, ...], "list of text"),
        (tuple[float, ...], "list of number"),
        (str | tuple[str, ...], "text or list of text"),
        (dict[str, typing.Any], "mapping"),
    ],
)
def test_describe_type(hint, words):
    assert describe_type(hint) == words


def test_inconsistent_trajectory_must_fall():
    with pytest.raises(ConfigError) as error:
        MemoryConfig(strategy="inconsistent", start_ratio=0.1)
    assert str(error.value) == "memory.start_ratio=0.1: expected at least memory.anchor_ratio, 0.2"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_are_finite(value):
    with pytest.raises(ConfigError, match=r"memory\.pre_anchor_scale=(inf|nan): expected number"):
        MemoryConfig(pre_anchor_scale=value)
