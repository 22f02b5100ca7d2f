"""The benchmark at full size, cut down: it takes the trainer's own steps, and loses nothing that it has measured.

What it reports is in test_gpu_check.py, which runs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.autograd import DeviceType, _KinetoEvent

from benchmarks import device, full_size, inference, steps, training, watch
from benchmarks.device import CPU
from benchmarks.random_models import random_model, recipe_of
from benchmarks.watch import NEEDED, Watched, autocast_seen
from dllm_memdlm.backbones import load_model, read_config, staged_backbone
from dllm_memdlm.backbones.sites import adapted_layers
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.training.recipe import Recipe
from dllm_memdlm.versions import checkpoint_activations


@pytest.fixture
def moe() -> Recipe:
    """LLaDA-MoE's recipe, cut down."""
    return recipe_of("recipes/llada_moe.yaml", 16, small=True)


def options(folder: Path, bits: int = 16) -> list[str]:
    return ["--cpu", "--bits", str(bits), "--output", str(folder)]


def rows_of(folder: Path) -> list[list[Any]]:
    return json.loads((folder / "bench-gpu.json").read_text())["sections"][0]["rows"]


def test_a_stop_loses_nothing_that_was_measured(tmp_path, monkeypatch):
    """Not even what was timed of a step when the profiler has begun to look at another."""
    plain_too = []

    @contextlib.contextmanager
    def stopped(where: torch.device) -> Iterator[list]:
        if plain_too:
            raise KeyboardInterrupt
        plain_too.append(True)
        yield []

    monkeypatch.setattr(watch, "kernels", stopped)
    with pytest.raises(KeyboardInterrupt):
        full_size.main(["recipes/llada_moe.yaml", *options(tmp_path), "--plans", "none", "--set", "data.max_length=32"])
    rows = rows_of(tmp_path)
    assert [row[:2] for row in rows] == [["llada_moe, 16 bit", "MemDLM"], ["llada_moe, 16 bit", "plain MDLM"]]
    assert all(row[2] > 0 and row[10] > 0 for row in rows)


def test_a_fault_of_a_tool_or_of_the_planner_costs_no_timing(tmp_path, monkeypatch, capsys):
    @contextlib.contextmanager
    def failing(where: torch.device) -> Iterator[None]:
        raise RuntimeError("not permitted")
        yield

    def fault(recipe: Recipe) -> None:
        raise AssertionError("shapes are incompatible")

    monkeypatch.setattr(watch, "memory", failing)
    monkeypatch.setattr(full_size, "plans_of", fault)
    arguments = ["recipes/llada_moe.yaml", *options(tmp_path, 4)]
    assert full_size.main(arguments) == 1
    errors = capsys.readouterr().err
    assert "llada_moe, 4 bit: no plan, AssertionError: shapes are incompatible" in errors
    assert "llada_moe, 4 bit, plain MDLM: " in errors and "RuntimeError: not permitted" in errors
    for row in rows_of(tmp_path):
        assert [row[i] for i in (5, 6, 10, 11)] == [None] * 4 and row[12] is not None
        assert row[9] == pytest.approx(row[2] / row[8])
    assert full_size.main([*arguments, "--plan-only"]) == 1


def test_steps_are_those_of_training(moe, products, monkeypatch):
    """On a GPU the autocast that transformers uses on CPUs is off: all of it is accelerate's, around the model."""
    monkeypatch.setattr(full_size.MemDLMTrainer, "compute_loss_context_manager", contextlib.nullcontext)
    model, clipped, updated = random_model(moe), [], []
    clip, update = full_size.MemDLMTrainer.create_accelerator_and_postprocess, torch.optim.AdamW.step

    def watched_clip(trainer: Any) -> None:
        clip(trainer)
        norm = trainer.accelerator.clip_grad_norm_
        trainer.accelerator.clip_grad_norm_ = lambda *arguments: clipped.append(0) or norm(*arguments)

    monkeypatch.setattr(full_size.MemDLMTrainer, "create_accelerator_and_postprocess", watched_clip)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *arguments: updated.append(0) or update(*arguments))
    found = full_size.trained(model, moe, moe.memory)
    assert found.autocast == {True} and products == {torch.bfloat16}
    assert len(clipped) == len(updated) == NEEDED
    # afterwards, to decode with, the model is as it was
    seen = Watched()
    with autocast_seen(seen, staged_backbone(model).layers, CPU), torch.no_grad():
        assert model(input_ids=torch.arange(3, 9)[None]).logits.dtype == torch.bfloat16
    assert seen.autocast == {False}


