"""Recipes: `extends`, overrides, what is refused and in which words, and the recipes of this repository."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.recipe import Recipe, load_recipe, resolve

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PAPER = ("llada_moe", "llada2_mini")
SECTIONS = ("model", "lora", "data", "memory")

BASE = """\
model: {architecture: LLaDAMoEModelLM, dtype: float32}
data: {dataset: rows.jsonl}
memory: {inner_lr: 0.2, rank: 8}
training: {max_steps: 5, bf16: false, learning_rate: 1e-3}
"""


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    """Training arguments leave their precision in the environment, from where the next ones would take it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture
def base(tmp_path) -> Path:
    return write(tmp_path / "base.yaml", BASE)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path, *overrides: str) -> str:
    """The text of the ConfigError, which must be one line that names the file; what follows the name."""
    with pytest.raises(ConfigError) as error:
        load_recipe(path, overrides)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


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


# --- what does not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("memry.rank=4", "unknown key memry; did you mean memory?"),
        ("optimizer.lr=4", "unknown key optimizer; known: model, data, training, lora, memory"),
        ("values.a=4", "unknown key values; known: model, data, training, lora, memory"),
        ("memory.inner_lrr=4", "unknown key memory.inner_lrr; did you mean memory.inner_lr?"),
        ("model.pth=4", "unknown key model.pth; did you mean model.path?"),
        ("lora.rank=4", "unknown key lora.rank; known: enabled, r, alpha, dropout, target_modules, bias"),
        ("data.max_len=4", "unknown key data.max_len; did you mean data.max_length?"),
        ("training.lerning_rate=1", "unknown key training.lerning_rate; did you mean training.learning_rate?"),
        ("training._n_gpu=2", "unknown key training._n_gpu; known: output_dir, "),  # not for a user to set
    ],
)
def test_unknown_keys_name_the_nearest(override, says, base):
    assert message(base, override).startswith(says)


def test_the_nearest_key_is_known(base):
    """Every key of every section, one letter too long, leads back to itself."""
    recipe = load_recipe(base)
    for section in SECTIONS:
        for key in (f.name for f in dataclasses.fields(getattr(recipe, section)) if len(f.name) > 2):
            assert message(base, f"{section}.{key}_=1").endswith(f"did you mean {section}.{key}?")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("memory=3", "memory=3: expected a mapping"),
        ("lora=[a]", "lora=['a']: expected a mapping"),
        ("memory.rank=four", "memory.rank='four': expected whole number"),
        ("memory.rank=4.5", "memory.rank=4.5: expected whole number"),
        ("memory.rank=true", "memory.rank=True: expected whole number"),
        ("memory.rank.x=4", "memory.rank={'x': 4}: expected whole number"),
        ("memory.enabled=1", "memory.enabled=1: expected true or false"),
        ("memory.inner_lr='0.1'", "memory.inner_lr='0.1': expected number"),
        ("memory.inner_lr=.nan", "memory.inner_lr=nan: expected number"),
        ("memory.target_modules=up_proj", "memory.target_modules='up_proj': expected list of text"),
        ("memory.strategy=anchor", "memory.strategy='anchor': expected one of anchor_consistent, inconsistent, "),
        ("memory.steps=0", "memory.steps=0: expected at least 1"),
        ("model.dtype=float8", "model.dtype='float8': expected one of float32, bfloat16, float16"),
        ("model.path=5", "model.path=5: expected text or none"),
        ("model.dimensions=5", "model.dimensions=5: expected mapping"),
        ("lora.r=0", "lora.r=0: expected at least 1"),
        ("lora.target_modules=5", "lora.target_modules=5: expected text or list of text"),
        ("data.max_length=long", "data.max_length='long': expected whole number"),
        ("data.dataset=null", "data.dataset=None: expected text"),
        ("data.eval_fraction=1", "data.eval_fraction=1.0: expected in [0, 1)"),
        ("training.max_steps=five", "training.max_steps='five': expected whole number"),
        ("training.max_steps=true", "training.max_steps=True: expected whole number"),
        ("training.max_steps=5.0", "training.max_steps=5.0: expected whole number"),
        ("training.learning_rate=fast", "training.learning_rate='fast': expected number"),
        ("training.learning_rate='2e-5'", "training.learning_rate='2e-5': expected number"),
        ("training.learning_rate=true", "training.learning_rate=True: expected number"),
        ("training.bf16=1", "training.bf16=1: expected true or false"),
        ("training.bf16='no'", "training.bf16='no': expected true or false"),
        ("training.output_dir=5", "training.output_dir=5: expected text"),
        ("training.seed=null", "training.seed=None: expected whole number"),
        ("training.loss_norm_type=tokens", "training.loss_norm_type='tokens': expected one of token, sequence, batch"),
        ("training.loss_weight_type=flat", "training.loss_weight_type='flat': expected one of scheduler, uniform"),
    ],
)
def test_values_of_another_type_or_out_of_range(override, says, base):
    text = message(base, override)
    assert text.startswith(says)
    assert text == says or says.endswith(", ")


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("training.save_strategy=sometimes", "sometimes is not a valid SaveStrategy"),
        ("training.lr_scheduler_type=cosin", "cosin is not a valid SchedulerType"),
        ("training.optim=sdg", "sdg is not a valid OptimizerNames"),
        ("training.logging_steps=0", "requires non-zero --logging_steps"),
        ("training.eval_delay=[1]", "training.eval_delay=[1]: expected number"),
        ("training.load_best_model_at_end=true training.save_strategy=epoch", "requires the save and eval strategy"),
    ],
)
def test_what_transformers_refuses_is_one_line(override, names, base):
    text = message(base, *override.split(" "))
    assert text.startswith("training")
    assert names in text


