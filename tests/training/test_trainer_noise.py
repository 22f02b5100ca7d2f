"""The noise of a training run: the same masks with memory and without, other ones in each epoch, and memory dropout."""

from __future__ import annotations

import math
from typing import Any

import datasets
import pytest
import torch
from conftest import (
    KINDS,
    assert_close_relative,
    examples,
    make_trainer,
    take_gradients,
    tiny,
    train_batch,
)
from steps import OFF, memory_for, plain_loss, train_logs
from torch import Tensor

from dllm_memdlm.training.example_ids import with_example_ids

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
