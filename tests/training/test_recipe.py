"""Recipes: `extends`, overrides, and the resolved recipe."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from recipe_files import BASE, SECTIONS, assert_same, message, write

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.training.recipe import load_recipe, resolve

# --- extends -----------------------------------------------------------------------------------------------------


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
    model = "{architecture: LLaDAMoEModelLM, dimensions: {hidden_size: 32, num_experts: 4}}"
    write(tmp_path / "wide.yaml", f"extends: base.yaml\nmodel: {model}\nmemory: {{target_modules: [a, b, c]}}\n")
    top = write(
        tmp_path / "top.yaml",
        "extends: wide.yaml\nmodel: {dimensions: {hidden_size: 64}}\nmemory: {target_modules: [d]}\n",
    )
    recipe = load_recipe(top)
    assert recipe.model.dimensions == {"hidden_size": 64, "num_experts": 4}
    assert recipe.memory.target_modules == ("d",)


def test_an_empty_section_means_the_defaults(tmp_path, base):
    recipe = load_recipe(write(tmp_path / "x.yaml", "extends: base.yaml\nmemory:\n"))
    assert recipe.memory == MemoryConfig()


def test_a_circle_is_told_in_its_order(tmp_path):
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: c.yaml\n")
    write(tmp_path / "c.yaml", "extends: a.yaml\n")
    assert message(tmp_path / "a.yaml") == "extends: a.yaml → b.yaml → c.yaml → a.yaml is a circle"
    own = write(tmp_path / "own.yaml", "extends: own.yaml\n")
    assert message(own) == "extends: own.yaml → own.yaml is a circle"


def test_a_missing_file(tmp_path):
    assert message(tmp_path / "none.yaml") == f"no such recipe file: {tmp_path / 'none.yaml'}"
    top = write(tmp_path / "top.yaml", "extends: gone/none.yaml\n")
    assert message(top) == f"no such recipe file: {tmp_path / 'gone' / 'none.yaml'}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("memory: [1, 2\n", "not a readable YAML file: while parsing a flow sequence"),
        ("memory: {rank: 1}\nmemory: {rank: 2}\n", "not a readable YAML file: "),
        ("5\n", "not a readable YAML file: "),
        ("\x00", "not a readable YAML file: unacceptable character"),
        ("- memory\n- model\n", "expected a mapping of sections (model, data, training, lora, memory)"),
        ("", "model: neither path nor architecture is set; give one of them"),
    ],
)
def test_what_is_no_mapping_in_yaml(text, says, tmp_path):
    assert says in message(write(tmp_path / "x.yaml", text))


def test_bytes_and_folders_are_not_recipes(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("name: Größe\n".encode("latin-1"))
    for path in (tmp_path / "latin.yaml", tmp_path):
        assert message(path).startswith("not a readable YAML file: ")


@pytest.mark.parametrize("value", ["5", "[base.yaml]", "{a: 1}"])
def test_extends_that_is_no_file_name(value, tmp_path, base):
    assert message(write(tmp_path / "x.yaml", f"extends: {value}\n")).startswith("extends=")


# --- overrides ---------------------------------------------------------------------------------------------------


def test_overrides_win_and_are_read_as_yaml(tmp_path, base):
    top = write(tmp_path / "top.yaml", "extends: base.yaml\nmemory: {rank: 16}\n")
    overrides = [
        "memory.rank=4",
        "memory.inner_lr=5e-2",
        "memory.enabled=false",
        "memory.target_modules=[up_proj, down_proj]",
        "data.split=train=1",  # the first equals sign ends the key
        "data.eval_split=null",
        "model.dimensions.hidden_size=32",
        "training.learning_rate=1",
        "training.output_dir=/somewhere/else",
    ]
    recipe = load_recipe(top, overrides)
    memory = MemoryConfig(rank=4, inner_lr=0.05, enabled=False, target_modules=("up_proj", "down_proj"))
    assert recipe.memory == memory
    assert (recipe.data.split, recipe.data.eval_split) == ("train=1", None)
    assert recipe.model.dimensions == {"hidden_size": 32}
    assert (recipe.training.learning_rate, recipe.training.output_dir) == (1, "/somewhere/else")
    assert load_recipe(base, ["memory.rank=4", "memory.rank=6"]).memory.rank == 6


@pytest.mark.parametrize("override", ["memory.rank", "=3", "--rank", "memory.rank:4"])
def test_an_override_without_key_or_value(override, base):
    expected = f"override {override!r}: expected section.key=value, such as memory.inner_lr=0.05"
    assert message(base, override) == expected


@pytest.mark.parametrize("override", ["memory.rank=[", "memory.target_modules=[a,", "data.split='a"])
def test_an_override_that_is_not_yaml(override, base):
    assert override in message(base, override)


def test_an_interpolation_that_leads_nowhere(base):
    assert message(base, "memory.rank=${nothing.there}") == "Interpolation key 'nothing.there' not found"
    assert load_recipe(base, ["memory.rank=${training.max_steps}"]).memory.rank == 5


# --- the resolved recipe -----------------------------------------------------------------------------------------


SETTINGS: list[tuple[str, ...]] = [
    (),
    ("memory.target_modules=[up_proj, down_proj]", "memory.enabled=false", "lora.target_modules=[q_proj]"),
    ("model.dimensions={hidden_size: 64, moe_layer_freq: [0, 1], rope_scaling: {type: linear, factor: 2.0}}",),
    ("data.dataset=Größe → 3.jsonl", "model.tokenizer='true'", "data.eval_split='null'"),
    ("training.learning_rate=1e-7", "training.seed=7", "training.warmup_ratio=0", "training.run_name='x: y'"),
    ("training.gradient_checkpointing=true", "training.save_strategy=epoch", "training.eval_steps=0.1"),
]


@pytest.mark.parametrize("overrides", SETTINGS)
def test_a_saved_recipe_loads_as_itself(overrides, base, tmp_path):
    recipe = load_recipe(base, overrides)
    recipe.save(tmp_path / "new" / "folder")
    saved = tmp_path / "new" / "folder" / "recipe.yaml"
    again = load_recipe(saved)
    assert_same(again, recipe)
    assert again.to_yaml() == recipe.to_yaml() == saved.read_text(encoding="utf-8")
    assert again.training.output_dir == "runs/base"  # of the file it came from, not of this one


def test_text_that_looks_like_a_number_is_saved_as_text(base, tmp_path):
    recipe = load_recipe(base, ["data.split='1e5'"])
    recipe.save(tmp_path / "new")
    assert_same(load_recipe(tmp_path / "new" / "recipe.yaml"), recipe)


def test_a_saved_recipe_has_every_setting_and_the_training_values_as_given(base):
    recipe = load_recipe(base)
    values = yaml.safe_load(recipe.to_yaml())
    assert list(values) == [*SECTIONS, "training"]
    for section in SECTIONS:
        assert list(values[section]) == [f.name for f in dataclasses.fields(getattr(recipe, section))]
    assert values["training"] == {
        "max_steps": 5,
        "bf16": False,
        "learning_rate": 0.001,
        "output_dir": "runs/base",
    }


def test_the_output_folder_is_named_after_the_file(tmp_path, base):
    named = write(tmp_path / "my.best.yaml", "extends: base.yaml\n")
    assert load_recipe(named).training.output_dir == "runs/my.best"
    given = write(tmp_path / "given.yaml", "extends: base.yaml\ntraining: {output_dir: out}\n")
    assert load_recipe(given).training.output_dir == "out"
    child = write(tmp_path / "child.yaml", "extends: given.yaml\n")
    assert load_recipe(child).training.output_dir == "out"


def test_resolving_leaves_no_trace_in_the_files(base):
    before = base.read_bytes()
    assert resolve(base, ["memory.rank=2"])["memory"] == {"inner_lr": 0.2, "rank": 2}
    load_recipe(base)
    assert base.read_bytes() == before
