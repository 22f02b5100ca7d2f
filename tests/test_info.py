"""`memdlm info`: the recipe keys match the dataclasses, and the versions, the seam and the devices are shown."""

from __future__ import annotations

import dataclasses
from importlib import metadata

import pytest
import torch

from dllm_memdlm import info, machine
from dllm_memdlm.compat.dllm_api import describe
from dllm_memdlm.config import ConfigError, DataConfig, LoraConfig, MemoryConfig, ModelConfig
from dllm_memdlm.inference.arguments import parse


def test_every_setting_is_a_key():
    names = {"model": ModelConfig, "data": DataConfig, "lora": LoraConfig, "memory": MemoryConfig}
    expected = [f"{section}.{field.name}" for section in names for field in dataclasses.fields(names[section])]
    assert [key.name for key in info.recipe_keys()] == expected
    assert all(key.help and key.type for key in info.recipe_keys())


@pytest.mark.parametrize(
    ("name", "type_", "default"),
    [
        ("memory.inner_lr", "number", "0.1"),
        ("memory.clip", "one of local, global, none", '"local"'),
        ("memory.target_modules", "list of text", '["gate_proj", "up_proj", "down_proj"]'),
        ("model.path", "text or none", "null"),
        ("model.dimensions", "mapping", "{}"),
        ("lora.enabled", "true or false", "true"),
    ],
)
def test_keys_tell_type_and_default_as_yaml_writes_it(name, type_, default):
    key = next(key for key in info.recipe_keys() if key.name == name)
    assert (key.type, key.default) == (type_, default)


def test_keys_are_printed_uncut_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert info.main(["--keys"]) == 0
    out = capsys.readouterr().out
    assert [key.name for key in info.recipe_keys() if key.name not in out] == []
    assert "MemDLMConfig" in out


def test_versions_leave_out_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    versions = machine.package_versions()
    assert versions.keys() == {"python", "torch"}
    assert versions["torch"] == metadata.version("torch")


def test_devices_end_with_the_cpu():
    lines = machine.devices()
    assert len(lines) == torch.cuda.device_count() + torch.backends.mps.is_available() + 1
    assert lines[-1].startswith("cpu: ")


def test_info_tells_versions_seam_and_devices(capsys):
    assert info.main([]) == 0
    out = capsys.readouterr().out
    assert metadata.version("transformers") in out
    assert describe() in out
    assert machine.devices()[-1] in out


def test_arguments_are_those_the_evaluation_takes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    assert info.main(["--arguments"]) == 0
    out = capsys.readouterr().out
    names = [key.name for key in info.model_arguments()]
    assert [name for name in names if name not in out] == []
    with pytest.raises(ConfigError) as refusal:
        parse({"zzzzzzzz": 1})
    assert set(str(refusal.value).partition("known: ")[2].split(", ")) == set(names)
