"""What the weights are kept in: where all of them train, in a dtype in which small updates are not lost."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file
from small_run import recipe_for, write_base, write_recipe

from dllm_memdlm.training import run
from dllm_memdlm.training.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("caches_of_runs")
SMALL_STEPS = (
    *("training.learning_rate=2e-5", "training.max_steps=10", "training.bf16=true", "training.save_strategy='no'"),
    *("training.eval_strategy='no'", "data.eval_fraction=0"),
)


def moved(recipe_file, folder, *settings: str) -> float:
    """The share of the weights that a run has changed."""
    recipe = recipe_for(recipe_file, folder, *SMALL_STEPS, *settings)
    run.train(recipe)
    end = load_file(folder / "model.safetensors")
    run.train(recipe_for(recipe_file, folder / "start", *SMALL_STEPS, *settings, "training.learning_rate=0"))
    start = load_file(folder / "start" / "model.safetensors")
    changed = sum((end[name] != start[name]).sum().item() for name in end if "self_attn" in name)
    return changed / sum(end[name].numel() for name in end if "self_attn" in name)


def test_where_all_weights_train_no_update_is_lost(tmp_path, capsys):
    recipe_file = write_recipe(tmp_path)
    recipe_file.write_text(recipe_file.read_text().replace("  dtype: float32\n", ""))  # as it is by default
    assert moved(recipe_file, tmp_path / "default") > 0.9
    assert "lost in rounding" not in capsys.readouterr().out
    assert moved(recipe_file, tmp_path / "low", "model.dtype=bfloat16") < 0.5
    said = "model.dtype=bfloat16: most updates of weights are lost in rounding; float32 keeps them"
    assert said in capsys.readouterr().out


def test_the_dtype_goes_by_what_is_trained(tmp_path):
    recipe_file = write_recipe(tmp_path)
    recipe_file.write_text(recipe_file.read_text().replace("  dtype: float32\n", ""))
    base = write_base(recipe_file, tmp_path / "base")
    for lora, dtype in (("true", "bfloat16"), ("false", "float32")):
        recipe = load_recipe(recipe_file, [*base, f"lora.enabled={lora}"])
        assert recipe.model.dtype == dtype
        assert next(run.build_trainer(recipe).model.get_input_embeddings().parameters()).dtype == getattr(torch, dtype)
        assert f"dtype: {dtype}\n" in recipe.to_yaml(), "what is saved says what was used"


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    recipe_file = write_recipe(tmp_path)
    write_base(recipe_file, tmp_path / "base")
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(recipe_file, ["model.path=~/base", "model.architecture=null", "model.dimensions={}"])
    assert recipe.model.path == os.path.join(tmp_path, "base")
    run.build_trainer(recipe)
