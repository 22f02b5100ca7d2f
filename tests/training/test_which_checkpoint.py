"""Which checkpoint a run goes on from: one of the newest run in the folder, on the same examples, wherever they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from conftest import examples, make_trainer, tiny
from small_run import recipe_for, write_base, write_recipe

from dllm_memdlm.config import ConfigError
from dllm_memdlm.training import run, run_folder
from dllm_memdlm.training.run_folder import last_checkpoint

pytestmark = pytest.mark.usefixtures("caches_of_runs")
OTHER_RATE = ("training.learning_rate=0.03",)


class Killed(Exception):
    pass


class KilledAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def killed(monkeypatch: pytest.MonkeyPatch, step: int, *arguments: Any, **more: Any) -> None:
    """A run of a recipe that ends in the middle of a step."""

    def build(recipe: Any) -> Any:
        trainer = run_build(recipe)
        trainer.add_callback(KilledAt(step))
        return trainer

    run_build = run.build_trainer
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run, "build_trainer", build)
        run.train(*arguments, **more)


# --- several runs in one folder ------------------------------------------------------------------------------------


def test_an_older_runs_checkpoints_are_not_gone_on_from(finished, recipe_file, tmp_path, monkeypatch, capsys):
    """Of the older run there is one of more steps. Killed, and resumed, the new run ends as if it was never stopped."""
    run.train(recipe_for(recipe_file, tmp_path / "whole", *OTHER_RATE))
    folder = tmp_path / "used"
    shutil.copytree(finished, folder)
    recipe = recipe_for(recipe_file, folder, *OTHER_RATE)
    killed(monkeypatch, 3, recipe)
    assert last_checkpoint(folder) == f"{folder}/checkpoint-2"
    capsys.readouterr()
    run.train(recipe, resume=True)
    assert f"going on from {folder}/checkpoint-2" in capsys.readouterr().out
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_run_without_a_checkpoint_of_its_own_is_not_another(finished, recipe_file, tmp_path, monkeypatch):
    """Nothing is lost: the older run's checkpoint is named, and can be gone on from by its name."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    killed(monkeypatch, 1, recipe_for(recipe_file, tmp_path, *OTHER_RATE))
    with pytest.raises(ConfigError) as error:
        run.train(recipe_for(recipe_file, tmp_path, *OTHER_RATE), resume=True)
    assert str(error.value) == (
        f"{tmp_path}: the newest run there has written no checkpoint, and checkpoint-4 is of an earlier one; start "
        "without resuming, or name it as training.resume_from_checkpoint"
    )
    named = f"training.resume_from_checkpoint={tmp_path}/checkpoint-4"
    assert run.train(recipe_for(recipe_file, tmp_path, named)).state.global_step == 4
    assert last_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-4"


def test_a_clock_that_was_set_back_hides_no_checkpoint(recipe_file, tmp_path, monkeypatch):
    run.train(recipe_for(recipe_file, tmp_path))
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(time_ns=lambda: 5))
    run.train(recipe_for(recipe_file, tmp_path, "training.max_steps=6"), resume=True)
    assert last_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-6"


