"""Evaluation: both losses, repeatable, without an effect on training; and the meter of the training logs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import datasets
import pytest
import torch
from conftest import KINDS, MASK, examples, make_trainer, tiny
from steps import OFF, memory_for, plain_loss

from dllm_memdlm.config import ConfigError
from dllm_memdlm.method.inner_loop import ParametricMemory
from dllm_memdlm.method.prompt_memory import at_inference
from dllm_memdlm.method.trajectory import Trajectory
from dllm_memdlm.method.windows import window_trajectory, windows_of
from dllm_memdlm.training.example_ids import prompt_of

# dllm's meter computes both splits when an evaluation ends, and torchmetrics says so of the one without tokens
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``compute`` method of metric (NLL|PPL)Metric was called before:UserWarning"
)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_reports_both_losses(kind, tokenizer, tmp_path):
    """The one without fast weights is plain MDLM's, of the same weights on the same noise."""
    rows, settings = examples(7, seed=5), {"per_device_eval_batch_size": 3}
    model = tiny(kind, lora=0.5)
    trainer = make_trainer(model, tokenizer, tmp_path, memory_for(kind), eval_data=rows, **settings)
    (first, *_) = trainer.get_eval_dataloader()
    assert trainer.prediction_step(trainer.model, dict(first), True)[0] > 0, "outside an evaluation, too"
    metrics = trainer.evaluate()
    plain = make_trainer(model, tokenizer, tmp_path, OFF, eval_data=rows, **settings).evaluate()
    assert "eval_loss_memory_off" not in plain
    assert metrics["eval_loss_memory_off"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert abs(metrics["eval_loss"] - metrics["eval_loss_memory_off"]) > 0.05
    # and by hand: every token counts alike, as the norm of this loss says
    model.eval()
    collator, total, tokens = trainer.data_collator.for_evaluation(), 0.0, 0
    for example in trainer.eval_dataset:
        batch = dict(collator([example]))
        count = batch["maskable"].sum().item()
        with torch.no_grad():
            total += plain_loss(model, batch).item() * count
        tokens += count
    assert metrics["eval_loss_memory_off"] == pytest.approx(total / tokens, rel=1e-5)
    logged = {name: value for log in trainer.state.log_history for name, value in log.items()}
    assert logged["eval_loss_memory_off"] == metrics["eval_loss_memory_off"]
    assert logged["eval_nll"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert logged["eval_ppl"] == pytest.approx(math.exp(metrics["eval_loss"]), rel=1e-4)
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("window", [None, 3])
def test_the_losses_with_memory_as_it_is_used(window, tokenizer, tmp_path):
    """φ of the own prompt, and of the next example's, on the same masks; whatever the batches, and by hand."""
    rows, model = examples(5, seed=5), tiny("llama", lora=True)
    memory = memory_for("llama", strategy="cover", window=window, weighting="scheduler")

    def evaluated(size: int, rows: Any = rows, **changes: Any) -> dict[str, float]:
        settings = {"eval_data": rows, "per_device_eval_batch_size": size}
        changed = dataclasses.replace(memory, **changes)
        return make_trainer(model, tokenizer, tmp_path, changed, **settings).evaluate()

    found, alone = evaluated(3), evaluated(1)
    names = [f"eval_{name}" for name in ("loss", "loss_memory_off", "loss_memory_prompt", "loss_memory_other")]
    assert len({round(found[name], 4) for name in names}) == 4
    for name in (*names, "eval_prompt_nll"):
        assert found[name] == pytest.approx(alone[name], rel=1e-4), name
    # of a model that writes on prompts in training, too, they are the losses that it is trained on
    deployed = evaluated(3, source="prompt")
    assert deployed["eval_loss"] == deployed["eval_loss_memory_prompt"]
    for name in (*names[1:], "eval_prompt_nll"):
        assert deployed[name] == pytest.approx(found[name], rel=1e-5), name
    # an example beside itself alone: the other one's prompt is its own
    once = evaluated(1, rows[:1])
    assert once["eval_loss_memory_other"] == pytest.approx(once["eval_loss_memory_prompt"], rel=1e-6)
    # by hand: the first example's response with φ of the second one's prompt in place
    trainer = make_trainer(model, tokenizer, tmp_path, memory, eval_data=rows[:2])
    model.eval()
    batch = dict(trainer.data_collator.for_evaluation()([trainer.eval_dataset[0]]))
    writer, texts = ParametricMemory(model, at_inference(memory), MASK), [torch.tensor(prompt_of(rows[1]))]
    keys = Trajectory.from_batch(batch, "window_0_").noise_keys
    windows = [window_trajectory(parts, keys, writer.config, n) for n, parts in enumerate(windows_of(texts, window))]
    with torch.no_grad(), writer.holding(writer.write_all(windows).fast_weights):
        expected = plain_loss(model, batch).item() * batch["maskable"].sum().item()
    total = trainer.compute_loss(model, batch, return_outputs=True)[1]["loss_memory_other"]
    assert total.item() == pytest.approx(expected, rel=1e-5)


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


def test_several_evaluation_sets(tokenizer, tmp_path):
    def evaluated(data: Any) -> dict[str, float]:
        return make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama"), eval_data=data).evaluate()

    data = {"short": examples(3), "long": examples(3, shortest=20, longest=24)}
    metrics = evaluated(data)
    assert {f"eval_{part}_{loss}" for part in data for loss in ("loss", "loss_memory_off")} <= metrics.keys()
    alone = evaluated(data["long"])
    assert metrics["eval_long_loss_memory_off"] == pytest.approx(alone["eval_loss_memory_off"])


def test_neither_evaluations_nor_logs_move_training(tokenizer, tmp_path):
    """They leave no mark on the weights: `loss_memory_off` is one more forward with dropout, and loaders draw, too."""
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    weights = []
    for lora, settings in ((True, {}), (True, evaluating), (0.3, {"logging_steps": 100}), (0.3, {})):
        model = tiny("llama", lora=lora)
        settings = {"logging_first_step": False, "max_steps": 4, **settings}
        trainer = make_trainer(model, tokenizer, tmp_path, memory_for("llama"), eval_data=examples(4), **settings)
        trainer.train()
        evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
        assert len(evaluations) == (4 if "eval_steps" in settings else 0)
        weights.append(model.state_dict())
    for one, other in (weights[:2], weights[2:]):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_best_metric_of_prompts_is_known_where_nobody_can_look_at_all_examples(tokenizer, tmp_path):
    """Of a stream; of a list in which no example has a prompt it is refused."""
    metric = {"metric_for_best_model": "eval_loss_memory_prompt"}
    rows = [{**row, "labels": list(row["input_ids"])} for row in examples(3)]
    streamed = datasets.Dataset.from_list(rows).to_iterable_dataset()
    make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama"), eval_data=streamed, **metric)
    with pytest.raises(ConfigError, match=r"expected one of eval_loss, eval_loss_memory_off$"):
        make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama"), eval_data=rows, **metric)
