"""Trackers of runs, each by transformers' own integration: the names are the same in all of them, and one run is one.

A run evaluates after its last step, although no interval falls on it; that, too, belongs to the run.
"""

from __future__ import annotations

import importlib.util
import json
import sqlite3
from pathlib import Path

import pytest
from command_line import error_of
from fresh_python import run
from small_run import logs_of, recipe_for
from transformers.integrations import get_available_reporting_integrations

from dllm_memdlm.training import run as runs

pytestmark = pytest.mark.usefixtures("caches_of_runs")

#: What a memory logs of itself in training: losses and gradients of the inner steps, φ's size, the loss without φ.
MEMORY = ("inner_loss_1", "inner_loss_2", "inner_grad_norm_1", "inner_grad_norm_2", "fast_weights_norm")
TRAIN = {f"train/{name}" for name in ("loss", "loss_memory_off", "nonfinite_samples", *MEMORY)}
EVAL = {f"eval/loss{kind}" for kind in ("", "_memory_off", "_memory_prompt", "_memory_other")}
SETTINGS = ("training.max_steps=2", "training.eval_strategy='no'", "training.save_strategy='no'")


def needs(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}: pip install 'dllm-memdlm[{name}]'")


def command(tracker: str, recipe_file: Path, folder: Path, **environment: str) -> None:
    """Train in a process of its own, which has to end for all to be written."""
    words = (f"training.report_to=[{tracker}]", f"training.output_dir={folder / 'run'}", *SETTINGS)
    environment |= {"HF_HOME": str(folder / "home"), "HF_DATASETS_CACHE": str(folder / "home")}
    done = run("-m", "dllm_memdlm.train", str(recipe_file), *words, paths=(folder,), **environment)
    assert done.returncode == 0, done.stderr[-3000:]


def check_values(found: dict[str, list[float]], folder: Path) -> None:
    """All values that the run's own log has of these names, in order."""
    for name in TRAIN | EVAL:
        kept = name.replace("train/", "").replace("eval/", "eval_")
        assert found[name] == pytest.approx([log[kept] for log in logs_of(folder) if kept in log]), name
        assert len(found[name]) == (2 if name in TRAIN else 1), name
    assert all(value > 0 for name in TRAIN | EVAL if "nonfinite" not in name for value in found[name])


def test_tensorboard(recipe_file, tmp_path):
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs.train(recipe_for(recipe_file, tmp_path, "training.report_to=tensorboard", *SETTINGS))
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    check_values({name: [s.value for s in accumulator.Scalars(name)] for name in TRAIN | EVAL}, tmp_path)
    text = accumulator.Tensors("args/text_summary")[0].tensor_proto.string_val[0]
    assert b'"memory.inner_lr": 0.1' in text


def test_wandb_offline(recipe_file, tmp_path, monkeypatch):
    needs("wandb")
    import wandb

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


@pytest.mark.slow
def test_trackio_without_a_space(recipe_file, tmp_path):
    needs("trackio")
    command("trackio", recipe_file, tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "huggingface.db") as database:
        rows = database.execute("SELECT run_id, metrics FROM metrics ORDER BY id").fetchall()
        ((config,),) = database.execute("SELECT config FROM configs").fetchall()
    assert len({name for name, _ in rows}) == 1
    logged = [json.loads(metrics) for _, metrics in rows]
    check_values({name: [log[name] for log in logged if name in log] for name in TRAIN | EVAL}, tmp_path / "run")
    assert json.loads(config)["memory.inner_lr"] == 0.1


def test_a_tracker_that_is_not_there_ends_a_run_before_its_data_is_read(recipe_file, capsys):
    missing = {"swanlab", "clearml", "mlflow", "trackio", "wandb"} - {*get_available_reporting_integrations()}
    for name in missing:
        said = error_of(capsys, str(recipe_file), f"training.report_to=[{name}]", "data.dataset=/nowhere.jsonl")
        assert f"training.report_to=['{name}']: expected none, all, or of those that are installed: " in said
        assert said.endswith(f"; for {name}: pip install {name}")
    assert missing
