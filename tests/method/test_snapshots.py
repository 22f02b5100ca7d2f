"""Saved memories: the same logits again, for the weights that they were written with and for no others."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import KINDS, MASK, tiny
from safetensors.torch import save_file
from saved_models import prompt_memory, random_prompts
from steps import SMALL, memory_for

from dllm_memdlm.backbones.moe import RoutedExperts
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.method.fast_weights import FORMAT, FastWeights
from dllm_memdlm.method.inner_loop import ParametricMemory
from dllm_memdlm.method.prompt_memory import load_snapshot, save_snapshot

TEXT = random_prompts(20)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["lora", "full"])
def test_a_saved_memory_gives_the_same_logits(kind, form, tmp_path):
    prompts = prompt_memory(tiny(kind), memory_for(kind, kind=form, rank=3, alpha=1.0))  # 1/3 has no short decimal form
    memory, fast, batch = prompts.memory, prompts.recall([TEXT]), torch.tensor([TEXT])
    strided = FastWeights({name: v.mT.contiguous().mT for name, v in fast.tensors.items()}, fast.scaling).leaves()
    save_snapshot(tmp_path / "memory", strided, "runs/mine", memory.config, TEXT)
    loaded, config = load_snapshot(tmp_path / "memory", "runs/mine", torch.get_default_device())
    assert config == memory.config and loaded.scaling == fast.scaling == config.scaling
    assert loaded.tensors.keys() == fast.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], value) for name, value in fast.tensors.items())
    other = ParametricMemory(tiny(kind).eval(), config, MASK)
    with torch.no_grad():
        with memory.holding(fast):
            expected = memory.model(input_ids=batch).logits
        assert not torch.allclose(other.model(input_ids=batch).logits, expected, atol=1e-2)
        with other.holding(loaded):
            assert torch.equal(other.model(input_ids=batch).logits, expected)


def test_a_memory_is_for_the_weights_wherever_they_lie(tmp_path):
    prompts, run = prompt_memory(tiny("llama"), memory_for("llama")), tmp_path / "run"
    run.mkdir()
    save_file({"w": torch.arange(300_000.0)}, run / "model.safetensors")
    save_snapshot(run / "memory", prompts.recall([TEXT]), str(run), prompts.memory.config, TEXT)
    copy = shutil.copytree(run, tmp_path / "copy")
    load_snapshot(copy / "memory", str(copy))
    save_file({"w": torch.arange(300_000.0) + 1}, run / "model.safetensors")  # trained again
    with pytest.raises(ConfigError, match=f"written with the model '{run}', not the other weights that are there now$"):
        load_snapshot(run / "memory", str(run))
    with pytest.raises(ConfigError, match=f"written with the model '{run}', not '{tmp_path / 'third'}'$"):
        load_snapshot(run / "memory", str(shutil.copytree(run, tmp_path / "third")))


def test_other_files_are_refused(tmp_path):
    path, prompts = tmp_path / "memory", prompt_memory(tiny("llada2"), memory_for("llada2"))
    fast, config = prompts.recall([TEXT]), prompts.memory.config

    def refused(match: str, model: str = "runs/mine") -> None:
        with pytest.raises(ConfigError, match=f"memory: {match}"):
            load_snapshot(path, model)

    save_snapshot(path, fast, "runs/mine", config, TEXT)
    refused("written with the model 'runs/mine', not 'runs/other'$", "runs/other")
    content = path.read_bytes()
    for part in (content[: len(content) // 2], content[:5], b"", b"no safetensors, but long enough to be read"):
        path.write_bytes(part)
        refused(r"not a fast-weight snapshot \(.*--save-memory")
    ours = {"format": FORMAT, "scaling": "1.0"}
    for metadata in (None, {"format": "pt"}, ours, ours | {"header": "{"}):
        save_file(fast.tensors, path, metadata)
        refused(r"not a fast-weight snapshot \(")
    one_text = "expected the memory of one text, as --save-memory writes it$"
    fast.save(path, {"note": "ü"})  # as a user may keep them
    assert FastWeights.load(path)[1] == {"note": "ü"}
    refused(one_text)
    fast.save(path, {"model": "runs/mine", "memory": {"rnak": 4}})
    refused("not the memory settings of this version .*rnak")
    save_snapshot(path, FastWeights.stack([fast, fast]), "runs/mine", config, TEXT)
    refused(one_text)
    path.unlink()
    refused(r"not a fast-weight snapshot \(No such file")
    with pytest.raises(ConfigError, match=r"memory: cannot be written \("):
        save_snapshot(tmp_path / "nowhere" / "memory", fast, "runs/mine", config, TEXT)


@pytest.mark.parametrize(
    ("dimensions", "changes", "sizes"),
    [
        ({}, {"layer_fraction": 0.3}, r"is \(5, 4, 16\), expected absent"),
        ({}, {"layer_fraction": 0.7}, "is absent, expected .*"),
        ({}, {"rank": 8}, r"is \(5, 4, 16\), expected \(5, 8, 16\)"),
        ({"num_experts": 4}, {}, r"is \(5, 4, 16\), expected \(4, 4, 16\)"),
    ],
    ids=str,
)
def test_fast_weights_of_another_model_are_not_held(dimensions, changes, sizes):
    source = ParametricMemory(tiny("llada_moe"), MemoryConfig(**SMALL), MASK)
    fast = FastWeights.initial(source.shapes, source.config, torch.tensor([1]), torch.get_default_device())
    target = ParametricMemory(tiny("llada_moe", **dimensions), MemoryConfig(**{**SMALL, **changes}), MASK)
    message = rf"^fast weights that do not fit this model: layers\.\d\.\S+ {sizes}$"
    with pytest.raises(ConfigError, match=message), target.holding(fast):
        pass
    assert all(not module.fast for module in target.model.modules() if isinstance(module, RoutedExperts))