def test_steps_without_autocast_are_refused(moe, monkeypatch):
    monkeypatch.setattr(full_size.MemDLMTrainer, "compute_loss_context_manager", contextlib.nullcontext)
    monkeypatch.setattr(Accelerator, "prepare_model", lambda accelerator, model, *_, **__: model)
    without_lora = dataclasses.replace(moe, lora=dataclasses.replace(moe.lora, enabled=False))
    with pytest.raises(RuntimeError, match="without autocast"):
        full_size.trained(random_model(without_lora), without_lora, moe.memory)
    with pytest.raises(RuntimeError, match="same dtype"):  # whose weights are in float32
        full_size.trained(random_model(moe), moe, moe.memory)


def test_a_prompt_that_cannot_be_adapted_to_costs_the_next_row_nothing(moe, monkeypatch):
    monkeypatch.setattr(inference.PromptMemory, "recall", lambda *_: 1 / 0)
    table = inference.section()
    faults = inference.measure("moe", random_model(moe), moe, table, lambda what: None)
    assert len(faults) == 4 and len(table.rows) == 7 - 4 and table.rows[-1][1] == "decoding 8 tokens"


def test_kernels_of_a_gpu_are_added_up_by_name(monkeypatch):
    """From the events as torch 2.11 and 2.13 give them; annotations and the host's own calls are no kernels."""

    def event(name: str, nanoseconds: int, kind: DeviceType = DeviceType.CUDA, annotation: bool = False) -> Any:
        values = {"name": name, "duration_ns": nanoseconds, "device_type": kind, "is_user_annotation": annotation}
        assert all(hasattr(_KinetoEvent, attribute) for attribute in values)
        return SimpleNamespace(**{attribute: lambda value=value: value for attribute, value in values.items()})

    events = [event("mm", 2_000), event("add", 5_000), event("mm", 4_000)]
    events += [event("AdamW", 9_000, annotation=True), event("cudaLaunchKernel", 9_000, DeviceType.CPU)]
    results = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(device, "profile", lambda **_: contextlib.nullcontext(results))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    with device.kernels(torch.device("cuda")) as found:
        pass
    assert [(kernel.name, kernel.calls) for kernel in found] == [("mm", 2), ("add", 1)]
    assert [kernel.seconds for kernel in found] == pytest.approx([6e-6, 5e-6])
    begin = "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<c10::BFloat16, c10::BFloat16, "
    add, mul = (device.Kernel(f"{begin}c10::BFloat16, at::{n}Functor<float> >|", 1, 1.0).short for n in ("Add", "Mul"))
    assert add != mul and len(add) <= 162 and "|" not in add, "it stands in a table"


def test_waits_of_the_host_are_counted_by_line(monkeypatch):
    """As torch tells of them; it also says, once, that this is a prototype."""
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with device.waits(torch.device("cuda")) as found:
        for text in ("Synchronization debug mode is a prototype feature", device.WAITED, device.WAITED):
            warnings.warn(text, stacklevel=1)
    ((line, times),) = found.items()
    assert line.startswith("benchmarks/test_full_size.py:") and times == 2
    assert modes == ["default", "warn", "default"]


@pytest.mark.parametrize("name", ["llada_moe", "llada2_mini"])
def test_weights_in_4_bit_are_those_of_from_pretrained(name, tmp_path):
    recipe, bare = (recipe_of(f"recipes/{name}.yaml", bits, small=True) for bits in (4, 16))
    recipe.lora = bare.lora = dataclasses.replace(recipe.lora, enabled=False)
    ours = random_model(recipe)
    random_model(bare).save_pretrained(tmp_path)
    loaded = load_model(dataclasses.replace(recipe.model, path=str(tmp_path)), read_config(str(tmp_path)))
    expected = loaded.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, value in ours.state_dict().items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("memory", [steps.PLAIN, MemoryConfig(), MemoryConfig(steps=3)], ids=["plain", "K2", "K3"])
def test_weights_are_read_as_often_as_layers_are_passed(memory, checkpointing):
    bench = training.Bench(training.QUICK, training.QUICK.base)
    backbone = staged_backbone(bench.model)
    checkpoint_activations(bench.model, checkpointing)
    passed = []
    norms = {layer.input_layernorm: number for number, layer in enumerate(backbone.layers)}
    # a layer's first part, as recomputation may end early
    hooks = [norm.register_forward_pre_hook(lambda norm, *_: passed.append(norms[norm])) for norm in norms]
    bench.ours(memory)()
    for hook in hooks:
        hook.remove()
    checkpoint_activations(bench.model, False)
    boundary = adapted_layers(len(norms), memory).start if memory.enabled else len(norms)
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in backbone.layers]
    backward = [1 if number < boundary else memory.steps + 1 for number in norms.values()]
    expected = sum(size * (passed.count(n) + backward[n]) for n, size in enumerate(sizes))
    expected += backbone.lm_head.weight.nbytes * 2 * (memory.steps + 1 if memory.enabled else 1)
    assert full_size.weights_read(bench.model, memory, checkpointing) == expected
