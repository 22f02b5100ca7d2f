"""A GPU against the CPU: products, experts, whole steps, prompts' memories. `pytest -m gpu` runs these alone.

`--device cpu` compares the CPU with itself, to try the tests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_models
import pytest
import torch
from conftest import KINDS, examples, make_trainer, tiny, train_batch
from saved_models import answers_of, decoder_with, pretrained_of, prompt_memory, random_prompts
from steps import OFF, Step, memory_for
from torch import Tensor, nn

from benchmarks.device import waits
from benchmarks.watch import NEEDED, watch
from dllm_memdlm.backbones import grouped
from dllm_memdlm.backbones.moe import RoutedExperts
from dllm_memdlm.backbones.site_weights import SiteShape
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.inference.decoding import memory_for as memory_for_prompts
from dllm_memdlm.method import noise
from dllm_memdlm.method.fast_weights import FastWeights
from dllm_memdlm.method.prompt_memory import save_snapshot
from dllm_memdlm.training.trainer import MemDLMTrainer
from dllm_memdlm.versions import checkpoint_activations

pytestmark = pytest.mark.gpu

TABLE = "A GPU against the CPU"
MOE = ("llada_moe", "llada2")
KEYS = noise.example_keys(42, 3, torch.arange(5, device="cpu"))


@pytest.fixture
def compare(request, record_property) -> Callable[[str, Tensor, Tensor, float], None]:
    """|actual - expected| ≤ tolerance · |expected|, over the whole tensor; all errors go into one table."""

    def errors(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
        actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
        assert actual.shape == expected.shape
        error = ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()
        row = f"{request.node.name.removeprefix('test_')}: {what}"
        record_property("table", (TABLE, row, "relative error", f"{error:.1e}"))
        record_property("table", (TABLE, row, "allowed", f"{tolerance:.0e}"))
        assert error <= tolerance, f"{row}: {error:.2e}, allowed {tolerance:.0e}"

    return errors


def moved(tensors: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) for name, value in tensors.items()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().cpu().flatten() for name in sorted(tensors)])


SIZES = {
    "even": [257] * 16,
    "ragged": [3, 0, 511, 64, 1, 130, 7, 99, 400, 16, 8, 0, 250, 31, 33, 2],
    "one of many": [0] * 15 + [900],
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("out", "inner"), [(128, 256), (32, 256), (256, 32)], ids=["wide", "down", "up"])
def test_grouped_products_in_bfloat16(sizes, out, inner, device, compare):
    offsets = torch.tensor(SIZES[sizes], device="cpu").cumsum(0).to(device, torch.int32)
    generator = torch.Generator("cpu").manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(device, torch.bfloat16)

    x, y = drawn(int(offsets[-1]), inner), drawn(int(offsets[-1]), out)
    weight = drawn(len(offsets), out, inner)
    wide_x, wide_y, wide_weight = (tensor.cpu().double() for tensor in (x, y, weight))
    ends = offsets.cpu()
    exact = grouped.grouped_linear_loop(wide_x, wide_weight, ends)
    with waits(device) as waited:
        found = grouped.grouped_linear(x, weight, offsets)
        transposed = grouped.grouped_linear(x, weight.mT.contiguous().mT, offsets)
        back = grouped.grouped_linear(y, weight.mT, offsets)
        outer = grouped.grouped_outer(y, x, offsets, len(weight))
    assert not waited, dict(waited)
    compare("product", found, exact, 1e-2)
    compare("with a transposed weight", transposed, exact, 1e-2)
    compare("one after the other", grouped.grouped_linear_loop(x, weight, offsets), exact, 1e-2)
    compare("gradient of the input", back, grouped.grouped_linear_loop(wide_y, wide_weight.mT, ends), 1e-2)
    parts = zip(grouped.split(wide_y, ends), grouped.split(wide_x, ends), strict=True)
    compare("gradient of the weight", outer, torch.stack([a.T @ b for a, b in parts]), 1e-2)
    assert not outer[torch.tensor(SIZES[sizes], device="cpu").to(device) == 0].any(), "of a group without rows"


def test_as_many_groups_as_the_kernel_takes(device, compare):
    ends = torch.arange(1, grouped.MAX_GROUPS + 1, dtype=torch.int32, device="cpu") * 16
    x, weight = torch.randn(int(ends[-1]), 64, device="cpu"), torch.randn(len(ends), 32, 64, device="cpu")
    found = grouped.grouped_linear(x.to(device, torch.bfloat16), weight.to(device), ends.to(device))
    compare("product", found, grouped.grouped_linear_loop(x, weight, ends), 1e-2)


def through(experts: RoutedExperts, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and all gradients of experts with LoRA and fast weights.

    On given routes: a whole step in bfloat16 sends tokens through other experts, and says nothing.
    """
    generator = torch.Generator("cpu").manual_seed(2)
    batch, tokens, chosen, width = 3, 200, 4, experts.gate_proj.in_features
    x, d = (torch.randn(batch, tokens, width, generator=generator, device="cpu") for _ in range(2))
    routes = torch.rand(batch, tokens, len(experts), generator=generator, device="cpu").topk(chosen).indices
    weights = torch.rand(batch, tokens, chosen, generator=generator, device="cpu")
    sites = {name: getattr(experts, name) for name in ("gate_proj", "up_proj", "down_proj")}
    shapes = [SiteShape(name, m.in_features, m.out_features, len(experts)) for name, m in sites.items()]
    start = FastWeights.initial(shapes, MemoryConfig(rank=8, alpha=16), KEYS[:batch], torch.device("cpu"))
    for name in sorted(start.tensors):
        if name.endswith(".B"):
            start.tensors[name] = torch.randn(start.tensors[name].shape, generator=generator, device="cpu") * 0.05
    fast = FastWeights(moved(start.tensors, device), start.scaling).leaves()
    x, weights = (tensor.to(device, dtype).requires_grad_() for tensor in (x, weights))
    experts = copy.deepcopy(experts).to(device)
    experts.fast = {name: fast.site(name) for name in sites}
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = experts(x, routes.to(device), weights)
    output.backward(d.to(device, output.dtype))
    lora = {name: p.grad for name, p in experts.named_parameters() if p.grad is not None}
    phi = {name: value.grad for name, value in fast.tensors.items()}
    return {"output": output, "input": x.grad, "weights": weights.grad, "LoRA": flat(lora), "fast weights": flat(phi)}


