"""Recipes: `extends`, overrides, the saved recipe, and those of this repository. What is refused: bad_training.py."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import yaml
from recipe_files import BASE, SECTIONS, assert_same, write

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.training.recipe import Recipe, load_recipe


def test_a_chain_is_followed_relative_to_each_file(tmp_path, monkeypatch):
    """Three folders, and a working folder that is none of them."""
    write(tmp_path / "a" / "base.yaml", BASE)
    write(tmp_path / "b" / "middle.yaml", "extends: ../a/base.yaml\nmemory: {rank: 16, alpha: 32}\n")
    top = write(tmp_path / "b" / "c" / "top.yaml", "extends: ../middle.yaml\nmemory: {alpha: 4}\n")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(top)
    assert (recipe.memory.inner_lr, recipe.memory.rank, recipe.memory.alpha) == (0.2, 16, 4.0)
    assert (recipe.model.dtype, recipe.data.dataset, recipe.training.max_steps) == ("float32", "rows.jsonl", 5)
    assert "extends" not in recipe.values
    absolute = write(tmp_path / "top.yaml", f"extends: {tmp_path / 'a' / 'base.yaml'}\n")
    assert load_recipe(absolute).memory == MemoryConfig(inner_lr=0.2, rank=8)


def test_nested_mappings_are_merged_and_lists_are_replaced(tmp_path, base):
    """And an empty section means the defaults."""
    model = "{architecture: LLaDAMoEModelLM, dimensions: {hidden_size: 32, num_experts: 4}}"
    write(tmp_path / "wide.yaml", f"extends: base.yaml\nmodel: {model}\nmemory: {{target_modules: [a, b, c]}}\n")
    changes = "model: {dimensions: {hidden_size: 64}}\nmemory: {target_modules: [d]}\n"
    recipe = load_recipe(write(tmp_path / "top.yaml", f"extends: wide.yaml\n{changes}"))
    assert recipe.model.dimensions == {"hidden_size": 64, "num_experts": 4}
    assert recipe.memory.target_modules == ("d",)
    assert load_recipe(write(tmp_path / "x.yaml", "extends: base.yaml\nmemory:\n")).memory == MemoryConfig()


def test_overrides_win_and_are_read_as_yaml(tmp_path, base):
    top = write(tmp_path / "top.yaml", "extends: base.yaml\nmemory: {rank: 16}\n")
    memory = ["memory.rank=4", "memory.inner_lr=5e-2", "memory.enabled=false"]
    data = ["data.split=train=1", "data.eval_split=null"]  # the first equals sign ends the key
    training = ["training.learning_rate=1", "training.output_dir=/somewhere/else"]
    listed = ["memory.target_modules=[up_proj, down_proj]", "model.dimensions.hidden_size=32"]
    recipe = load_recipe(top, [*memory, *data, *training, *listed])
    targets = ("up_proj", "down_proj")
    assert recipe.memory == MemoryConfig(rank=4, inner_lr=0.05, enabled=False, target_modules=targets)
    assert (recipe.data.split, recipe.data.eval_split) == ("train=1", None)
    assert recipe.model.dimensions == {"hidden_size": 32}
    assert (recipe.training.learning_rate, recipe.training.output_dir) == (1, "/somewhere/else")
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):  # with or without quotes
        for no in ("'no'", "no"):
            assert getattr(load_recipe(base, [f"training.{name}={no}"]).training, name) == "no"
    assert load_recipe(base, ["memory.rank=4", "memory.rank=${training.max_steps}"]).memory.rank == 5


SETTINGS: list[tuple[str, ...]] = [
    (),
    ("memory.target_modules=[up_proj, down_proj]", "memory.enabled=false", "lora.target_modules=[q_proj]"),
    ("model.dimensions={hidden_size: 64, moe_layer_freq: [0, 1], rope_scaling: {type: linear, factor: 2.0}}",),
    ("data.dataset=Größe → 3.jsonl", "model.tokenizer='true'", "data.eval_split='null'", "data.split='1e5'"),
    ("training.learning_rate=1e-7", "training.seed=7", "training.warmup_ratio=0", "training.run_name='x: y'"),
    ("training.gradient_checkpointing=true", "training.save_strategy=epoch", "training.eval_steps=0.1"),
]


@pytest.mark.parametrize("overrides", SETTINGS)
def test_a_saved_recipe_loads_as_itself(overrides, base, tmp_path):
    """It has every setting, but of training those that were given."""
    recipe, before = load_recipe(base, overrides), base.read_bytes()
    recipe.save(tmp_path / "new" / "folder")
    saved = tmp_path / "new" / "folder" / "recipe.yaml"
    again = load_recipe(saved)
    assert_same(again, recipe)
    assert again.to_yaml() == recipe.to_yaml() == saved.read_text(encoding="utf-8")
    assert again.training.output_dir == "runs/base"  # of the file it came from, not of this one
    assert base.read_bytes() == before
    values = yaml.safe_load(recipe.to_yaml())
    assert list(values) == [*SECTIONS, "training"]
    for section in SECTIONS:
        assert list(values[section]) == [f.name for f in dataclasses.fields(getattr(recipe, section))]
    given = {"max_steps": 5, "bf16": False, "learning_rate": 0.001, "output_dir": "runs/base"}
    assert overrides or values["training"] == given


def test_the_output_folder_is_named_after_the_file(tmp_path, base):
    named = write(tmp_path / "my.best.yaml", "extends: base.yaml\n")
    assert load_recipe(named).training.output_dir == "runs/my.best"
    write(tmp_path / "given.yaml", "extends: base.yaml\ntraining: {output_dir: out}\n")
    child = write(tmp_path / "child.yaml", "extends: given.yaml\n")
    assert load_recipe(child).training.output_dir == "out"


RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FOLDERS = (RECIPES, *(RECIPES / name for name in ("cpu", "documents", "small", "ablations")))
PAPER = {"llada_moe": "inclusionAI/LLaDA-MoE-7B-A1B-Base", "llada2_mini": "inclusionAI/LLaDA2.1-mini"}
#: Of other models, with the same numbers.
ALIKE = {"dream_7b": "Dream-org/Dream-v0-Instruct-7B"}


def names_of(pattern: str) -> list[str]:
    """Without the suffix, and with the folder: `llada_moe`, `small/smollm2`."""
    paths = (path for folder in FOLDERS for path in folder.glob(pattern))
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in paths)


@functools.cache
def recipe_of(name: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml")


@pytest.mark.parametrize("name", names_of("*.yaml"))
def test_every_recipe_loads_and_round_trips(name, tmp_path):
    path, recipe = RECIPES / f"{name}.yaml", recipe_of(name)
    recipe.save(tmp_path)
    assert_same(load_recipe(tmp_path / "recipe.yaml"), recipe)
    command = f"# accelerate launch -m dllm_memdlm.train {path.relative_to(RECIPES.parent)}\n"
    assert path.read_text(encoding="utf-8").startswith(command), "its command comes first"


@pytest.mark.parametrize("name", sorted({*names_of("*_mdlm.yaml"), *(f"{name}_mdlm" for name in PAPER | ALIKE)}))
def test_a_baseline_differs_in_the_memory_only(name):
    mdlm, memdlm = (yaml.safe_load(recipe_of(one).to_yaml()) for one in (name, name.removesuffix("_mdlm")))
    for values, enabled, own in ((memdlm, True, name.removesuffix("_mdlm")), (mdlm, False, name)):
        assert values["memory"].pop("enabled") is enabled
        assert values["training"].pop("output_dir") == f"runs/{Path(own).name}"
    assert mdlm == memdlm


@pytest.mark.parametrize(("name", "path"), (PAPER | ALIKE).items())
def test_the_papers_recipes_hold_its_numbers(name, path):
    recipe = recipe_of(name)
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
