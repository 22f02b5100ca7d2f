"""The trainer: losses and logs of training, against plain MDLM's trainer, what it refuses, accumulated batches."""

from __future__ import annotations

import math
from pathlib import Path
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
from dllm_memdlm.compat import bundled, dllm_api
from dllm_memdlm.compat.dllm_api import NoAttentionMaskWrapper
from dllm_memdlm.config import ConfigError
from dllm_memdlm.training.collator import AnchorTrajectoryCollator
from dllm_memdlm.training.trainer import MemDLMConfig, MemDLMTrainer

# === training runs ===


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [0.05, False])
def test_a_plain_run(kind, lora, tokenizer, tmp_path):
    model = tiny(kind, lora=lora)
    before = {name: p.clone() for name, p in model.named_parameters()}
    memory = memory_for(kind, inner_lr=0.1, grad_clip=1.0)
    trainer = make_trainer(model, tokenizer, tmp_path, memory, max_steps=3, warmup_ratio=0.0)
    trainer.train()
    logs = train_logs(trainer)
    assert [log["step"] for log in logs] == [1, 2, 3]
    for log in logs:
        expected = {"loss", "loss_memory_off", "inner_loss_1", "inner_loss_2", "inner_grad_norm_1", "inner_grad_norm_2"}
        assert expected | {"nonfinite_samples", "step_seconds", "grad_norm"} <= log.keys()
        assert all(math.isfinite(value) for value in log.values())
        assert log["loss"] < log["loss_memory_off"] and log["step_seconds"] > 0 and log["nonfinite_samples"] == 0
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved <= trainable
    # without LoRA every weight learns; experts without tokens get zeros, and AdamW decays nothing here
    assert len(moved) > 0.5 * len(trainable)


def test_memory_off_logs_no_memory(tokenizer, tmp_path):
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, OFF)
    trainer.train()
    assert not any("inner" in name or "memory" in name for log in trainer.state.log_history for name in log)
    assert all(log["step_seconds"] > 0 for log in train_logs(trainer))


def test_inner_losses_are_means_over_samples_and_steps(tokenizer, tmp_path):
    trainer = make_trainer(
        tiny("llama"), tokenizer, tmp_path, memory_for("llama"), max_steps=2, logging_steps=2, logging_first_step=False
    )
    seen: list[Any] = []
    write = trainer.memory.write
    trainer.memory.write = lambda *args, **kwargs: seen.append(write(*args, **kwargs)) or seen[-1]
    trainer.train()
    (log,) = train_logs(trainer)
    for number in (0, 1):
        expected = torch.cat([written.steps[number].loss for written in seen]).mean().item()
        assert log[f"inner_loss_{number + 1}"] == pytest.approx(expected, rel=1e-6)