@pytest.mark.parametrize("way", ["float32", "bfloat16", "bfloat16 one by one"])
@pytest.mark.parametrize("kind", MOE)
def test_experts(kind, way, device, compare, monkeypatch):
    model = tiny(kind, lora=True, hidden_size=64, num_experts=18)
    experts = next(module for module in model.modules() if isinstance(module, RoutedExperts))
    exact = through(experts, torch.device("cpu"), torch.float32)
    if way == "bfloat16 one by one":
        monkeypatch.setattr(grouped, "_KERNEL_DTYPES", ())
    dtype, tolerance = (torch.float32, 1e-5) if way == "float32" else (torch.bfloat16, 2e-2)
    for name, found in through(experts, device, dtype).items():
        compare(name, found, exact[name], tolerance)


def trainer_on(
    device: torch.device, model: nn.Module, tokenizer: Any, folder: Path, memory: MemoryConfig, **training: Any
) -> MemDLMTrainer:
    trainer = make_trainer(model, tokenizer, folder, memory, examples(4), use_cpu=device.type == "cpu", **training)
    trainer.state.logging_steps, trainer.state.global_step = 100, 5  # of a step that is not logged
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_float32(kind, checkpointing, device, tokenizer, tmp_path, compare):
    """With an inner loop that moves far: with an inner learning rate of 1 % more the loss is 7 % off."""
    model = tiny(kind, lora=True)
    if checkpointing:
        checkpoint_activations(model)
    steps, training = [], {"gradient_checkpointing": checkpointing}
    for where in (torch.device("cpu"), device):
        trainer = trainer_on(where, copy.deepcopy(model), tokenizer, tmp_path, memory_for(kind), **training)
        steps.append(Step(trainer, moved(train_batch(trainer), where)))
    cpu, gpu = steps
    compare("loss", gpu.loss, cpu.loss, 1e-4)
    tensors = [step.written.fast_weights.tensors for step in (gpu, cpu)]
    compare("fast weights", *map(flat, tensors), 1e-3)
    compare("gradients", flat(gpu.gradients), flat(cpu.gradients), 1e-3)


