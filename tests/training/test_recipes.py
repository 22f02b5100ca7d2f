"""The recipes of this repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_files import assert_same

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.training.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FOLDERS = (RECIPES, *(RECIPES / name for name in ("cpu", "small", "ablations")))
PAPER = {"llada_moe": "inclusionAI/LLaDA-MoE-7B-A1B-Base", "llada2_mini": "inclusionAI/LLaDA2.1-mini"}


def names_of(pattern: str) -> list[str]:
    """Without the suffix, and with the folder: `llada_moe`, `small/smollm2`."""
    paths = (path for folder in FOLDERS for path in folder.glob(pattern))
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in paths)


def values_of(name: str) -> dict[str, Any]:
    return yaml.safe_load(load_recipe(RECIPES / f"{name}.yaml").to_yaml())


@pytest.mark.parametrize("name", names_of("*.yaml"))
def test_every_recipe_loads_and_round_trips(name, tmp_path):
    path = RECIPES / f"{name}.yaml"
    recipe = load_recipe(path)
    recipe.save(tmp_path)
    assert_same(load_recipe(tmp_path / "recipe.yaml"), recipe)
    command = f"# accelerate launch -m dllm_memdlm.train {path.relative_to(RECIPES.parent)}\n"
    assert path.read_text(encoding="utf-8").startswith(command), "its command comes first"


@pytest.mark.parametrize("name", sorted({*names_of("*_mdlm.yaml"), *(f"{name}_mdlm" for name in PAPER)}))
def test_a_baseline_differs_in_the_memory_only(name):
    mdlm, memdlm = values_of(name), values_of(name.removesuffix("_mdlm"))
    for values, enabled, own in ((memdlm, True, name.removesuffix("_mdlm")), (mdlm, False, name)):
        assert values["memory"].pop("enabled") is enabled
        assert values["training"].pop("output_dir") == f"runs/{Path(own).name}"
    assert mdlm == memdlm


@pytest.mark.parametrize(("name", "path"), PAPER.items())
def test_the_papers_recipes_hold_its_numbers(name, path):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    model, lora, data, training = recipe.model, recipe.lora, recipe.data, recipe.training
    assert (model.path, model.load_in_4bit, model.dtype, model.trust_remote_code) == (path, True, "bfloat16", False)
    assert (lora.enabled, lora.r, lora.alpha, lora.dropout, lora.target_modules) == (True, 32, 64, 0.05, "all-linear")
    assert (data.dataset, data.max_length, data.mask_prompt) == ("Yukang/LongAlpaca-12k", 4096, True)
    assert recipe.memory == MemoryConfig()  # whose defaults are the paper's
    assert (training.learning_rate, training.lr_scheduler_type, training.warmup_ratio) == (2e-5, "cosine", 0.1)
    assert training.optim.startswith("adamw")
    assert (training.num_train_epochs, training.max_steps, training.eval_steps) == (5, -1, 0.1)
    assert (training.bf16, training.group_by_length, training.gradient_checkpointing) == (True, True, True)
    assert training.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert training.per_device_train_batch_size in (2, 4)
    assert training.engine == "zero2" and training.deepspeed is None, "in one process there is nothing to share out"
    assert (training.loss_norm_type, training.loss_weight_type) == ("token", "scheduler")
