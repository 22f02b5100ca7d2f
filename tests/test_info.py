"""`memdlm info`: the recipe keys match the dataclasses, and the versions, the seam and the devices are shown."""

from __future__ import annotations

import dataclasses
from importlib import metadata

import pytest
import torch
from fresh_python import run

from dllm_memdlm import info, machine
from dllm_memdlm.compat.dllm_api import describe
from dllm_memdlm.config import ConfigError
from dllm_memdlm.inference.arguments import parse


def test_every_setting_is_a_key_with_type_default_and_help():
    keys = {key.name: key for key in info.recipe_keys()}
    expected = [f"{section}.{f.name}" for section, config in info.SECTIONS.items() for f in dataclasses.fields(config)]
    assert list(keys) == expected
    assert all(key.help and key.type for key in keys.values())
    assert not any(set("<|:") & set(key.type) for key in keys.values()), "in words"
    assert keys["memory.clip"][1:3] == ("one of local, global, none", '"local"')
    assert keys["memory.target_modules"].default == '["gate_proj", "up_proj", "down_proj"]'
    assert keys["model.path"][1:3] == ("folder or hub name or none", "null")


def test_keys_are_printed_uncut_on_a_narrow_terminal_without_torch():
    done = run("-X", "importtime", "-m", "dllm_memdlm.info", "--keys", COLUMNS="80")
    assert done.returncode == 0 and "MemDLMConfig" in done.stdout
    assert [key.name for key in info.recipe_keys() if key.name not in done.stdout] == []
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pydantic" in imported and not imported & {"torch", "transformers", "datasets", "huggingface_hub"}


def test_info_tells_versions_seam_and_devices(capsys, monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    assert info.main([]) == 0
    out = capsys.readouterr().out
    assert metadata.version("torch") in out and "no-such-package" not in out and describe() in out
    lines = machine.devices()
    assert len(lines) == torch.cuda.device_count() + torch.backends.mps.is_available() + 1
    assert lines[-1].startswith("cpu: ") and lines[-1] in out


def test_arguments_are_those_the_evaluation_takes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    assert info.main(["--arguments"]) == 0
    out = capsys.readouterr().out
    names = [key.name for key in info.model_arguments()]
    assert [name for name in names if name not in out] == []
    with pytest.raises(ConfigError) as refusal:
        parse({"zzzzzzzz": 1})
    assert set(str(refusal.value).partition("known: ")[2].split(", ")) == set(names)
