"""What makes a checkpoint whole, whoever asks for one, and what stays until it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from small_run import recipe_for
from test_checkpoints import AtStepEnds

from dllm_memdlm.training import checkpoints, run
from dllm_memdlm.training.checkpoints import last_checkpoint

pytestmark = pytest.mark.usefixtures("caches_of_runs")


def test_a_checkpoint_is_marked_whoever_asks_for_it_and_pushed_then(recipe_file, tmp_path, monkeypatch):
    """As transformers does on a signal. One of the same name stays whole until the new one is."""
    pushed = []

    def push(self: Any, folder: str) -> None:
        pushed.append((Path(folder).name, bool(checkpoints.contents_of(folder))))

    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", push)
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
