"""Snapshots of fast weights: the same logits again, and which of them are refused."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import KINDS, MASK, make_trainer, tiny
from conftest import train_batch as batch_of
from steps import SMALL, memory_for

from dllm_memdlm.backbones.moe import RoutedExperts
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.method.fast_weights import FastWeights
from dllm_memdlm.method.inner_loop import ParametricMemory
from dllm_memdlm.method.trajectory import Trajectory

# === snapshots ===


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["lora", "full"])
def test_a_saved_snapshot_gives_the_same_logits(kind, form, tokenizer, tmp_path):
    model = tiny(kind).eval()
    memory = memory_for(kind, kind=form)
    trainer = make_trainer(model, tokenizer, tmp_path, memory)
    batch = batch_of(trainer)
    written = trainer.memory.write(Trajectory.from_batch(batch))
    with torch.no_grad(), trainer.memory.holding(written.fast_weights):
        expected = model(input_ids=batch["input_ids"]).logits
    assert not torch.allclose(model(input_ids=batch["input_ids"]).logits, expected, atol=1e-2)
    written.fast_weights.save(tmp_path / "memory.safetensors", {"prompt": "abc"})

    loaded, header = FastWeights.load(tmp_path / "memory.safetensors")
    assert header == {"prompt": "abc"}
    other = ParametricMemory(tiny(kind).eval(), memory, MASK)
    with torch.no_grad(), other.holding(loaded):
        torch.testing.assert_close(other.model(input_ids=batch["input_ids"]).logits, expected, rtol=1e-5, atol=1e-5)


def test_foreign_snapshots_are_refused(tokenizer, tmp_path):
    source = ParametricMemory(tiny("llada_moe"), MemoryConfig(**SMALL), MASK)
    fast = FastWeights.initial(source.shapes, source.config, torch.tensor([1]), torch.device("cpu"))

    other_sites = ParametricMemory(tiny("llada_moe"), MemoryConfig(**{**SMALL, "layer_fraction": 0.3}), MASK)
    message = (
        r"fast weights for other sites than this model's: layers\.1\.mlp\.experts\.down_proj\.A is in the "
        r"fast weights only"
    )
    with pytest.raises(ConfigError, match=f"^{message}$"), other_sites.holding(fast):
        pass
    back = FastWeights.initial(other_sites.shapes, other_sites.config, torch.tensor([1]), torch.device("cpu"))
    message = r"layers\.1\.mlp\.experts\.down_proj\.A is in the model only$"
    with pytest.raises(ConfigError, match=message), source.holding(back):
        pass
    other_rank = ParametricMemory(tiny("llada_moe"), MemoryConfig(**{**SMALL, "rank": 8}), MASK)
    message = r"fast weights of another size: \S+ is \(5, 4, 32\), expected \(5, 8, 32\)"
    with pytest.raises(ConfigError, match=f"^{message}$"), other_rank.holding(fast):
        pass
    for memory in (source, other_sites, other_rank):
        assert all(not m.fast for m in memory.model.modules() if isinstance(m, RoutedExperts))


def test_another_number_of_experts_is_refused():
    source = ParametricMemory(tiny("llada_moe", num_experts=4), MemoryConfig(**SMALL), MASK)
    fast = FastWeights.initial(source.shapes, source.config, torch.tensor([1]), torch.device("cpu"))
    target = ParametricMemory(tiny("llada_moe"), MemoryConfig(**SMALL), MASK)
    with pytest.raises(ConfigError, match="fast weights of another size"), target.holding(fast):
        pass


def test_what_is_no_snapshot_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=r"a safetensors file, but not a fast-weight snapshot; write one with"):
        FastWeights.load(path)
    path.write_text(json.dumps({"x": 1}))
    with pytest.raises(ConfigError, match=r"other\.safetensors: not a fast-weight snapshot \("):
        FastWeights.load(path)
    with pytest.raises(ConfigError, match=r"missing\.safetensors: not a fast-weight snapshot \("):
        FastWeights.load(tmp_path / "missing.safetensors")