@pytest.mark.parametrize("kind", MOE)
def test_a_step_on_a_base_in_4_bit(kind, device, tokenizer, tmp_path, compare):
    """Against the same weights written out, on the CPU."""
    tiny(kind, **packed_models.DIMENSIONS[kind]).save_pretrained(tmp_path / "base")
    packed = packed_models.load(tmp_path / "base")  # on the GPU, if there is one
    steps = []
    for where, model in ((torch.device("cpu"), packed_models.written_out(packed)), (device, packed)):
        trainer = trainer_on(where, model.to(where), tokenizer, tmp_path, memory_for(kind))
        steps.append(Step(trainer, moved(train_batch(trainer), where)))
    cpu, gpu = steps
    compare("loss", gpu.loss, cpu.loss, 1e-3)
    compare("gradients", flat(gpu.gradients), flat(cpu.gradients), 1e-2)


@pytest.mark.parametrize("memory", [True, False], ids=["MemDLM", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_bfloat16_never_waits(kind, memory, device, tokenizer, tmp_path):
    """Under autocast, as accelerate puts it around the model."""
    config = memory_for(kind, rank=8) if memory else OFF
    trainer = trainer_on(device, tiny(kind, lora=0.05, rank=8), tokenizer, tmp_path, config, bf16=True)
    trainer.accelerator.prepare_model(trainer.model)
    batch = moved(train_batch(trainer), device)

    def step() -> Tensor:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        return loss

    step()  # the first also makes what later ones find
    with waits(device) as waited:
        loss = step()
    assert not waited, dict(waited)
    assert loss.isfinite()


def test_nor_does_a_run(device, tokenizer, tmp_path):
    """Data, clipping and optimizer included."""
    training = {"bf16": True, "max_steps": NEEDED, "logging_steps": 100, "logging_first_step": False}
    model, config = tiny("llada_moe", lora=0.05, rank=8), memory_for("llada_moe", rank=8)
    found = watch(trainer_on(device, model, tokenizer, tmp_path, config, **training), lambda found: None)
    assert not found.faults and found.waits is not None
    assert not found.waits, dict(found.waits)


def test_a_saved_memory(device, tmp_path):
    """A file knows no device: what is loaded goes to where the model is."""
    (text,), model, config = random_prompts(24), tiny("llada2").to(device), memory_for("llada2")
    fast = prompt_memory(model, config).recall([text])
    loaded = pretrained_of(model, config)
    save_snapshot(tmp_path / "memory.safetensors", fast, loaded.name, config, text)
    again = memory_for_prompts(loaded, {}, str(tmp_path / "memory.safetensors"))
    saved, own = (answers_of(decoder_with(memory, model), [text]) for memory in (again, prompt_memory(model, config)))
    assert saved == own


@pytest.mark.parametrize("attention", ["full", "block_causal"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_prompts_and_their_answers(kind, attention, device, compare):
    texts, model, found = random_prompts(24, 17), tiny(kind), []
    for where in (torch.device("cpu"), device):
        here = copy.deepcopy(model).to(where)
        memory = prompt_memory(here, memory_for(kind), attention=attention, block_size=4)
        found.append((flat(memory.recall(texts).tensors), answers_of(decoder_with(memory, here), texts)))
    (cpu, answers), (gpu, own) = found
    compare("fast weights", gpu, cpu, 1e-3)
    assert own == answers
