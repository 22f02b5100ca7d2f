"""Runs that go on from a checkpoint: which one they take, that they end at the same bits, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_trainer, tiny
from data_files import message_of
from safetensors.torch import load_file
from small_run import logs_of, recipe_for, without_times, write_base, write_recipe

from dllm_memdlm.backbones.expert_names import split_names
from dllm_memdlm.training import checkpoints, run
from dllm_memdlm.training.checkpoints import CONTENTS, RUN, last_checkpoint
from dllm_memdlm.training.trainer import MemDLMTrainer

OTHER_RATE = ("training.learning_rate=0.03",)


class AtStepEnds(transformers.TrainerCallback):
    """Does something with the number of each step."""

    def __init__(self, act: Callable[[int], Any]) -> None:
        self.act = act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.act(state.global_step)


def killed(at: int, recipe: Any) -> None:
    """A run of a recipe that ends in the middle of a step."""

    def kill(step: int) -> None:
        if step == at:
            raise KeyboardInterrupt

    trainer = run.build_trainer(recipe)
    trainer.add_callback(AtStepEnds(kill))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=recipe.training.resume_from_checkpoint)


def test_a_resumed_run_ends_at_the_same_bits(finished, recipe_file, tmp_path):
    """A folder as a killed run leaves it: one checkpoint, and no more. An earlier version noted less in it."""
    shutil.copytree(finished / "checkpoint-2", tmp_path / "checkpoint-2")
    mark = tmp_path / "checkpoint-2" / CONTENTS
    contents = json.loads(mark.read_text())
    earlier = {name: contents[name] for name in ("made_by", "transformers", "trained")}
    mark.write_text(json.dumps({"files": {}, **earlier}))
    # Where it goes on it has been evaluated, so `eval_on_start` does nothing
    trainer = run.train(recipe_for(recipe_file, tmp_path, "training.eval_on_start=true"), resume=True)
    assert trainer.state.global_step == 4
    assert (tmp_path / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert without_times(logs_of(tmp_path))[:-1] == without_times(logs_of(finished))[:-1]
    start, end = (load_file(folder / "model.safetensors") for folder in (finished / "checkpoint-2", finished))
    assert sum(not torch.equal(start[name], end[name]) for name in start) > 0.8 * len(start)
    # transformers would count the steps of the session before
    last = next(log for log in reversed(trainer.state.log_history) if "train_runtime" in log)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log and log["step"] > 2]
    assert last["train_loss"] == pytest.approx(sum(losses) / 2, abs=1e-4)
    assert last["train_steps_per_second"] == pytest.approx(2 / last["train_runtime"], rel=0.1)


@pytest.mark.parametrize("steps", [3, 4, 6])
def test_a_run_that_has_reached_its_end_takes_no_step(steps, recipe_file, tmp_path, capsys):
    """Within an epoch (four steps), at its end, and within the next. With a constant schedule a step would show."""
    settings = [f"training.max_steps={steps}", "training.save_steps=1", "training.lr_scheduler_type=constant"]
    recipe = recipe_for(recipe_file, tmp_path, *settings)
    run.train(recipe)
    weights, logs = (tmp_path / "model.safetensors").read_bytes(), without_times(logs_of(tmp_path))
    for name in ("model.safetensors", "trainer_state.json"):  # as if it was killed after its last checkpoint
        (tmp_path / name).unlink()
    run.train(recipe, resume=True)
    out = capsys.readouterr().out
    assert f"going on from {tmp_path}/checkpoint-{steps}\n" in out
    assert f"all {steps} steps were done: nothing was left to train\n" in out
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    now = without_times(logs_of(tmp_path))
    assert [log for log in now if "loss" in log] == [log for log in logs if "loss" in log]
    assert any("eval_loss" in log and log["step"] == steps for log in now)


def test_a_run_that_has_lost_its_numbers_says_so(recipe_file, tmp_path, capsys):
    settings = ("training.learning_rate=1e30", "training.max_steps=3", "training.max_grad_norm=0")
    run.train(recipe_for(recipe_file, tmp_path, *settings, "training.save_strategy='no'"))
    assert "the loss is not finite at step 3, the first of 1 such logs" in capsys.readouterr().out


def test_an_older_runs_checkpoints_are_not_gone_on_from(finished, recipe_file, tmp_path, capsys):
    """Of the older run there is one of more steps. Killed, and resumed, the new run ends as if it was never stopped."""
    run.train(recipe_for(recipe_file, tmp_path / "whole", *OTHER_RATE))
    folder = tmp_path / "used"
    shutil.copytree(finished, folder)
    recipe = recipe_for(recipe_file, folder, *OTHER_RATE)
    killed(1, recipe)  # nothing is lost: the older run's can be gone on from by its name
    text = message_of(run.train, recipe, True)
    assert text.startswith(f"{folder}: the newest run there has written no checkpoint, and checkpoint-4 is of an ")
    killed(3, recipe)
    assert last_checkpoint(folder) == f"{folder}/checkpoint-2"
    run.train(recipe, resume=True)
    assert f"going on from {folder}/checkpoint-2" in capsys.readouterr().out
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_second_run_does_not_rename_the_first(recipe_file, tmp_path):
    """It begins in the same folder while the first one still trains."""
    trainer = run.build_trainer(recipe_for(recipe_file, tmp_path))
    trainer.add_callback(AtStepEnds(lambda step: (tmp_path / RUN).write_text("another")))
    trainer.train()
    assert {json.loads(path.read_text())["run"] for path in tmp_path.glob(f"checkpoint-*/{CONTENTS}")} == {trainer.run}
    assert "the newest run there has written no checkpoint" in message_of(last_checkpoint, tmp_path)


def test_a_run_that_goes_on_from_an_earlier_checkpoint_is_the_newest(recipe_file, tmp_path):
    """It is named, and the run is killed after its next one: that is the last, though another has more steps."""
    run.train(recipe_for(recipe_file, tmp_path, "training.max_steps=6"))
    assert last_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-6"
    (tmp_path / "checkpoint-2").rename(tmp_path / "kept")
    named = (f"training.resume_from_checkpoint={tmp_path / 'kept'}", "training.max_steps=6", *OTHER_RATE)
    killed(5, recipe_for(recipe_file, tmp_path, *named))
    assert last_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-4"


@pytest.mark.parametrize(
    ("key", "was", "now"),
    [
        *(("memory.rank", 4, 8), ("lora.enabled", False, True), ("model.dtype", "float32", "bfloat16")),
        *(("training.seed", 42, 7), ("training.gradient_accumulation_steps", 1, 2)),
        *(("data.padding_loss", True, False), ("data.perbatch_cutoff", False, True)),
        *(("data.resp_cutoff_ratio", 0.0, 0.5), ("data.mask_prompt", True, False)),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused(key, was, now, finished, recipe_file):
    text = message_of(run.train, recipe_for(recipe_file, finished, f"{key}={now}"), True)
    says = f"made with {key}={was!r}, the recipe now says {now!r}; change it back, or train to another "
    assert text.startswith(f"{finished}/checkpoint-4: {says}")


def test_what_is_no_whole_checkpoint_is_refused(finished, recipe_file, tmp_path):
    whole = "not a checkpoint of this trainer, or not whole"
    cases = [(tmp_path / "none", "no such checkpoint"), (finished / "recipe.yaml", "no such checkpoint")]
    cases.append((finished, whole))
    for name, contents in (("foreign", None), ("cut", ""), ("list", "[]"), ("other", '{"files": {}}'), ("half", "{")):
        mark = shutil.copytree(finished / "checkpoint-2", tmp_path / name) / CONTENTS
        mark.unlink() if contents is None else mark.write_text(contents)
        cases.append((mark.parent, whole))
    shutil.copytree(finished / "checkpoint-2", tmp_path / "weights")
    (tmp_path / "weights" / "scheduler.pt").unlink()
    cases.append((tmp_path / "weights", "weights without the optimizer's state (training.save_only_model)"))
    for folder, why in cases:
        recipe = recipe_for(recipe_file, tmp_path / "run", f"training.resume_from_checkpoint={folder}")
        assert message_of(run.train, recipe).startswith(f"{folder}: {why}")


def test_parts_for_other_processes_or_tensors_are_refused():
    for made_by, here in (("ZeRO-2, 8 processes", "ZeRO-2, 4 processes"), ("one process", "FSDP2, 2 processes")):
        text = message_of(checkpoints.check_fits, "checkpoint-2", {"made_by": made_by}, [], here)
        assert text.startswith(f"checkpoint-2: made by {made_by}, this is {here}; resume with the same engine")
    expert = "model.layers.1.mlp.experts.gate_proj.weight"
    for contents, trained in (({"trained": 3}, ["a", "b"]), ({}, [expert])):
        text = message_of(checkpoints.check_fits, "checkpoint-2", contents | {"made_by": "x"}, trained, "x")
        assert f"this model trains {len(trained)} tensors" in text
    checkpoints.check_fits("checkpoint-2", {"made_by": "x"}, ["a"], "x")


def test_examples_and_a_base_may_move_but_not_change(tmp_path, capsys):
    """The same ones are gone on with wherever they lie; what was rewritten is noticed."""
    recipe_file, data, base = write_recipe(tmp_path), tmp_path / "rows.jsonl", tmp_path / "base"
    moved, moved_base = tmp_path / "moved.jsonl", tmp_path / "moved"
    on_base = (*write_base(recipe_file, base), "training.max_steps=2")

    def resumed(*settings: str) -> None:
        run.train(recipe_for(recipe_file, tmp_path / "run", *on_base, *settings), resume=True)

    run.train(recipe_for(recipe_file, tmp_path / "run", *on_base))
    data.rename(moved)
    base.rename(moved_base)
    (tmp_path / "link").symlink_to(tmp_path)
    on_moved_base, on_moved_data = f"model.path={moved_base}", f"data.dataset={tmp_path}/link/moved.jsonl"
    resumed(on_moved_base, on_moved_data, "data.max_length=900", "data.num_proc=2", "data.eval_size=3")
    assert f"going on from {tmp_path}/run/checkpoint-2" in capsys.readouterr().out

    made, changed = f"{tmp_path}/run/checkpoint-2: made with ", "which has been written to since"
    text = moved.read_text()
    moved.write_text(text.replace("Say 3", "Say 4"))
    assert message_of(resumed, on_moved_base, on_moved_data).startswith(f"{made}data.dataset=")
    moved.rename(data)
    says = f"{made}another content of data.dataset={str(data)!r}, {changed}"
    assert message_of(resumed, on_moved_base).startswith(says)
    data.write_text(text)
    write_base(recipe_file, base, seed=7)
    says = f"{made}another content of model.path={str(base)!r}, {changed}; change it back"
    assert message_of(resumed).startswith(says)


def saving(folder: Path, tokenizer: Any, **settings: Any) -> MemDLMTrainer:
    """A trainer for two steps with a checkpoint after each."""
    return make_trainer(tiny("llama"), tokenizer, folder, save_strategy="steps", save_steps=1, **settings)


def test_a_save_that_is_cut_off_leaves_the_checkpoint_before(tokenizer, tmp_path):
    """Though one is kept, the last whole one stays until the next is; what was cut off is written over."""

    def cut_off(checkpoint: Path) -> None:
        if checkpoint.name == "checkpoint-2":
            raise KeyboardInterrupt

    trainer = saving(tmp_path, tokenizer, save_total_limit=1)
    trainer.beside_checkpoints.append(cut_off)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.beside_checkpoints.clear()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2", RUN}
    assert trainer.args.save_total_limit == 1
    (tmp_path / "checkpoint-2" / "old").touch()
    assert last_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-1"
    trainer.train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", RUN}
    assert last_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-2"
    assert not (tmp_path / "checkpoint-2" / "old").exists()
    assert message_of(saving(tmp_path / "empty", tokenizer).train, True).endswith("no checkpoint to go on from")


def test_a_checkpoint_is_marked_whoever_asks_for_it_and_pushed_then(recipe_file, tmp_path, monkeypatch):
    """As transformers does on a signal. One of the same name stays whole until the new one is."""
    pushed = []
    seen = lambda _, folder: pushed.append((Path(folder).name, bool(checkpoints.contents_of(folder))))  # noqa: E731
    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", seen)
    recipe = recipe_for(recipe_file, tmp_path, "training.save_strategy='no'")
    trainer = run.build_trainer(recipe)

    def save(step: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(trainer.args, "push_to_hub", True)
            trainer._save_checkpoint(trainer.model, None)

    trainer.add_callback(AtStepEnds(save))
    trainer.train()
    assert pushed == [(f"checkpoint-{step}", True) for step in range(1, 5)]
    trainer.beside_checkpoints.append(lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(4)
    assert last_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-4{checkpoints.BEFORE}"
    run.train(recipe, resume=True)
    trainer.beside_checkpoints.pop()
    save(4)
    assert last_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-4"
    assert not list(tmp_path.glob(f"*{checkpoints.BEFORE}"))


BEST = ("training.load_best_model_at_end=true", "training.save_steps=2", "training.eval_steps=2")
BEST += ("training.metric_for_best_model=eval_loss_memory_off", "training.greater_is_better=true")  # the first, then


@pytest.fixture(scope="module")
def with_a_best(recipe_file, tmp_path_factory) -> Path:
    """A folder in which runs/a is that of a run with one checkpoint, the best so far."""
    folder = tmp_path_factory.mktemp("best")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run.train(recipe_for(recipe_file, Path("runs/a"), *BEST, "training.max_steps=2"))
    return folder


@pytest.mark.parametrize("how", ["moved", "copied", "absolute", "other working directory", "gone"])
def test_the_best_checkpoint_is_found_again(how, with_a_best, recipe_file, tmp_path, monkeypatch, capsys):
    """At the end of a run its weights are loaded: in a folder that has moved they are where it is now."""
    shutil.copytree(with_a_best, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    settings, folder, best = list(BEST), Path("runs/a"), "checkpoint-2"
    if how == "absolute":
        folder = folder.resolve()
        settings.append("training.save_total_limit=1")
    elif how == "other working directory":
        monkeypatch.chdir(tmp_path / "runs")
        folder = Path("a")
    elif how == "copied":  # not the original's
        folder = shutil.copytree(folder, Path("runs/b"))
    else:
        folder = folder.rename("moved")
    if how == "gone":
        (folder / best).rename("kept")
        settings.append("training.resume_from_checkpoint=kept")
        best = "checkpoint-4"
    trainer = run.train(recipe_for(recipe_file, folder, *settings), resume=True)
    assert trainer.state.best_model_checkpoint == str(folder / best)
    saved, expected = (load_file(path / "model.safetensors") for path in (folder, folder / best))
    weights = split_names(trainer.model.state_dict())
    assert saved.keys() == expected.keys() == weights.keys()
    assert all(torch.equal(t, expected[name]) and torch.equal(t, weights[name]) for name, t in saved.items())
    if how == "absolute":  # the best one is kept beside the last one
        assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert ("so far, runs/a/checkpoint-2, is no longer there" in capsys.readouterr().out) == (how == "gone")
