"""The trainer: losses and logs of training, against plain MDLM's trainer, what it refuses, accumulated batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from conftest import (
    KINDS,
    assert_close_relative,
    examples,
    make_tokenizer,
    make_trainer,
    seq2seq,
    take_gradients,
    tiny,
    train_batch,
)
from steps import OFF, memory_for, plain_loss, train_logs
from torch import Tensor, nn

from benchmarks.naive_experts import plain_experts
from dllm_memdlm.compat import dllm_api
from dllm_memdlm.compat.dllm_api import NoAttentionMaskWrapper
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.training.collator import AnchorTrajectoryCollator
from dllm_memdlm.training.trainer import MemDLMConfig, MemDLMTrainer


def test_inner_losses_are_means_over_samples_and_steps(tokenizer, tmp_path):
    logged = {"max_steps": 2, "logging_steps": 2, "logging_first_step": False}
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama"), **logged)
    seen: list[Any] = []
    write = trainer.memory.write
    trainer.memory.write = lambda *args, **kwargs: seen.append(write(*args, **kwargs)) or seen[-1]
    trainer.train()
    (log,) = train_logs(trainer)
    for number in (0, 1):
        expected = torch.cat([written.steps[number].loss for written in seen]).mean().item()
        assert log[f"inner_loss_{number + 1}"] == pytest.approx(expected, rel=1e-6)


def test_every_run_of_a_trainer_has_a_train_loss_of_its_own(tokenizer, tmp_path):
    """And with memory off, nothing of memory is logged."""
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, OFF, max_steps=3, logging_steps=1)
    for _ in range(2):
        output = trainer.train()
        logged = [log["loss"] for log in train_logs(trainer)]
        assert output.training_loss == pytest.approx(sum(logged) / 3, abs=1e-4) and len(logged) == 3
    assert not any("inner" in name or "memory" in name for log in trainer.state.log_history for name in log)


class Drawn:
    """Hands out prepared numbers where plain MDLM asks torch for random ones."""

    def __init__(self, *values: Tensor) -> None:
        self.values = list(values)

    def __call__(self, *size: Any, device: Any = None, **_: Any) -> Tensor:
        value = self.values.pop(0)
        assert value.numel() == torch.Size(size if isinstance(size[0], int) else size[0]).numel()
        return value


def assert_same_step(loss: Tensor, expected: Tensor, model: nn.Module) -> None:
    """The same losses and gradients."""
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = []
    for one, complete in ((loss, True), (expected, False)):
        one.backward()
        found.append(torch.cat([gradient.flatten() for gradient in take_gradients(model, complete).values()]))
    assert_close_relative(*found, 1e-5, "gradient")


SHIFTED = {"loss_norm_type": "batch", "right_shift_logits": True}


@pytest.mark.dllm
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"loss_norm_type": "sequence", "loss_weight_type": "uniform"}, SHIFTED])
def test_memory_off_is_dllms_trainer_on_the_same_noise(kind, settings, tokenizer, tmp_path, monkeypatch):
    prompt = 0 if settings is SHIFTED else 3  # which prepends a begin-of-sequence token
    rows = examples(6, prompt=prompt, spread=prompt)
    trainer = make_trainer(tiny(kind, lora=True), tokenizer, tmp_path, OFF, rows, **settings)
    batch = train_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)

    common = {"use_cpu": True, "bf16": False, "report_to": "none", "eval_strategy": "no"}
    args = dllm_api.MDLMConfig(output_dir=str(tmp_path), **common, **settings)
    other = dllm_api.MDLMTrainer(model=trainer.model, args=args, processing_class=tokenizer)
    first = 1 if prompt == 0 else 0  # it prepends by itself
    inputs = {name: batch[name][:, first:] for name in ("input_ids", "labels")}
    t = (batch["noise_level"] - other.time_epsilon) / (1 - other.time_epsilon)
    with monkeypatch.context() as patch, plain_experts(trainer.model):
        patch.setattr(torch, "rand", Drawn(t, 1 - batch["anchor_mask"].float()))
        expected = other.compute_loss(trainer.model, inputs)
    assert_same_step(loss, expected, trainer.model)


@pytest.mark.parametrize("kind", ["llada_moe", "llama"])
def test_memory_dropout_of_one_is_plain_mdlm(kind, tokenizer, tmp_path):
    trainer = make_trainer(tiny(kind, lora=True), tokenizer, tmp_path, memory_for(kind, dropout=1.0))
    batch = train_batch(trainer)
    assert_same_step(trainer.compute_loss(trainer.model, batch), plain_loss(trainer.model, batch), trainer.model)


def test_memory_dropout_is_a_sample_s_own_and_a_function_of_its_noise(tokenizer, tmp_path):
    model, rows = tiny("llama", torch.float64), examples(12)
    never, half, always = (
        make_trainer(model, tokenizer, tmp_path, memory_for("llama", dropout=p), rows, loss_norm_type="batch")
        for p in (0.0, 0.5, 1.0)
    )

    def losses(trainer: MemDLMTrainer) -> list[float]:
        return [trainer.compute_loss(model, train_batch(trainer, [i])).item() for i in range(12)]

    on, mixed, off = losses(never), losses(half), losses(always)
    assert all(loss in either for loss, *either in zip(mixed, on, off, strict=True))
    assert losses(half) == mixed
    assert 3 <= sum(a == b for a, b in zip(mixed, on, strict=True)) <= 9
    batch = train_batch(half, range(6))
    each = [half.compute_loss(model, {name: v[i : i + 1] for name, v in batch.items()}).item() for i in range(6)]
    assert half.compute_loss(model, batch).item() == pytest.approx(sum(each) / 6, rel=1e-6)


def test_a_plain_collator_is_wrapped(tokenizer, tmp_path):
    def trainer(memory: MemoryConfig, **settings: Any) -> MemDLMTrainer:
        return make_trainer(tiny("llama"), tokenizer, tmp_path, memory, **settings)

    memory = memory_for("llama")
    plain = trainer(memory, collator=seq2seq(tokenizer))
    assert isinstance(plain.data_collator, AnchorTrajectoryCollator)
    assert plain.data_collator.seed == plain.args.seed and plain.data_collator.config is plain.memory_config
    own = AnchorTrajectoryCollator(NoAttentionMaskWrapper(seq2seq(tokenizer)), memory, seed=7)
    assert trainer(memory, collator=own, data_seed=5).data_collator is own
    assert trainer(memory, data_seed=5).data_collator.seed == 5
    with pytest.raises(ConfigError, match=r"^data_collator\.config and memory differ"):
        trainer(MemoryConfig(), collator=own)
    own.bos_token_id = 1
    with pytest.raises(ConfigError, match=r"^data_collator\.bos_token_id=1: expected .*\(here False\)$"):
        trainer(memory, collator=own)


@pytest.mark.parametrize("tokenizer", [None, make_tokenizer(bos_token="<bos>")], ids=["none", "without a mask"])
def test_a_tokenizer_without_a_mask_token_is_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"^tokenizer without a mask token; add one: tokenizer\.add_special_tokens"):
        make_trainer(tiny("llama"), tokenizer, tmp_path, collator=seq2seq(make_tokenizer()))


def test_a_model_without_stages_is_refused_before_anything_is_built(tokenizer, tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=48)
    with pytest.raises(TypeError, match=r"^no backbone adapter for GPT2LMHeadModel; "):
        make_trainer(transformers.GPT2LMHeadModel(config), tokenizer, tmp_path)


@pytest.mark.parametrize(("given", "expected"), [(None, True), ({"non_blocking": False}, False)])
def test_a_pinned_batch_is_copied_without_waiting(given, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = MemDLMConfig(str(tmp_path), use_cpu=True, bf16=False, accelerator_config=given)
    assert arguments.accelerator_config.non_blocking is expected


@pytest.mark.parametrize(
    ("kind", "memory", "norm"),
    [("llada_moe", True, "batch"), ("llama", True, "batch"), ("llada2", False, "batch"), ("llama", True, "token")],
)
def test_accumulated_parts_are_one_batch(kind, memory, norm, tokenizer, tmp_path):
    """As 2 × 2 examples or 4 × 1. The batch norm does not depend on which meet; under the other all are alike."""
    weights, logs = [], []
    rows = examples(8, shortest=14, longest=14, spread=0 if norm == "token" else 3)
    for size in (4, 1 if norm == "token" else 2):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 3}
        settings |= {"loss_norm_type": norm, "warmup_ratio": 0.0}
        model, config = tiny(kind, torch.float64, lora=True), memory_for(kind) if memory else OFF
        trainer = make_trainer(model, tokenizer, tmp_path, config, rows, **settings)
        assert trainer.model_accepts_loss_kwargs is (norm == "token")
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        logs.append([(log["loss"], log["grad_norm"]) for log in train_logs(trainer)])
    for one, many in zip(*logs, strict=True):
        assert one == pytest.approx(many, rel=1e-4, abs=2e-4) and one[1] > 0
    for name in weights[0]:
        assert_close_relative(weights[1][name], weights[0][name], 1e-5, name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_counts_wherever_it_stands(kind, tokenizer, tmp_path):
    """A causal model's first label is no target, and transformers 5 leaves it out for models of such a class."""
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}, {"input_ids": [9, 8, 7], "labels": [-100, 8, 7]}]
    trainer = make_trainer(tiny(kind), tokenizer, tmp_path, OFF, data=rows)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    trainer.state.max_steps = 1
    _, count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert int(count) == int(batch["labels"].ne(-100).sum()) >= 6