def test_the_mode_and_the_losses_of_a_run_are_those_of_plain_mdlm_with_memory_off(tokenizer, tmp_path):
    """Step by step the same losses as a hand-written loop with AdamW."""
    model = tiny("llada_moe", torch.float64)
    trainer = make_trainer(model, tokenizer, tmp_path, OFF, lr_scheduler_type="constant", warmup_ratio=0.0)
    batches: list[dict[str, Any]] = []
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *args: batches.append(dict(inputs)) or step(model, inputs, *args)
    trainer.train()
    copy = tiny("llada_moe", torch.float64)
    optimizer = torch.optim.AdamW(copy.parameters(), lr=1e-3, weight_decay=0.0)
    for batch, log in zip(batches, train_logs(trainer), strict=True):
        loss = plain_loss(copy, batch)
        assert log["loss"] == pytest.approx(loss.item(), abs=1e-4)  # transformers rounds to four digits
        loss.backward()
        for parameter in copy.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        nn.utils.clip_grad_norm_(copy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


# === against plain MDLM's trainer ===


class Drawn:
    """Hands out prepared numbers where plain MDLM asks torch for random ones."""

    def __init__(self, *values: Tensor) -> None:
        self.values = list(values)

    def __call__(self, *size: Any, device: Any = None, **_: Any) -> Tensor:
        value = self.values.pop(0)
        assert value.numel() == torch.Size(size if isinstance(size[0], int) else size[0]).numel()
        return value


def plain_trainer(cls: Any, config: Any, model: nn.Module, tokenizer: Any, folder: Path, **settings: Any) -> Any:
    common = {"use_cpu": True, "bf16": False, "report_to": "none", "eval_strategy": "no"}
    arguments = config(output_dir=str(folder), **common, **settings)
    return cls(model=model, args=arguments, processing_class=tokenizer)


PLAIN = [
    pytest.param((bundled.MDLMTrainer, bundled.MDLMConfig), id="bundled"),
    pytest.param((dllm_api.MDLMTrainer, dllm_api.MDLMConfig), id="dllm", marks=pytest.mark.dllm),
]


@pytest.mark.parametrize("plain", PLAIN)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_norm_type": "sequence", "loss_weight_type": "uniform"},
        {"loss_norm_type": "batch", "right_shift_logits": True},
    ],
    ids=["default", "sequence_uniform", "batch_shifted"],
)
def test_memory_off_is_the_plain_trainer_on_the_same_noise(plain, kind, settings, tokenizer, tmp_path, monkeypatch):
    prompt = 0 if "right_shift_logits" in settings else 3  # which prepends a begin-of-sequence token
    rows = examples(6, prompt=prompt, spread=prompt)
    trainer = make_trainer(tiny(kind, lora=True), tokenizer, tmp_path, OFF, rows, **settings)
    batch = train_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = take_gradients(trainer.model)

    other = plain_trainer(*plain, trainer.model, tokenizer, tmp_path, **settings)
    inputs = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    if prompt == 0:  # it prepends by itself
        inputs = {name: value[:, 1:] for name, value in inputs.items()}
    epsilon = other.time_epsilon
    t = (batch["noise_level"] - epsilon) / (1 - epsilon)
    never, always = torch.ones(()), torch.zeros(())
    monkeypatch.setattr(torch, "rand", Drawn(t, torch.where(batch["anchor_mask"], always, never)))
    with plain_experts(trainer.model):
        expected = other.compute_loss(trainer.model, inputs)
    monkeypatch.undo()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected_gradients = take_gradients(trainer.model, complete=False)
    ours, theirs = (torch.cat([g[n].flatten() for n in gradients]) for g in (gradients, expected_gradients))
    assert_close_relative(ours, theirs, 1e-5, "gradient")


def test_it_is_dllms_trainer_where_dllm_is():
    assert issubclass(MemDLMTrainer, dllm_api.MDLMTrainer) and issubclass(MemDLMConfig, dllm_api.MDLMConfig)
    if dllm_api.HAS_DLLM:
        assert dllm_api.MDLMTrainer is not bundled.MDLMTrainer


# === collators and tokenizers ===


def test_a_plain_collator_is_wrapped(tokenizer, tmp_path):
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama"), collator=seq2seq(tokenizer))
    assert isinstance(trainer.data_collator, AnchorTrajectoryCollator)
    assert trainer.data_collator.seed == trainer.args.seed and trainer.data_collator.config is trainer.memory_config
    own = AnchorTrajectoryCollator(NoAttentionMaskWrapper(seq2seq(tokenizer)), memory_for("llama"), seed=7)
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama"), collator=own, data_seed=5)
    assert trainer.data_collator is own
    assert "attention_mask" not in own([trainer.train_dataset[0]])
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama"), data_seed=5)
    assert trainer.data_collator.seed == 5


