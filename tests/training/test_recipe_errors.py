"""What does not fit into a recipe, and in which words it is refused."""

from __future__ import annotations

import dataclasses

import pytest
from recipe_files import SECTIONS, message, write

from dllm_memdlm.training.recipe import load_recipe


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("memry.rank=4", "unknown key memry; did you mean memory?"),
        ("optimizer.lr=4", "unknown key optimizer; known: model, data, training, lora, memory"),
        ("values.a=4", "unknown key values; known: model, data, training, lora, memory"),
        ("memory.inner_lrr=4", "unknown key memory.inner_lrr; did you mean memory.inner_lr?"),
        ("model.pth=4", "unknown key model.pth; did you mean model.path?"),
        ("lora.rank=4", "unknown key lora.rank; known: enabled, r, alpha, dropout, target_modules, bias, path"),
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
        ("model.dtype=float8", "model.dtype='float8': expected one of auto, float32, bfloat16, float16"),
        ("model.path=5", "model.path=5: expected text or none"),
        ("model.dimensions=5", "model.dimensions=5: expected mapping"),
        ("lora.r=0", "lora.r=0: expected at least 1"),
        ("lora.path=x", "lora.path='x': expected a model.path, of the base that it was made for"),
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
