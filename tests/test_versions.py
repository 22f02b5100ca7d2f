"""Two releases of transformers, and the private parts of libraries: what moves there is noticed here."""

from __future__ import annotations

import ast
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import KINDS, tiny_config

import dllm_memdlm
from dllm_memdlm import versions
from dllm_memdlm.backbones import read_config
from dllm_memdlm.backbones.loading import model_class
from dllm_memdlm.config import ConfigError
from dllm_memdlm.training.recipe import build_recipe

SOURCES = sorted(Path(dllm_memdlm.__file__).parent.rglob("*.py"))
#: Classes that ours are made of, or that ours are given.
FOREIGN = (transformers.Trainer, transformers.PreTrainedModel, transformers.PretrainedConfig)
#: Documented though they begin with an underscore: named tuples', and os'.
PUBLIC = {"_asdict", "_fields", "_replace", "_exit"}


def training(**values: Any) -> Any:
    values = {"use_cpu": True, "bf16": False, "max_steps": 50, **values}
    recipe = {"model": {"architecture": "LlamaForCausalLM"}, "data": {"dataset": "x"}, "training": values}
    return build_recipe(recipe, "runs/x").training


def test_private_parts_are_where_they_were():
    objects = {"torch.nn.Module": torch.nn.Module, "transformers.TrainingArguments": training}  # whose own some are
    for path, reason in versions.PRIVATE.items():
        owner, name = path.rpartition(".")[::2]
        pkgutil.resolve_name(path) if owner not in objects else getattr(objects[owner](), name)
        assert reason, path


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def own_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def used_of_others(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Private names of other libraries that a module reads, sets, overrides or imports."""
    foreign = {name for thing in (*FOREIGN, torch.nn.Module(), training()) for name in dir(thing)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and (node.attr in foreign or node.attr not in own):
            names = [node.attr]
        elif isinstance(node, ast.ClassDef) and node.bases:
            defined = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
            defined += [t.id for part in node.body if isinstance(part, ast.Assign) for t in part.targets]
            names = [name for name in defined if name in foreign]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            names = names if any(map(private, names)) else []
            yield from ({names[-1]} if names else ())
            continue
        yield from filter(private, names)


def test_no_other_private_part_is_used():
    listed = {path.rpartition(".")[2] for path in versions.PRIVATE}
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    own = {name for tree in trees.values() for name in own_names(tree)}
    used = {path.name: set(used_of_others(tree, own)) for path, tree in trees.items()}
    assert {file: names - listed for file, names in used.items() if names - listed} == {}
    assert listed - set().union(*used.values()) == set()  # and what is listed is used


def test_a_recipe_says_warm_up_and_checkpointing_in_the_same_words():
    args = training(warmup_ratio=0.1, group_by_length=True, gradient_checkpointing=True)
    assert args.get_warmup_steps(50) == 5
    assert args.group_by_length and args.gradient_checkpointing
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert training(warmup_steps=7, warmup_ratio=0.1).get_warmup_steps(50) == 7
    assert training().get_warmup_steps(50) == 5  # dllm's default
    assert training(warmup_ratio=1.0).get_warmup_steps(50) == 50


@pytest.mark.skipif(not hasattr(transformers.TrainingArguments, "train_sampling_strategy"), reason="transformers 5's")
def test_the_newer_words_mean_the_same():
    assert training(train_sampling_strategy="group_by_length").group_by_length
    assert training(activation_checkpointing=True).gradient_checkpointing
    assert training(warmup_steps=0.2).get_warmup_steps(50) == 10
    with pytest.raises(ConfigError, match="train_sampling_strategy='sequential': expected random or group_by_length"):
        training(train_sampling_strategy="sequential")


@pytest.mark.parametrize("kind", KINDS)
def test_positions_turn_alike_however_a_config_says_it(kind, tmp_path):
    turned = 4 if kind == "llada2" else 8  # of the 8 features of a head
    expected = 777.0 ** -(torch.arange(0, turned, 2) / turned)
    names = ("rope_theta", "rope_scaling", "rope_parameters")
    values = {name: value for name, value in tiny_config(kind).to_dict().items() if name not in names}
    linear = {"rope_type": "linear", "factor": 4.0}
    for rope, factor in (
        ({"rope_theta": 777.0, "rope_scaling": None}, 1.0),
        ({"rope_parameters": {"rope_theta": 777.0, "rope_type": "default"}}, 1.0),
        ({"rope_theta": 777.0, "rope_scaling": linear}, 4.0),
        ({"rope_parameters": {"rope_theta": 777.0, **linear}}, 4.0),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | rope))
        config = read_config(str(tmp_path))
        frequencies = model_class(config.architectures[0])(config).model.rotary_emb.inv_freq
        torch.testing.assert_close(frequencies, expected / factor)
