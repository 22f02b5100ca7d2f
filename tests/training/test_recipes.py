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
PAPER = ("llada_moe", "llada2_mini")


def names_of(pattern: str) -> list[str]:
    """Without the suffix, and with the folder: `llada_moe`, `small/smollm2`."""
    paths = (path for folder in FOLDERS for path in folder.glob(pattern))
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in paths)


def values_of(name: str) -> dict[str, Any]:
    return yaml.safe_load(load_recipe(RECIPES / f"{name}.yaml").to_yaml())


@pytest.mark.parametrize("name", names_of("*.yaml"))
def test_every_recipe_loads_and_round_trips(name, tmp_path):
    path = RECIPES / f"{name}.yaml"
    text = path.read_text(encoding="utf-8")
    recipe = load_recipe(path)
    recipe.save(tmp_path)
    assert_same(load_recipe(tmp_path / "recipe.yaml"), recipe)
    relative = path.relative_to(RECIPES.parent)
    assert text.startswith(f"# accelerate launch -m dllm_memdlm.train {relative}\n"), "its command comes first"


@pytest.mark.parametrize("name", sorted({*names_of("*_mdlm.yaml"), *(f"{name}_mdlm" for name in PAPER)}))
def test_a_baseline_differs_in_the_memory_only(name):
    mdlm, memdlm = values_of(name), values_of(name.removesuffix("_mdlm"))
    assert memdlm["memory"].pop("enabled") is True
    assert mdlm["memory"].pop("enabled") is False
    assert memdlm["training"].pop("output_dir") == f"runs/{Path(name).name.removesuffix('_mdlm')}"
    assert mdlm["training"].pop("output_dir") == f"runs/{Path(name).name}"
    assert mdlm == memdlm


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_hold_its_numbers(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    model, lora, data, memory, training = recipe.model, recipe.lora, recipe.data, recipe.memory, recipe.training
    paths = {"llada_moe": "inclusionAI/LLaDA-MoE-7B-A1B-Base", "llada2_mini": "inclusionAI/LLaDA2.1-mini"}
    assert model.path == paths[name]
    assert (model.load_in_4bit, model.dtype, model.trust_remote_code) == (True, "bfloat16", False)
    assert (lora.enabled, lora.r, lora.alpha, lora.dropout, lora.target_modules) == (True, 32, 64, 0.05, "all-linear")
    assert (data.dataset, data.max_length, data.mask_prompt) == ("Yukang/LongAlpaca-12k", 4096, True)
    assert (memory.enabled, memory.strategy, memory.steps, memory.epochs) == (True, "anchor_consistent", 2, 1)
    assert (memory.kind, memory.rank, memory.alpha, memory.layer_fraction) == ("lora", 32, 64.0, 0.1)
    assert (memory.inner_lr, memory.clip, memory.grad_clip) == (0.1, "local", 1.0)
    assert (memory.pre_anchor_scale, memory.objective) == (1.5, "cross_entropy")
    assert memory.target_modules == ("gate_proj", "up_proj", "down_proj")
    assert memory.dropout == 0  # ours, not the paper's
    assert memory == MemoryConfig()  # whose defaults are the paper's
    assert (training.learning_rate, training.lr_scheduler_type, training.warmup_ratio) == (2e-5, "cosine", 0.1)
    assert training.optim.startswith("adamw")
    assert (training.num_train_epochs, training.max_steps, training.eval_steps) == (5, -1, 0.1)
    assert (training.bf16, training.group_by_length, training.gradient_checkpointing) == (True, True, True)
    assert training.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert training.per_device_train_batch_size in (2, 4)
    assert training.engine == "zero2" and training.deepspeed is None, "in one process there is nothing to share out"
    assert (training.loss_norm_type, training.loss_weight_type) == ("token", "scheduler")
