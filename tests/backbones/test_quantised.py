"""4-bit bases: NF4 weights under a LoRA and fast weights, against the same model with the weights written out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import ALL_KINDS, SHIFTED, assert_close_relative, examples, make_trainer, tiny, train_batch
from packed_models import DIMENSIONS, load, written_out
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from safetensors.torch import load_file
from steps import Step, flat, initial, memory_for, train_logs
from torch import Tensor, nn

from dllm_memdlm.backbones import load_model, read_config, staged_backbone
from dllm_memdlm.backbones.expert_names import split_names
from dllm_memdlm.backbones.experts import PackedExpertLinear
from dllm_memdlm.backbones.lora import ExpertLora
from dllm_memdlm.backbones.output import OutputLinear
from dllm_memdlm.config import ConfigError, ModelConfig
from dllm_memdlm.training import run
from dllm_memdlm.training.recipe import build_recipe

NF4 = {"quant_type": "nf4", "compress_statistics": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints in float32, by backbone."""
    paths = {kind: tmp_path_factory.mktemp(kind) for kind in ALL_KINDS}
    for kind, path in paths.items():
        tiny(kind, **DIMENSIONS[kind]).save_pretrained(path)
    return paths


def test_experts_are_unpacked_by_one_call_to_the_same_bits(folders):
    """Against bitsandbytes' layers, one for each expert; of sizes that fill no whole block, too."""
    path = str(folders["llada2"])
    model = load_model(ModelConfig(path=path, load_in_4bit=True), read_config(path))
    found = {name: m for name, m in model.named_modules() if isinstance(m, PackedExpertLinear)}
    assert len(found) == 6
    original = load_file(folders["llada2"] / "model.safetensors")
    for name, value in split_names({f"{name}.weight": m.unpack() for name, m in found.items()}).items():
        assert torch.equal(value, dequantize_4bit(*quantize_4bit(original[name].to(value.dtype), **NF4))), name
    # Rows of whole blocks, or odd ones: bitsandbytes (0.50) unpacks others wrongly on a CPU, ours does not.
    for size in ((5, 7), (64, 192), (130, 64)):
        matrices = [torch.randn(size) for _ in range(3)]
        for nested in (True, False):
            packed = [quantize_4bit(m, quant_type="nf4", compress_statistics=nested) for m in matrices]
            experts = PackedExpertLinear(packed, torch.float32)
            assert torch.equal(experts.unpack(), torch.stack([dequantize_4bit(*part) for part in packed]))
            assert torch.equal(experts.bfloat16().unpack(), experts.unpack()), "a cast rounds nothing"


def lora_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["llada2", SHIFTED])
def test_a_step_equals_one_with_the_weights_written_out(kind, folders, tokenizer, tmp_path):
    """Of experts, and of layers with a bias and without."""
    packed = load(folders[kind])
    with torch.no_grad():  # on some CPUs it would leave weights behind through which no gradient passes
        packed(input_ids=torch.arange(3, 11)[None])
    steps = []
    for model in (written_out(packed), packed):
        trainer = make_trainer(model, tokenizer, tmp_path, memory_for(kind))
        batch = train_batch(trainer)
        steps.append(Step(trainer, batch, initial(trainer, batch)))
    plain, step = steps
    assert_close_relative(step.loss, plain.loss, 1e-5)
    for fast, expected in zip(*(flat(each.written.fast_weights) for each in (step, plain)), strict=True):
        assert all(value.dtype == torch.float32 for value in fast.values())
        for name, value in expected.items():
            assert_close_relative(fast[name], value, 1e-4, name)
    trainable = lora_weights(packed)
    assert sum(bool(plain.gradients[name].any()) for name in trainable) > 0.5 * len(trainable)
    for name in trainable:
        assert_close_relative(step.gradients[name], plain.gradients[name], 1e-4, name)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_training_in_bfloat16_as_the_paper_does(kind, folders, tokenizer, tmp_path):
    """Every linear layer but the output is packed, and adapted."""
    model = load(folders[kind], "bfloat16", dropout=0.05)
    backbone = staged_backbone(model)
    assert type(backbone.get_output_embeddings()) is OutputLinear
    routed = [m for name, m in backbone.named_modules() if name.endswith(".experts.up_proj")]
    assert len(routed) == (2 if kind in ("llada_moe", "llada2") else 0)
    for module in routed:
        assert type(module) is ExpertLora and type(module.base_layer) is PackedExpertLinear
        assert module.base_layer.weight.numel() * 2 == module.base_layer.unpack().numel()
        with pytest.raises(ValueError, match="experts in 4 bit take no sum"):
            module.merge()
    packed = [module for module in backbone.modules() if isinstance(module, Linear4bit)]
    assert len(packed) == sum(isinstance(module, LoraLinear4bit) for module in backbone.modules()) > 10
    states = [module.weight.quant_state for module in packed]
    assert all(module.weight.dtype == torch.uint8 for module in packed)
    assert all(state.quant_type == "nf4" and state.nested for state in states)

    before = lora_weights(model)
    settings = {"gradient_checkpointing": True, "bf16": True, "learning_rate": 1e-2, "warmup_ratio": 0.0}
    trainer = make_trainer(model, tokenizer, tmp_path, memory_for(kind), max_steps=2, **settings)
    trainer.train()
    logs = train_logs(trainer)
    assert len(logs) == 2 and all(math.isfinite(log["loss"]) and log["nonfinite_samples"] == 0 for log in logs)
    assert all(abs(log["loss"] - log["loss_memory_off"]) > 1e-3 for log in logs), "the fast weights do something"
    moved = sum(not torch.equal(p, before[name]) for name, p in lora_weights(model).items())
    assert moved > 0.5 * len(before)


def test_a_run_resumes_at_the_same_bits(folders, tokenizer, tmp_path):
    weights = []
    for resume in (None, str(tmp_path / "0" / "checkpoint-2")):
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
        model, memory = load(folders["llada_moe"], dropout=0.3), memory_for("llada_moe", dropout=0.3)
        trainer = make_trainer(model, tokenizer, tmp_path / str(len(weights)), memory, examples(12), **settings)
        trainer.train(resume_from_checkpoint=resume)
        weights.append(lora_weights(trainer.model))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_packed_weights_are_not_shared_out(engine, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(run.engines, "shares_weights", lambda args: True)  # as in two processes
    values = {
        "model": {"path": str(folders["llama"]), "load_in_4bit": True},
        "data": {"dataset": "rows.jsonl"},
        "training": {"engine": engine, "output_dir": str(tmp_path), "bf16": False},
    }
    expected = rf"^training\.engine='{engine}' with model\.load_in_4bit: .*expected ddp, zero1 or zero2$"
    with pytest.raises(ConfigError, match=expected):
        run.build_trainer(build_recipe(values))
