"""Runs that go on from a checkpoint: which one they take, that they end at the same bits, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import examples, make_trainer, tiny
from safetensors.torch import load_file
from small_run import logs_of, recipe_for, without_times

from dllm_memdlm.backbones.expert_names import split_names
from dllm_memdlm.config import ConfigError
from dllm_memdlm.training import resume, run, run_folder
from dllm_memdlm.training.trainer import MemDLMTrainer

pytestmark = pytest.mark.usefixtures("caches_of_runs")


def message(call: Any, *args: Any) -> str:
    with pytest.raises(ConfigError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_resumed_run_ends_at_the_same_bits(finished, recipe_file, tmp_path):
    """A folder as a killed run leaves it: a checkpoint, and no more. `resume` finds it."""
    shutil.copytree(finished / "checkpoint-2", tmp_path / "checkpoint-2")
    # Where it goes on it has been evaluated, so `eval_on_start` does nothing
    trainer = run.train(recipe_for(recipe_file, tmp_path, "training.eval_on_start=true"), resume=True)
    assert trainer.state.global_step == 4
    assert (tmp_path / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert without_times(logs_of(tmp_path))[:-1] == without_times(logs_of(finished))[:-1]
    start = load_file(finished / "checkpoint-2" / "model.safetensors")
    end = load_file(finished / "model.safetensors")
    moved = sum(not torch.equal(start[name], end[name]) for name in start)  # all but experts without a token
    assert moved > 0.8 * len(start)


@pytest.mark.parametrize("steps", [3, 4, 6])
def test_a_run_that_has_reached_its_end_takes_no_step(steps, recipe_file, tmp_path, capsys):
    """Within an epoch (four steps), at its end, and within the next. With a constant schedule a step would show."""
    settings = [f"training.max_steps={steps}", "training.save_steps=1", "training.lr_scheduler_type=constant"]
    run.train(recipe_for(recipe_file, tmp_path, *settings))
    weights, logs = (tmp_path / "model.safetensors").read_bytes(), without_times(logs_of(tmp_path))
    for name in ("model.safetensors", "trainer_state.json"):  # as if it was killed after its last checkpoint
        (tmp_path / name).unlink()
    for _ in range(2):
        trainer = run.train(recipe_for(recipe_file, tmp_path, *settings), resume=True)
        assert trainer.state.global_step == steps
        printed = capsys.readouterr().out.splitlines()
        assert f"going on from {tmp_path}/checkpoint-{steps}" in printed
        assert f"all {steps} steps were done: nothing was left to train" in printed
        assert (tmp_path / "model.safetensors").read_bytes() == weights
        assert [log for log in without_times(logs_of(tmp_path)) if "loss" in log] == [
            log for log in logs if "loss" in log
        ]
        assert any("eval_loss" in log and log["step"] == steps for log in logs_of(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*"))[-1] == f"checkpoint-{steps}"


def test_the_summary_of_a_resumed_run_is_of_its_own_steps(finished, recipe_file, tmp_path):
    """transformers divides by all steps, those of the session before included."""
    shutil.copytree(finished / "checkpoint-2", tmp_path / "checkpoint-2")
    for steps in ((3, 4), ()):
        summary = run.train(recipe_for(recipe_file, tmp_path), resume=True).state.log_history
        last = next(log for log in reversed(summary) if "train_runtime" in log)
        losses = [log["loss"] for log in summary if "loss" in log and log["step"] in steps]
        assert ("train_loss" in last) == ("train_steps_per_second" in last) == bool(steps)
        if steps:
            assert last["train_loss"] == pytest.approx(sum(losses) / 2, abs=1e-4)
            assert last["train_steps_per_second"] == pytest.approx(2 / last["train_runtime"], rel=0.1)


def test_a_run_that_has_lost_its_numbers_says_so(recipe_file, tmp_path, capsys):
    settings = ("training.learning_rate=1e30", "training.max_steps=3", "training.max_grad_norm=0")
    run.train(recipe_for(recipe_file, tmp_path, *settings, "training.save_strategy='no'"))
    assert "the loss is not finite at step 3, the first of 1 such logs" in capsys.readouterr().out


def test_resuming_takes_the_last_checkpoint_or_starts(finished, recipe_file, tmp_path, monkeypatch):
    taken = []

    class Stop(Exception):
        pass

    def train(trainer: MemDLMTrainer, resume_from_checkpoint: Any) -> None:
        taken.append(resume_from_checkpoint)
        raise Stop

    monkeypatch.setattr(MemDLMTrainer, "train", train)
    other = finished / "checkpoint-2"
    cases = [
        (tmp_path, True, ()),  # an empty folder
        (tmp_path / "none", True, ()),
        (finished, False, ()),
        (finished, True, ()),
        (finished, True, (f"training.resume_from_checkpoint={other}",)),
        (tmp_path, False, (f"training.resume_from_checkpoint={other}",)),
    ]
    for folder, resumes, overrides in cases:
        with pytest.raises(Stop):
            run.train(recipe_for(recipe_file, folder, *overrides), resume=resumes)
    assert taken == [None, None, None, str(finished / "checkpoint-4"), str(other), str(other)]


def test_a_checkpoint_of_another_recipe_is_refused(finished, recipe_file):
    checkpoint = finished / "checkpoint-4"
    cases = [
        ("memory.rank=8", "memory.rank=4, the recipe now says 8"),
        ("data.padding_loss=false", "data.padding_loss=True, the recipe now says False"),
        ("data.mask_prompt=false", "data.mask_prompt=True, the recipe now says False"),
        ("memory.enabled=false", "memory.enabled=True, the recipe now says False"),
        ("lora.enabled=true", "lora.enabled=False, the recipe now says True"),
        ("model.dtype=bfloat16", "model.dtype='float32', the recipe now says 'bfloat16'"),
        ("training.seed=7", "training.seed=42, the recipe now says 7"),
        ("training.gradient_accumulation_steps=2", "training.gradient_accumulation_steps=1, the recipe now says 2"),
        ("memory.target_modules=[up_proj]", "memory.target_modules=['gate_proj', 'up_proj', 'down_proj'], the recipe "),
    ]
    for override, says in cases:
        text = message(run.train, recipe_for(recipe_file, finished, override), True)
        assert text.startswith(f"{checkpoint}: made with {says}")
        assert text.endswith("; change it back, or train to another training.output_dir")
    assert message(run.train, recipe_for(recipe_file, finished, "memory.rank=8"), True) == (
        f"{checkpoint}: made with memory.rank=4, the recipe now says 8; change it back, or train to another "
        "training.output_dir"
    )
    run.check_recipe(str(checkpoint), recipe_for(recipe_file, finished, "training.max_steps=9"), {})


def test_what_is_no_checkpoint_is_refused(finished, recipe_file, tmp_path):
    foreign = tmp_path / "foreign"
    shutil.copytree(finished / "checkpoint-2", foreign)
    (foreign / "contents.json").unlink()  # as any other trainer leaves it
    for folder, why in (
        (tmp_path / "none", "no such checkpoint"),
        (finished / "recipe.yaml", "no such checkpoint"),
        (finished, "not a checkpoint of this trainer (no readable contents.json)"),
        (foreign, "not a checkpoint of this trainer (no readable contents.json)"),
    ):
        recipe = recipe_for(recipe_file, tmp_path / "run", f"training.resume_from_checkpoint={folder}")
        assert message(run.train, recipe) == f"{folder}: {why}"


def test_every_file_of_a_checkpoint_is_missed(finished, recipe_file, tmp_path):
    whole = finished / "checkpoint-2"
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    needed = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "recipe.yaml"}
    assert needed <= {str(path) for path in files}
    checkpoint = tmp_path / "run" / "checkpoint-2"
    for name in files:
        if name.name == run_folder.CONTENTS:
            continue
        size = (whole / name).stat().st_size
        for keep, state in ((None, "is missing"), (size // 2, f"has {size // 2:,} bytes of {size:,}")):
            shutil.copytree(whole, checkpoint)
            (checkpoint / name).unlink()
            if keep is not None:
                (checkpoint / name).write_bytes((whole / name).read_bytes()[:keep])
            text = message(run.train, recipe_for(recipe_file, tmp_path / "run"), True)
            assert text == f"{checkpoint}: not whole, {name} {state}; take an earlier checkpoint"
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize("contents", ["", "[]", '{"files": {}}', "{"])
def test_unreadable_contents_are_those_of_no_checkpoint(contents, tmp_path):
    (tmp_path / run_folder.CONTENTS).write_text(contents)
    assert message(run_folder.check_whole, tmp_path).endswith(
        "not a checkpoint of this trainer (no readable contents.json)"
    )


def test_parts_for_other_processes_are_refused(tmp_path):
    text = message(run_folder.check_engine, "checkpoint-2", "ZeRO-2, 8 processes", "ZeRO-2, 4 processes")
    assert text == (
        "checkpoint-2: made by ZeRO-2, 8 processes, this is ZeRO-2, 4 processes; resume with the same engine and "
        "number of processes"
    )
    for made_by, here in (("one process", "FSDP2, 2 processes"), ("DDP, 4 processes", "DDP, 2 processes")):
        assert message(run_folder.check_engine, "checkpoint-2", made_by, here)
    run_folder.check_engine("checkpoint-2", "DDP, 2 processes", "DDP, 2 processes")
    run_folder.check_engine("checkpoint-2", "one process", "one process")


# --- a save that is cut off ----------------------------------------------------------------------------------------


def save_two(folder: Path, tokenizer: Any, cut: bool = False, **settings: Any) -> MemDLMTrainer:
    """Two steps with a checkpoint after each; the second save may be cut off, which leaves the trainer as it is."""
    trainer = make_trainer(
        tiny("llama"), tokenizer, folder, data=examples(6), save_strategy="steps", save_steps=1, **settings
    )

    def cut_off(checkpoint: Path) -> None:
        if checkpoint.name == "checkpoint-2":
            raise KeyboardInterrupt

    if cut:
        trainer.beside_checkpoints.append(cut_off)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()
    return trainer


def test_a_save_that_is_cut_off_leaves_the_checkpoint_before(tokenizer, tmp_path):
    trainer = save_two(tmp_path, tokenizer, cut=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", run_folder.RUN, resume.UNFINISHED}
    assert (tmp_path / resume.UNFINISHED / "checkpoint-2" / "model.safetensors").is_file()
    assert run_folder.check_whole(tmp_path / "checkpoint-1")["made_by"] == "one process"
    trainer.beside_checkpoints.clear()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))  # the next save clears it away
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2", run_folder.RUN}
    assert run_folder.check_whole(tmp_path / "checkpoint-2")["made_by"] == "one process"


def test_weights_alone_are_not_gone_on_from(tokenizer, tmp_path):
    save_two(tmp_path, tokenizer, save_only_model=True)
    text = message(run_folder.check_whole, tmp_path / "checkpoint-2")
    assert text.startswith(f"{tmp_path / 'checkpoint-2'}: weights without the optimizer's state (training.save_only")


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars:UserWarning")
def test_what_is_uploaded_is_a_finished_checkpoint(tokenizer, tmp_path, monkeypatch):
    """Without a hub: where transformers would begin to upload from."""
    folders: list[str] = []
    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", lambda self, folder: folders.append(folder))
    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", lambda self, **kwargs: None)
    monkeypatch.setattr(transformers.Trainer, "_finish_current_push", lambda self: None)
    save_two(tmp_path, tokenizer, push_to_hub=True)
    assert folders == [str(tmp_path / f"checkpoint-{step}") for step in (1, 2)]


def test_a_new_run_beside_old_checkpoints_says_so(finished, recipe_file, tmp_path, capsys):
    shutil.copytree(finished / "checkpoint-4", tmp_path / "checkpoint-4")
    run.train(recipe_for(recipe_file, tmp_path, "training.max_steps=1", "training.eval_strategy='no'"))
    assert f"{tmp_path} has checkpoints of an earlier run" in capsys.readouterr().out


# transformers' remark on checkpoints that are less than a second apart
@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")
def test_old_checkpoints_are_removed_when_the_new_one_is_there(tokenizer, tmp_path):
    save_two(tmp_path, tokenizer, save_total_limit=1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", run_folder.RUN}


@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")
def test_the_best_checkpoint_is_known_by_its_final_name(tokenizer, tmp_path):
    trainer = save_two(
        tmp_path,
        tokenizer,
        eval_data=examples(3, seed=1),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss_memory_off",
        greater_is_better=False,
        save_total_limit=1,
    )
    best = trainer.state.best_model_checkpoint
    assert best in (str(tmp_path / "checkpoint-1"), str(tmp_path / "checkpoint-2"))
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
    expected = load_file(Path(best) / "model.safetensors")
    for name, tensor in split_names(trainer.model.state_dict()).items():
        assert torch.equal(tensor, expected.get(name, tensor)), name


def test_a_checkpoint_of_the_same_name_is_replaced(tokenizer, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "old").touch()
    save_two(tmp_path, tokenizer)
    assert not (tmp_path / "checkpoint-1" / "old").exists()
    assert run_folder.check_whole(tmp_path / "checkpoint-1")["made_by"] == "one process"
