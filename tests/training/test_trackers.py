"""Trackers of runs, each by transformers' own integration: the names are the same in all of them, and one run is one.

A run evaluates after its last step, although no interval falls on it; that, too, belongs to the run.
"""

from __future__ import annotations

import pytest
from command_line import error_of
from small_run import logs_of, recipe_for
from transformers.integrations import get_available_reporting_integrations

from dllm_memdlm.training import run as runs

#: What a memory logs of itself in training: losses and gradients of the inner steps, φ's size, the loss without φ.
MEMORY = ("inner_loss_1", "inner_loss_2", "inner_grad_norm_1", "inner_grad_norm_2", "fast_weights_norm")
TRAIN = {f"train/{name}" for name in ("loss", "loss_memory_off", "nonfinite_samples", *MEMORY)}
EVAL = {f"eval/loss{kind}" for kind in ("", "_memory_off", "_memory_prompt", "_memory_other")}
SETTINGS = ("training.max_steps=2", "training.eval_strategy='no'", "training.save_strategy='no'")


def test_tensorboard(recipe_file, tmp_path):
    events_of = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    runs.train(recipe_for(recipe_file, tmp_path, "training.report_to=tensorboard", *SETTINGS))
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    accumulator = events_of.EventAccumulator(str(events.parent))
    accumulator.Reload()
    for name in TRAIN | EVAL:
        own = name.replace("train/", "").replace("eval/", "eval_")
        values = [scalar.value for scalar in accumulator.Scalars(name)]
        assert values == pytest.approx([log[own] for log in logs_of(tmp_path) if own in log]), name
        assert len(values) == (2 if name in TRAIN else 1) and ("nonfinite" in name or min(values) > 0), name
    text = accumulator.Tensors("args/text_summary")[0].tensor_proto.string_val[0]
    assert b'"memory.inner_lr": 0.1' in text


def test_wandb_offline(recipe_file, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    try:
        runs.train(recipe_for(recipe_file, tmp_path / "run", "training.report_to=wandb", *SETTINGS))
        summary, config = dict(wandb.run.summary), dict(wandb.run.config)
    finally:
        wandb.finish()
        wandb.teardown()
    assert summary.keys() >= TRAIN | EVAL
    assert config["memory.inner_lr"] == 0.1
    (evaluated,) = (log for log in logs_of(tmp_path / "run") if "eval_loss" in log)
    assert summary["eval/loss_memory_off"] == pytest.approx(evaluated["eval_loss_memory_off"])
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_a_tracker_that_is_not_there_ends_a_run_before_its_data_is_read(recipe_file, tmp_path, capsys):
    missing = {"swanlab", "clearml", "mlflow", "trackio", "wandb"} - {*get_available_reporting_integrations()}
    for name in missing:
        said = error_of(capsys, str(recipe_file), f"training.report_to=[{name}]", "data.dataset=/nowhere.jsonl")
        assert f"training.report_to=['{name}']: expected none, all, or of those that are installed: " in said
        assert said.endswith(f"; for {name}: pip install {name}")
    assert missing
    assert recipe_for(recipe_file, tmp_path).training.trackio_space_id is None, "its logs stay here"
