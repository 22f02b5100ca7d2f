"""The memory leaves no trace, not even after an exception, and its samples do not touch one another."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MASK, assert_close_relative, examples, make_trainer, tiny
from conftest import train_batch as batch_of
from inputs import second_norm
from safetensors.torch import load_file
from steps import SMALL, Step, initial, memory_for
from torch import Tensor, nn

from dllm_memdlm.backbones import staged_backbone
from dllm_memdlm.backbones.expert_names import split_names
from dllm_memdlm.backbones.moe import RoutedExperts
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method import global_batch
from dllm_memdlm.method.fast_weights import FastWeights
from dllm_memdlm.method.inner_loop import ParametricMemory, Written
from dllm_memdlm.method.trajectory import Trajectory

#: Fast weights are held by an expert layer, and by hooks on linear layers.
BOTH_WAYS = pytest.mark.parametrize("kind", ["llada2", "llama"])


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a step must leave as it was."""
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": {(name, kind): len(getattr(module, kind)) for name, module in modules.items() for kind in hooks},
        "fast": {name: dict(module.fast) for name, module in modules.items() if isinstance(module, RoutedExperts)},
        "mode": {name: (module.training, getattr(module, "trains", None)) for name, module in modules.items()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "state": list(model.state_dict()),
    }


class Failing(Exception):
    pass


