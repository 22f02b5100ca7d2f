"""What the memory does not change, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from conftest import MASK, make_trainer, tiny
from conftest import train_batch as batch_of
from steps import SMALL, initial, memory_for
from torch import nn

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method.fast_weights import FastWeights
from dllm_memdlm.method.inner_loop import ParametricMemory
from dllm_memdlm.method.trajectory import Trajectory


def test_writing_takes_the_mode_of_the_model_as_it_is(tokenizer, tmp_path):
    """Dropout is active while adapting only where the caller has it on."""
    trainer = make_trainer(tiny("llama", lora=0.5), tokenizer, tmp_path, memory_for("llama"))
    trajectory = Trajectory.from_batch(batch_of(trainer))
    trainer.model.eval()
    first, second = (trainer.memory.write(trajectory).fast_weights.tensors for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    trainer.model.train()
    third = trainer.memory.write(trajectory).fast_weights.tensors
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_a_given_trunk_is_that_of_the_anchor(tokenizer, tmp_path):
    trainer = make_trainer(tiny("llada2"), tokenizer, tmp_path, memory_for("llada2"))
    batch = batch_of(trainer)
    trajectory = Trajectory.from_batch(batch)
    trunk = trainer.memory.trunk(torch.where(batch["anchor_mask"], MASK, batch["input_ids"]))
    given, own = (trainer.memory.write(trajectory, anchor_trunk=t).fast_weights.tensors for t in (trunk, None))
    assert all(torch.equal(given[name], own[name]) for name in own)
    assert not any(p.grad is not None for p in trainer.model.parameters())


def test_initial_fast_weights_can_be_given(tokenizer, tmp_path):
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama"))
    batch = batch_of(trainer)
    start = initial(trainer, {**batch, "noise_keys": batch["noise_keys"] + 1})
    written = trainer.memory.write(Trajectory.from_batch(batch), initial=start).fast_weights.tensors
    default = trainer.memory.write(Trajectory.from_batch(batch)).fast_weights.tensors
    assert any(not torch.equal(written[name], default[name]) for name in default)
    assert start.samples == 3 and all(not v.requires_grad for v in written.values())


def test_a_set_shared_by_the_batch_starts_from_its_first_sample(tokenizer, tmp_path):
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama", scope="batch"))
    batch = batch_of(trainer)
    trajectory = Trajectory.from_batch(batch)
    assert torch.equal(trainer.memory.keys_of(trajectory), batch["noise_keys"][:1])
    written = trainer.memory.write(trajectory).fast_weights
    from_it = trainer.memory.write(trajectory, initial=initial(trainer, batch)).fast_weights
    assert written.samples == 1
    assert all(torch.equal(value, from_it.tensors[name]) for name, value in written.tensors.items())


def test_an_unknown_model_is_refused():
    with pytest.raises(TypeError, match=r"^no backbone adapter for Linear; load the model with .* LlamaForCausalLM, "):
        ParametricMemory(nn.Linear(2, 2), MemoryConfig(), MASK)


@pytest.mark.parametrize("kind", ["llada_moe", "llama"])
def test_fast_weights_are_held_once(kind):
    memory = ParametricMemory(tiny(kind), MemoryConfig(**SMALL), MASK)
    fast = FastWeights.initial(memory.shapes, memory.config, torch.tensor([1]), torch.device("cpu"))
    refused = pytest.raises(RuntimeError, match="already holds fast weights")
    with memory.holding(fast), refused, memory.holding(fast):
        pass
    with memory.holding(fast):
        pass


@pytest.mark.parametrize("kind", ["llada_moe", "llama"])
def test_fast_weights_of_another_number_of_samples_are_refused(kind):
    memory = ParametricMemory(tiny(kind), MemoryConfig(**SMALL), MASK)
    fast = FastWeights.initial(memory.shapes, memory.config, torch.tensor([1, 2]), torch.device("cpu"))
    for batch in (1, 3, 4):
        with memory.holding(fast), pytest.raises(ValueError, match="fast weights of 2 samples on"):
            memory.model(input_ids=torch.ones(batch, 5, dtype=torch.int64))
