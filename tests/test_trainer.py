"""The trainer: losses and logs in training and in evaluation, with memory and without, and against plain MDLM."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from conftest import (
    AMPLIFIED,
    KINDS,
    MASK,
    assert_close_relative,
    examples,
    make_tokenizer,
    make_trainer,
    seq2seq,
    take_gradients,
    tiny,
    train_batch,
)
from naive import mdlm_loss, plain_experts
from torch import Tensor, nn

from dllm_memdlm import bundled, dllm_api
from dllm_memdlm.collator import AnchorTrajectoryCollator
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.dllm_api import NoAttentionMaskWrapper
from dllm_memdlm.example_ids import with_example_ids
from dllm_memdlm.trainer import MemDLMConfig, MemDLMTrainer

# dllm's meter computes both splits when an evaluation ends, and torchmetrics says so of the one without tokens
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``compute`` method of metric (NLL|PPL)Metric was called before:UserWarning"
)

SMALL = {"rank": 4, "alpha": 8.0, "layer_fraction": 0.4}
OFF = MemoryConfig(**SMALL, enabled=False)


def memory_for(backbone: str, **changes: Any) -> MemoryConfig:
    return MemoryConfig(**{**SMALL, **AMPLIFIED[backbone], **changes})


def train_logs(trainer: MemDLMTrainer) -> list[dict[str, Any]]:
    return [log for log in trainer.state.log_history if "loss" in log]


def plain_loss(model: nn.Module, batch: dict[str, Any], norm: str = "token") -> Tensor:
    """Plain MDLM's, from logits everywhere."""
    tokens = torch.where(batch["anchor_mask"], MASK, batch["input_ids"])
    with plain_experts(model):
        logits = model(input_ids=tokens, attention_mask=batch.get("attention_mask")).logits
    names = ("input_ids", "anchor_mask", "maskable", "noise_level")
    return mdlm_loss(logits, *(batch[name] for name in names), norm)


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


# === noise ===


def test_mdlm_and_memdlm_see_the_same_masks(tokenizer, tmp_path):
    seen: dict[str, list[Tensor]] = {}
    for name, memory in (("mdlm", OFF), ("memdlm", memory_for("llama")), ("dropout", memory_for("llama", dropout=0.5))):
        trainer = make_trainer(tiny("llama", lora=0.5), tokenizer, tmp_path, memory, max_steps=5)  # into a third epoch
        step, masks = trainer.training_step, seen.setdefault(name, [])

        def recording(model: Any, inputs: Any, *args: Any, step: Any = step, masks: Any = masks) -> Tensor:
            masks.append(torch.cat([inputs["input_ids"].flatten(), inputs["anchor_mask"].flatten()]))
            return step(model, inputs, *args)

        trainer.training_step = recording
        trainer.train()
    assert len(seen["mdlm"]) == 5
    for other in ("memdlm", "dropout"):
        assert all(torch.equal(a, b) for a, b in zip(seen["mdlm"], seen[other], strict=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_epochs_differ_in_their_noise(streaming, tokenizer, tmp_path):
    data = datasets.Dataset.from_list(examples(3))
    data = data.to_iterable_dataset() if streaming else data
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, OFF, data, max_steps=3)
    levels: list[list[float]] = []
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *args: (
        levels.append(sorted(inputs["noise_level"].tolist())) or step(model, inputs, *args)
    )
    trainer.train()
    assert len({tuple(level) for level in levels}) == 3


def test_group_by_length(tokenizer, tmp_path):
    trainer = make_trainer(
        tiny("llama"), tokenizer, tmp_path, memory_for("llama"), examples(12), group_by_length=True, max_steps=3
    )
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in train_logs(trainer))


@pytest.mark.parametrize("form", ["list", "datasets", "streaming"])
def test_any_dataset_gets_example_ids(form, tokenizer, tmp_path):
    rows = examples(6)
    data: Any = rows
    if form != "list":
        data = datasets.Dataset.from_list(rows)
        data = data.to_iterable_dataset() if form == "streaming" else data
    numbered = with_example_ids(data)
    assert [row["example_id"] for row in numbered] == list(range(6))
    assert [row["input_ids"] for row in numbered] == [row["input_ids"] for row in rows]
    assert with_example_ids(None) is None
    if form != "streaming":
        again = with_example_ids(numbered)
        assert [row["example_id"] for row in again] == list(range(6))
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama"), data, max_steps=2)
    trainer.train()
    assert len(train_logs(trainer)) == 2


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
    ("setting", "value", "known"),
    [("loss_norm_type", "tokens", "token, sequence, batch"), ("loss_weight_type", "linear", "scheduler, uniform")],
)
def test_unknown_choices_are_refused(setting, value, known, tmp_path):
    with pytest.raises(ConfigError, match=f"^training.{setting}='{value}': expected one of {known}$"):
        MemDLMConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{setting: value})


