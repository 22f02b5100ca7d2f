"""What the weights are kept in: where all of them train, in a dtype in which small updates are not lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import recipe_for, write_base, write_recipe

from dllm_memdlm.training import run
from dllm_memdlm.training.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("caches_of_runs")
SMALL_STEPS = (
    *("training.max_steps=10", "training.bf16=true", "training.save_strategy='no'", "training.eval_strategy='no'"),
    "data.eval_fraction=0",
)


@pytest.fixture
def undecided(tmp_path) -> Path:
    """A recipe without a dtype."""
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("  dtype: float32\n", ""))
    return path


def moved(recipe_file, folder, *settings: str) -> float:
    """The share of the weights of attention that a run has changed."""
    for name, rate in (("end", "2e-5"), ("start", "0")):
        run.train(recipe_for(recipe_file, folder / name, *SMALL_STEPS, *settings, f"training.learning_rate={rate}"))
    start, end = (load_file(folder / name / "model.safetensors") for name in ("start", "end"))
    return torch.cat([(end[name] != start[name]).flatten() for name in end if "self_attn" in name]).double().mean()


def test_where_all_weights_train_no_update_is_lost(undecided, tmp_path, capsys):
    assert moved(undecided, tmp_path / "default") > 0.9
    assert "lost in rounding" not in capsys.readouterr().out
    assert moved(undecided, tmp_path / "low", "model.dtype=bfloat16") < 0.5
    said = "model.dtype=bfloat16: most updates of weights are lost in rounding; float32 keeps them"
    assert said in capsys.readouterr().out


def test_the_dtype_goes_by_what_is_trained(undecided, tmp_path, monkeypatch):
    """The base's path begins at home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_base(undecided, tmp_path / "base")
    base = ("model.path=~/base", "model.architecture=null", "model.dimensions={}")
    for lora, dtype in (("true", "bfloat16"), ("false", "float32")):
        recipe = load_recipe(undecided, [*base, f"lora.enabled={lora}"])
        assert (recipe.model.path, recipe.model.dtype) == (str(tmp_path / "base"), dtype)
        assert next(run.build_trainer(recipe).model.get_input_embeddings().parameters()).dtype == getattr(torch, dtype)
        assert f"dtype: {dtype}\n" in recipe.to_yaml(), "what is saved says what was used"