def test_a_second_run_does_not_rename_the_first(recipe_file, tmp_path):
    """It begins in the same folder while the first one still trains."""

    class Other(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (tmp_path / run_folder.RUN).write_text("another")

    trainer = run.build_trainer(recipe_for(recipe_file, tmp_path))
    trainer.add_callback(Other())
    trainer.train()
    assert {json.loads(path.read_text())["run"] for path in tmp_path.glob("checkpoint-*/contents.json")} != {"another"}
    with pytest.raises(ConfigError, match="the newest run there has written no checkpoint"):
        last_checkpoint(tmp_path)


def test_a_run_that_goes_on_from_an_earlier_checkpoint_is_the_newest(recipe_file, tmp_path, monkeypatch):
    """It is named, and the run is killed after its next one: that is the last, though another has more steps."""
    run.train(recipe_for(recipe_file, tmp_path, "training.max_steps=6"))
    assert last_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-6"
    (tmp_path / "checkpoint-2").rename(tmp_path / "kept")
    named = (f"training.resume_from_checkpoint={tmp_path / 'kept'}", "training.max_steps=6", *OTHER_RATE)
    killed(monkeypatch, 5, recipe_for(recipe_file, tmp_path, *named))
    assert last_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-4"


def test_a_trainer_takes_the_same_one(tokenizer, tmp_path):
    """`resume_from_checkpoint=True`, without a recipe."""

    def trainer(**settings: Any) -> Any:
        model = tiny("llama")
        return make_trainer(model, tokenizer, tmp_path, data=examples(6), save_strategy="steps", **settings)

    trainer(max_steps=6, save_steps=6).train()
    second = trainer(max_steps=6, save_steps=2)
    second.add_callback(KilledAt(3))
    with pytest.raises(Killed):
        second.train()
    third = trainer(max_steps=2, save_steps=2)
    third.train(resume_from_checkpoint=True)
    assert third.state.global_step == 2
    with pytest.raises(ConfigError, match="no checkpoint to go on from"):
        make_trainer(tiny("llama"), tokenizer, tmp_path / "empty").train(resume_from_checkpoint=True)


# --- examples that have moved, or changed --------------------------------------------------------------------------


def test_the_same_examples_are_gone_on_with_wherever_they_lie(tmp_path, capsys):
    recipe_file, data = write_recipe(tmp_path), tmp_path / "rows.jsonl"
    run.train(recipe_for(recipe_file, tmp_path / "run", "training.max_steps=2"))
    data.rename(tmp_path / "moved.jsonl")
    (tmp_path / "link").symlink_to(tmp_path)
    same = ("training.max_steps=2", "data.max_length=900", "data.num_proc=2", "data.eval_size=3")
    for dataset in (tmp_path / "moved.jsonl", tmp_path / "link" / "moved.jsonl"):
        run.train(recipe_for(recipe_file, tmp_path / "run", f"data.dataset={dataset}", *same), resume=True)
        assert f"going on from {tmp_path}/run/checkpoint-2" in capsys.readouterr().out


def test_a_file_that_was_rewritten_is_noticed(tmp_path):
    recipe_file, data = write_recipe(tmp_path), tmp_path / "rows.jsonl"
    run.train(recipe_for(recipe_file, tmp_path / "run", "training.max_steps=2"))
    data.write_text(data.read_text().replace("Say 3", "Say 4"))
    with pytest.raises(ConfigError) as error:
        run.train(recipe_for(recipe_file, tmp_path / "run"), resume=True)
    assert str(error.value) == (
        f"{tmp_path}/run/checkpoint-2: made with another content of data.dataset={str(data)!r}, which has been written "
        "to since; change it back, or train to another training.output_dir"
    )


def test_the_same_base_is_gone_on_with_wherever_it_lies(tmp_path, capsys):
    recipe_file, base = write_recipe(tmp_path), tmp_path / "base"
    on_base = write_base(recipe_file, base)
    run.train(recipe_for(recipe_file, tmp_path / "run", *on_base, "training.max_steps=2"))
    base.rename(tmp_path / "moved")
    elsewhere = (*on_base, f"model.path={tmp_path / 'moved'}")
    run.train(recipe_for(recipe_file, tmp_path / "run", *elsewhere), resume=True)
    assert f"going on from {tmp_path}/run/checkpoint-2" in capsys.readouterr().out

    write_base(recipe_file, base, seed=7)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for overrides, says in (
        (on_base, f"model.path={str(tmp_path / 'moved')!r}, the recipe now says {str(base)!r}"),
        (elsewhere, f"another content of model.path={str(tmp_path / 'moved')!r}, which has been written to since"),
    ):
        with pytest.raises(ConfigError) as error:
            run.train(recipe_for(recipe_file, tmp_path / "copy", *overrides), resume=True)
        assert str(error.value).startswith(f"{tmp_path}/copy/checkpoint-4: made with {says}; change it back")
        shutil.rmtree(tmp_path / "moved", ignore_errors=True)
        shutil.copytree(base, tmp_path / "moved")


# --- the best checkpoint -------------------------------------------------------------------------------------------

BEST = ("training.load_best_model_at_end=true", "training.save_steps=2", "training.eval_steps=2")


@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")
@pytest.mark.parametrize("how", ["moved", "copied", "absolute", "other working directory", "gone"])
def test_the_best_checkpoint_is_found_again(how, recipe_file, tmp_path, monkeypatch, capsys):
    """At the end of a run its weights are loaded: in a folder that has moved they are where it is now."""
    monkeypatch.chdir(tmp_path)
    settings = [*BEST, "training.metric_for_best_model=eval_loss", "training.greater_is_better=true"]  # the first, then
    run.train(recipe_for(recipe_file, Path("runs/a"), *settings, "training.max_steps=2"))
    folder = Path("runs/a")
    if how == "absolute":  # as transformers compares paths, it would remove the best one
        folder = folder.resolve()
        settings.append("training.save_total_limit=1")
    elif how == "other working directory":
        monkeypatch.chdir(tmp_path / "runs")
        folder = Path("a")
    elif how == "copied":  # not the original's
        shutil.copytree("runs/a", "runs/b")
        folder = Path("runs/b")
    else:
        folder = Path("elsewhere/b")
        folder.parent.mkdir()
        Path("runs/a").rename(folder)
    if how == "gone":
        (folder / "checkpoint-2").rename("kept")
        settings.append("training.resume_from_checkpoint=kept")
    trainer = run.train(recipe_for(recipe_file, folder, *settings), resume=True)
    best = "checkpoint-4" if how == "gone" else "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(folder / best)
    saved = (folder / best / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == saved
    said = "the best checkpoint so far, runs/a/checkpoint-2, is no longer there" in capsys.readouterr().out
    assert said == (how == "gone")


def test_a_checkpoint_says_which_run_made_it(finished):
    contents = [json.loads((folder / "contents.json").read_text()) for folder in finished.glob("checkpoint-*")]
    assert {told["run"] for told in contents} == {(finished / ".run").read_text()}
    assert len({told["written"] for told in contents}) == len(contents) == 2