# === evaluation ===


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_reports_both_losses(kind, tokenizer, tmp_path):
    """The one without fast weights is plain MDLM's, of the same weights on the same noise."""
    rows, settings = examples(7, seed=5), {"per_device_eval_batch_size": 3}
    model = tiny(kind, lora=0.5)
    trainer = make_trainer(model, tokenizer, tmp_path, memory_for(kind), eval_data=rows, **settings)
    metrics = trainer.evaluate()
    plain = make_trainer(model, tokenizer, tmp_path, OFF, eval_data=rows, **settings).evaluate()
    assert "eval_loss_memory_off" not in plain
    assert metrics["eval_loss_memory_off"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert abs(metrics["eval_loss"] - metrics["eval_loss_memory_off"]) > 0.05
    logged = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert logged[0]["eval_loss_memory_off"] == metrics["eval_loss_memory_off"]
    # and by hand: batches weighted by their size, as transformers does
    model.eval()
    collator, total = trainer.data_collator.for_evaluation(), 0.0
    for start in range(0, 7, 3):
        batch = dict(collator([trainer.eval_dataset[i] for i in range(start, min(start + 3, 7))]))
        with torch.no_grad():
            total += plain_loss(model, batch).item() * len(batch["input_ids"])
    assert metrics["eval_loss_memory_off"] == pytest.approx(total / 7, rel=1e-5)
    assert not any(p.grad is not None for p in model.parameters())


def test_evaluation_repeats_itself(tokenizer, tmp_path):
    """Whatever the mode, the epoch and the state of torch's generator were."""
    model = tiny("llada2", lora=0.5)
    trainer = make_trainer(model, tokenizer, tmp_path, memory_for("llada2", dropout=1.0), eval_data=examples(5))
    first = trainer.evaluate()
    torch.manual_seed(1234)
    trainer.data_collator.set_epoch(3)
    model.train()
    second = trainer.evaluate()
    for name in ("eval_loss", "eval_loss_memory_off"):
        assert first[name] == second[name]
    assert first["eval_loss"] != first["eval_loss_memory_off"]  # memory dropout is for training alone
    assert trainer.data_collator.epoch == 3


def test_evaluation_does_not_move_training(tokenizer, tmp_path):
    """Evaluations in between, and their number of batches, leave no mark on the weights."""
    weights = []
    for every, batch_size in ((0, 3), (1, 2)):
        model = tiny("llama", lora=True)  # a data loader moves the generator that dropout draws from
        settings: dict[str, Any] = {"per_device_eval_batch_size": batch_size}
        if every:
            settings |= {"eval_strategy": "steps", "eval_steps": every}
        trainer = make_trainer(
            model, tokenizer, tmp_path, memory_for("llama"), eval_data=examples(4), max_steps=4, **settings
        )
        trainer.train()
        assert len([log for log in trainer.state.log_history if "eval_loss" in log]) == (4 if every else 0)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_several_evaluation_sets(tokenizer, tmp_path):
    data = {"short": examples(3), "long": examples(3, shortest=20, longest=24)}
    metrics = make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama"), eval_data=data).evaluate()
    names = {f"eval_{part}_{loss}" for part in data for loss in ("loss", "loss_memory_off")}
    assert names <= metrics.keys()
    alone = make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama"), eval_data=data["long"]).evaluate()
    assert metrics["eval_long_loss_memory_off"] == pytest.approx(alone["eval_loss_memory_off"])


def test_logging_does_not_move_training(tokenizer, tmp_path):
    """`loss_memory_off` is one more forward with dropout, whose draws must not move those of training."""
    weights = []
    for every in (1, 100):
        model = tiny("llama", lora=0.3)
        trainer = make_trainer(
            model, tokenizer, tmp_path, memory_for("llama"), max_steps=4, logging_steps=every, logging_first_step=False
        )
        trainer.train()
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# === memory dropout ===


@pytest.mark.parametrize("kind", KINDS)
def test_memory_dropout_of_one_is_plain_mdlm(kind, tokenizer, tmp_path):
    trainer = make_trainer(tiny(kind, lora=True), tokenizer, tmp_path, memory_for(kind, dropout=1.0))
    batch = train_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = take_gradients(trainer.model)
    expected = plain_loss(trainer.model, batch)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected_gradients = take_gradients(trainer.model, complete=False)
    ours, theirs = (torch.cat([g[n].flatten() for n in gradients]) for g in (gradients, expected_gradients))
    assert_close_relative(ours, theirs, 1e-5, "gradient")


def test_memory_dropout_is_a_sample_s_own_and_a_function_of_its_noise(tokenizer, tmp_path):
    model = tiny("llama", torch.float64)
    rows = examples(24)
    trainers = [
        make_trainer(model, tokenizer, tmp_path, memory_for("llama", dropout=p), rows, loss_norm_type="batch")
        for p in (0.0, 0.5, 1.0)
    ]
    kept = 0
    for i in range(24):
        on, half, off = (t.compute_loss(model, train_batch(t, [i])).item() for t in trainers)
        assert half in (on, off)
        assert trainers[1].compute_loss(model, train_batch(trainers[1], [i])).item() == half
        kept += half == on
    assert 6 <= kept <= 18
    batch = train_batch(trainers[1], range(6))
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(6)]
    alone = [trainers[1].compute_loss(model, row).item() for row in rows]
    assert trainers[1].compute_loss(model, batch).item() == pytest.approx(sum(alone) / 6, rel=1e-6)


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


# === the meter ===


def test_the_meter_reports_the_mean_over_tokens(tokenizer, tmp_path):
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama"), eval_data=examples(5))
    trainer.evaluate()
    logged = {name: value for log in trainer.state.log_history for name, value in log.items()}
    collator, total, tokens = trainer.data_collator.for_evaluation(), 0.0, 0
    trainer.model.eval()
    for indices in ((0, 1, 2), (3, 4)):
        batch = dict(collator([trainer.eval_dataset[i] for i in indices]))
        with torch.no_grad():
            total += trainer.compute_loss(trainer.model, batch).item() * int(batch["maskable"].sum())
        tokens += int(batch["maskable"].sum())
    assert logged["eval_nll"] == pytest.approx(total / tokens, rel=1e-5)
    assert logged["eval_ppl"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