def test_a_list_over_a_section_that_is_there(tmp_path, base):
    assert message(base, "training=[a]") == "training=['a']: expected a mapping"
    assert message(write(tmp_path / "x.yaml", "extends: base.yaml\nmemory: [a]\n")).endswith("expected a mapping")


@pytest.mark.parametrize("name", ["eval_strategy", "save_strategy", "logging_strategy"])
def test_a_strategy_can_be_switched_off_without_quotes(name, base):
    assert getattr(load_recipe(base, [f"training.{name}='no'"]).training, name) == "no"
    assert getattr(load_recipe(base, [f"training.{name}=no"]).training, name) == "no"


def test_whole_numbers_serve_as_numbers(base):
    recipe = load_recipe(base, ["training.num_train_epochs=2", "memory.inner_lr=1", "training.eval_steps=5"])
    assert (recipe.training.num_train_epochs, recipe.memory.inner_lr, recipe.training.eval_steps) == (2, 1.0, 5)


# --- the resolved recipe -----------------------------------------------------------------------------------------


def assert_same(first: Recipe, second: Recipe) -> None:
    for section in SECTIONS:
        assert getattr(first, section) == getattr(second, section), section
    # the folder for logs is named after the time
    one, other = ({**r.training.to_dict(), "logging_dir": None} for r in (first, second))
    assert one == other


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


# --- the recipes of this repository --------------------------------------------------------------------------------


def names_of(pattern: str) -> list[str]:
    return sorted(path.stem for path in RECIPES.glob(pattern))


def values_of(name: str) -> dict[str, Any]:
    return yaml.safe_load(load_recipe(RECIPES / f"{name}.yaml").to_yaml())


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_round_trips(path, tmp_path):
    text = path.read_text(encoding="utf-8")
    if "model:" not in text and "extends:" not in text:
        pytest.skip("a configuration of another program")
    recipe = load_recipe(path)
    recipe.save(tmp_path)
    assert_same(load_recipe(tmp_path / "recipe.yaml"), recipe)
    relative = path.relative_to(RECIPES.parent)
    assert text.startswith(f"# accelerate launch -m dllm_memdlm.train {relative}\n"), "its command comes first"


def test_there_is_a_baseline_for_each_model():
    assert {"tiny_llada_moe", "tiny_llada2", *PAPER} <= {name.removesuffix("_mdlm") for name in names_of("*_mdlm.yaml")}


@pytest.mark.parametrize("name", names_of("*_mdlm.yaml"))
def test_a_baseline_differs_in_the_memory_only(name):
    mdlm, memdlm = values_of(name), values_of(name.removesuffix("_mdlm"))
    assert memdlm["memory"].pop("enabled") is True
    assert mdlm["memory"].pop("enabled") is False
    assert memdlm["training"].pop("output_dir") == f"runs/{name.removesuffix('_mdlm')}"
    assert mdlm["training"].pop("output_dir") == f"runs/{name}"
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
    assert (memory.pre_anchor_scale, memory.objective, memory.layers) == (1.5, "cross_entropy", "last")
    assert memory.target_modules == ("gate_proj", "up_proj", "down_proj")
    assert memory.dropout == 0  # ours, not the paper's
    assert memory == MemoryConfig()  # whose defaults are the paper's
    assert (training.learning_rate, training.lr_scheduler_type, training.warmup_ratio) == (2e-5, "cosine", 0.1)
    assert training.optim.startswith("adamw")
    assert (training.num_train_epochs, training.max_steps, training.eval_steps) == (5, -1, 0.1)
    assert (training.bf16, training.group_by_length, training.gradient_checkpointing) == (True, True, True)
    assert training.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert training.per_device_train_batch_size in (2, 4)
    assert (training.loss_norm_type, training.loss_weight_type) == ("token", "scheduler")


@pytest.mark.parametrize("name", [n for n in names_of("tiny_*.yaml") if not n.endswith("_mdlm")])
def test_tiny_recipes_train_from_scratch_with_memory_dropout(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert (recipe.model.path, recipe.model.dtype, recipe.lora.enabled) == (None, "float32", False)
    assert 0 < recipe.memory.dropout < 1
    assert not recipe.training.bf16