@pytest.mark.parametrize("tokenizer", [None, make_tokenizer(bos_token="<bos>")], ids=["none", "without a mask"])
def test_a_tokenizer_without_a_mask_token_is_refused(tokenizer, tmp_path):
    message = r"^tokenizer without a mask token; add one: tokenizer\.add_special_tokens\(\{'mask_token': …\}\)$"
    with pytest.raises(ConfigError, match=message):
        make_trainer(tiny("llama"), tokenizer, tmp_path, collator=seq2seq(make_tokenizer()))


def test_a_model_without_stages_is_refused_before_anything_is_built(tokenizer, tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=48)
    with pytest.raises(TypeError, match=r"^no backbone adapter for GPT2LMHeadModel; "):
        make_trainer(transformers.GPT2LMHeadModel(config), tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("given", "expected"), [(None, True), ({"split_batches": False}, True), ({"non_blocking": False}, False)]
)
def test_a_pinned_batch_is_copied_without_waiting(given, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = MemDLMConfig(str(tmp_path), use_cpu=True, bf16=False, accelerator_config=given)
    assert arguments.accelerator_config.non_blocking is expected


@pytest.mark.parametrize(
    ("setting", "value", "known"),
    [("loss_norm_type", "tokens", "token, sequence, batch"), ("loss_weight_type", "linear", "scheduler, uniform")],
)
def test_unknown_choices_are_refused(setting, value, known, tmp_path):
    with pytest.raises(ConfigError, match=f"^training.{setting}='{value}': expected one of {known}$"):
        MemDLMConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{setting: value})


# === gradient accumulation ===


@pytest.mark.parametrize(("kind", "memory"), [*((kind, "on") for kind in KINDS), ("llada2", "off")])
def test_accumulated_halves_are_one_batch(kind, memory, tokenizer, tmp_path):
    """2 × 2 examples and 1 × 4, with a norm that does not depend on which examples meet; here all are of one length."""
    weights, losses = [], []
    rows = examples(8, shortest=14, longest=14)
    for size, accumulation in ((4, 1), (2, 2)):
        model = tiny(kind, torch.float64, lora=True)
        trainer = make_trainer(
            model,
            tokenizer,
            tmp_path,
            memory_for(kind) if memory == "on" else OFF,
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            loss_norm_type="batch",
            warmup_ratio=0.0,
            max_steps=3,
        )
        assert trainer.model_accepts_loss_kwargs is False
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        losses.append([log["loss"] for log in train_logs(trainer)])
        norms = [log["grad_norm"] for log in train_logs(trainer)]
        assert all(norm > 0 for norm in norms)
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    for name in weights[0]:
        assert_close_relative(weights[1][name], weights[0][name], 1e-5, name)


def test_equal_counts_accumulate_exactly_under_the_token_norm(tokenizer, tmp_path):
    losses = []
    for size, accumulation in ((4, 1), (1, 4)):
        trainer = make_trainer(
            tiny("llama", torch.float64),
            tokenizer,
            tmp_path,
            memory_for("llama"),
            examples(8, spread=0, shortest=14, longest=14),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
        )
        trainer.train()
        losses.append([(log["loss"], log["grad_norm"]) for log in train_logs(trainer)])
    for one, many in zip(*losses, strict=True):
        assert one == pytest.approx(many, rel=1e-4, abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_counts_wherever_it_stands(kind, tokenizer, tmp_path):
    """A causal model's first label is no target, and transformers 5 leaves it out for models of such a class."""
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}, {"input_ids": [9, 8, 7], "labels": [-100, 8, 7]}]
    trainer = make_trainer(tiny(kind), tokenizer, tmp_path, OFF, data=rows)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    trainer.state.max_steps = 1
    _, count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert int(count) == int(batch["labels"].ne(-100).sum()) >= 6


def test_every_run_of_a_trainer_has_a_train_loss_of_its_own(tokenizer, tmp_path):
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, OFF, max_steps=3, logging_steps=1)
    for _ in range(2):
        output = trainer.train()
        logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert output.training_loss == pytest.approx(sum(logged) / 3, abs=1e-4) and len(logged) == 3