@BOTH_WAYS
@pytest.mark.parametrize(("mode", "where"), [("train", 0), ("train", -1), ("eval", -1)])
def test_an_exception_leaves_no_trace(kind, mode, where, tokenizer, tmp_path, monkeypatch):
    trainer = make_trainer(tiny(kind, lora=True), tokenizer, tmp_path, memory_for(kind))
    model, batch = trainer.model, batch_of(trainer)
    getattr(model, mode)()
    before, calls, fail_at = traces(model), 0, math.inf
    norm = second_norm(staged_backbone(model).layers[where])
    forward = norm.forward

    def counting(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise Failing
        return forward(x)

    monkeypatch.setattr(norm, "forward", counting)
    trainer.compute_loss(model, batch)
    assert traces(model) == before
    passes = calls
    assert passes >= (3 if where == -1 else 2)  # two inner steps and the outer one; two prefixes
    for fail_at in range(1, passes + 1):
        calls = 0
        with pytest.raises(Failing):
            trainer.compute_loss(model, batch)
        assert traces(model) == before, f"failure in pass {fail_at}"
    assert not any(p.grad is not None for p in model.parameters())


@BOTH_WAYS
def test_fast_weights_are_held_once_and_for_their_own_batch(kind):
    memory = ParametricMemory(tiny(kind), MemoryConfig(**SMALL), MASK)
    fast = FastWeights.initial(memory.shapes, memory.config, torch.tensor([1, 2]), torch.get_default_device())
    before = traces(memory.model)
    with pytest.raises(Failing), memory.holding(fast):
        inside = traces(memory.model)
        assert (inside["hooks"], inside["fast"]) != (before["hooks"], before["fast"])
        with pytest.raises(RuntimeError, match="already holds fast weights"), memory.holding(fast):
            pass
        again = traces(memory.model)
        assert again["hooks"] == inside["hooks"] and again["fast"].keys() == inside["fast"].keys()
        for batch in (1, 3, 4):
            with pytest.raises(ValueError, match="fast weights of 2 samples on"):
                memory.model(input_ids=torch.ones(batch, 5, dtype=torch.int64))
        raise Failing
    assert traces(memory.model) == before
    with memory.holding(None):
        assert traces(memory.model) == before


@BOTH_WAYS
def test_no_fast_weight_is_saved_or_optimised(kind, tokenizer, tmp_path):
    model = tiny(kind, lora=True)
    names, trainable = set(model.state_dict()), {p for p in model.parameters() if p.requires_grad}
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_grad_norm": 1}
    trainer = make_trainer(model, tokenizer, tmp_path, memory_for(kind), **settings)
    seen, own = [], trainer.training_step
    trainer.training_step = lambda model, inputs, *args: seen.append(dict(inputs)) or own(model, inputs, *args)
    before = {name: v.clone() for name, v in model.state_dict().items()}
    trainer.train()
    after = {name: v.clone() for name, v in model.state_dict().items()}
    model.load_state_dict(before)
    step = Step(trainer, seen[0])

    optimised = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert set(optimised) == trainable and len(optimised) == len(trainable)
    expected = torch.stack([g.norm() for g in step.gradients.values()]).norm().item()
    logged = next(log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log)
    assert logged == pytest.approx(expected, rel=1e-5)
    saved = load_file(Path(tmp_path) / "checkpoint-1" / "adapter_model.safetensors")
    adapter = {name for name in split_names(after) if "lora_" in name}
    assert {name.replace(".weight", ".default.weight") for name in saved} == adapter
    with trainer.memory.holding(step.written.fast_weights):
        assert set(model.state_dict()) == names
        assert {p for p in model.parameters() if p.requires_grad} == trainable
        model.save_pretrained(tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys() == saved.keys()


@BOTH_WAYS
def test_writing_takes_what_it_is_given(kind, tokenizer, tmp_path):
    """Dropout is active while adapting only where the caller has it on; a prefix that is given is the anchor's."""
    trainer = make_trainer(tiny(kind, lora=0.5), tokenizer, tmp_path, memory_for(kind))
    batch = batch_of(trainer)
    trajectory, memory = Trajectory.from_batch(batch), trainer.memory

    def same(one: FastWeights, other: FastWeights) -> bool:
        return all(torch.equal(one.tensors[name], value) for name, value in other.tensors.items())

    trainer.model.eval()
    written = memory.write(trajectory).fast_weights
    prefix = memory.prefix(torch.where(batch["anchor_mask"], MASK, batch["input_ids"]))
    assert same(memory.write(trajectory, anchor_prefix=prefix).fast_weights, written)
    assert not same(memory.write(trajectory, anchor_prefix=prefix + 1).fast_weights, written)
    start = initial(trainer, {**batch, "noise_keys": batch["noise_keys"] + 1})
    assert not same(memory.write(trajectory, initial=start).fast_weights, written)
    trainer.model.train()
    assert not same(memory.write(trajectory).fast_weights, written)
    assert not any(p.grad is not None for p in trainer.model.parameters())
    assert not any(value.requires_grad for value in written.tensors.values())


def test_a_set_shared_by_the_batch_starts_from_its_first_sample(tokenizer, tmp_path):
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama", scope="batch", epochs=0))
    batch = batch_of(trainer)
    trajectory = Trajectory.from_batch(batch)
    assert torch.equal(trainer.memory.keys_of(trajectory), batch["noise_keys"][:1])
    written, start = trainer.memory.write(trajectory).fast_weights, initial(trainer, batch)
    assert written.samples == 1
    assert all(torch.equal(value, start.tensors[name]) for name, value in written.tensors.items())


def test_processes_that_share_a_set_write_that_of_the_whole_batch(tokenizer, tmp_path, monkeypatch):
    """Two threads stand for two processes, of three samples and of two."""
    barrier, sent, process = threading.Barrier(2), {}, threading.local()

    def exchange(tensor, received):
        sent[process.rank] = tensor.clone()
        barrier.wait(60)
        value = received([sent[0], sent[1]])
        barrier.wait(60)
        tensor.copy_(value)

    monkeypatch.setattr(global_batch, "is_initialized", lambda: hasattr(process, "rank"))
    monkeypatch.setattr(global_batch, "all_reduce", lambda tensor: exchange(tensor, sum))
    monkeypatch.setattr(global_batch, "broadcast", lambda tensor, src: exchange(tensor, lambda all_: all_[src]))
    settings = memory_for("llada2", scope="batch", sync=True)
    batch = batch_of(make_trainer(tiny("llada2"), tokenizer, tmp_path, settings, examples(5)), range(5))
    memories = [ParametricMemory(tiny("llada2", torch.float64), settings, MASK) for _ in range(3)]

    def write(rank: int, rows: slice) -> Written:
        process.rank = rank
        return memories[rank].write(Trajectory.from_batch({name: value[rows] for name, value in batch.items()}))

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(write, (0, 1), (slice(0, 3), slice(3, 5)))
    whole = memories[2].write(Trajectory.from_batch(batch))
    for name, value in whole.fast_weights.tensors.items():
        assert torch.equal(first.fast_weights.tensors[name], second.fast_weights.tensors[name])
        assert_close_relative(first.fast_weights.tensors[name], value, 1e-4, name)
    for ours, expected in zip(first.steps, whole.steps, strict=True):
        assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.parametrize("scope", ["sample", "batch"])
@BOTH_WAYS
def test_a_diverging_inner_loop_is_counted_and_the_run_goes_on(kind, scope, tokenizer, tmp_path):
    """Steps so large that the second inner loss overflows: every sample falls back, and the loss is plain MDLM's."""
    memory = memory_for(kind, inner_lr=1e38, scope=scope)
    rows = examples(6, shortest=40, longest=40)
    trainer = make_trainer(tiny(kind, lora=True), tokenizer, tmp_path, memory, rows, max_steps=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["nonfinite_samples"] for log in logs] == ([3, 3] if scope == "sample" else [1, 1])
    assert all(math.isfinite(log["loss"]) and math.isfinite(log["inner_loss_1"]) for log in logs)
    assert all("inner_loss_2" not in log for log in logs)
    assert [log["loss"] for log in logs] == [pytest.approx(log["loss_memory_off"], abs=1e-4) for log in logs]
    assert all(p.isfinite().all() for p in trainer.model.parameters())
