"""Two releases of transformers, and the private parts of libraries: what moves there is noticed here."""

from __future__ import annotations

import ast
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import KINDS, SHIFTED, tiny_config

import dllm_memdlm
from dllm_memdlm import versions
from dllm_memdlm.backbones import read_config
from dllm_memdlm.backbones.loading import model_class
from dllm_memdlm.config import ConfigError
from dllm_memdlm.training.recipe import build_recipe

SOURCES = sorted(Path(dllm_memdlm.__file__).parent.rglob("*.py"))


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


def test_no_other_private_part_is_used():
    """None that is read, imported or overridden; and what is listed is used."""
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assigned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    own = defined | assigned | {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    imported = {n.names[-1].name for n in imports if re.search(r"\._[^_]", f".{n.module}.{n.names[-1].name}")}
    parts = [part for node in nodes if isinstance(node, ast.ClassDef) and node.bases for part in node.body]
    overridden = {part.name for part in parts if isinstance(part, ast.FunctionDef)}
    overridden |= {target.id for part in parts if isinstance(part, ast.Assign) for target in part.targets}
    theirs = (transformers.Trainer, transformers.PreTrainedModel, transformers.PretrainedConfig)
    foreign = {name for thing in (*theirs, torch.nn.Module(), training()) for name in dir(thing)}
    used = {node.attr for node in attributes if node.attr not in own}
    used |= foreign & ({node.attr for node in attributes} | overridden)
    used = {name for name in used if re.match("_[^_]", name)} - {"_asdict", "_fields", "_replace", "_exit"}  # public
    assert used | imported == {path.rpartition(".")[2] for path in versions.PRIVATE}


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


@pytest.mark.parametrize("kind", [*KINDS, SHIFTED])
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
