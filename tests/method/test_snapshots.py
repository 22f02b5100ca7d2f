"""Saved memories: for the weights that they were written with, wherever those lie, and for no others."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import tiny
from safetensors.torch import save_file
from saved_models import prompt_memory, random_prompts
from steps import memory_for

from dllm_memdlm.config import ConfigError
from dllm_memdlm.method.fast_weights import FastWeights
from dllm_memdlm.method.prompt_memory import PromptMemory, load_snapshot, save_snapshot


def tiny_memory(kind: str) -> PromptMemory:
    return prompt_memory(tiny(kind), memory_for(kind))


def assert_equal(one: FastWeights, other: FastWeights) -> None:
    assert one.tensors.keys() == other.tensors.keys() and one.scaling == other.scaling
    assert all(torch.equal(one.tensors[name], tensor) for name, tensor in other.tensors.items())


def test_a_snapshot_is_for_the_weights_wherever_they_lie(tmp_path):
    memory, text = tiny_memory("llama"), random_prompts(12)[0]
    fast, run = memory.recall([text]), tmp_path / "run"
    run.mkdir()
    save_file({"w": torch.arange(300_000.0)}, run / "model.safetensors")
    save_snapshot(run / "memory.safetensors", fast, str(run), memory.memory.config, text)
    copy = shutil.copytree(run, tmp_path / "copy")
    assert_equal(load_snapshot(copy / "memory.safetensors", str(copy))[0], fast)
    save_file({"w": torch.arange(300_000.0) + 1}, run / "model.safetensors")  # trained again
    with pytest.raises(ConfigError, match=f"written with the model '{run}', not the other weights that are there now$"):
        load_snapshot(run / "memory.safetensors", str(run))
    with pytest.raises(ConfigError, match=f"written with the model '{run}', not '{tmp_path / 'third'}'$"):
        load_snapshot(run / "memory.safetensors", shutil.copytree(run, tmp_path / "third").as_posix())


def test_a_snapshot_knows_its_model_and_its_settings(tmp_path):
    path, memory, text = tmp_path / "memory.safetensors", tiny_memory("llada2"), random_prompts(12)[0]
    fast = memory.recall([text])
    save_snapshot(path, fast, "runs/mine", memory.memory.config, text)
    loaded, config = load_snapshot(path, "runs/mine")
    assert_equal(loaded, fast)
    assert config == memory.memory.config and loaded.scaling == fast.scaling
    with pytest.raises(ConfigError, match=r"safetensors: written with the model 'runs/mine', not 'runs/other'$"):
        load_snapshot(path, "runs/other")
    fast.save(path)
    with pytest.raises(ConfigError, match="expected the memory of one text, as --save-memory writes it"):
        load_snapshot(path, "runs/mine")
    save_snapshot(path, FastWeights.stack([fast, fast]), "runs/mine", memory.memory.config, text)
    with pytest.raises(ConfigError, match="expected the memory of one text"):
        load_snapshot(path, "runs/mine")
    save_file(fast.tensors, path, {"format": "memdlm-fast-weights", "scaling": "1.0", "header": "{"})
    with pytest.raises(ConfigError, match="a fast-weight snapshot with broken metadata"):
        load_snapshot(path, "runs/mine")
    fast.save(path, {"model": "runs/mine", "memory": {"rnak": 4}})
    with pytest.raises(ConfigError, match=r"not the memory settings of this version .*rnak"):
        load_snapshot(path, "runs/mine")
    path.write_text("nothing")
    with pytest.raises(ConfigError, match="not a fast-weight snapshot"):
        load_snapshot(path, "runs/mine")
