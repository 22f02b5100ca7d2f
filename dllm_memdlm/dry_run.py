"""What a recipe would train, without weights, data, network or GPU; and which of these are missing."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PretrainedConfig

from .backbones import config_of, load_model, staged_backbone
from .config import ConfigError
from .data import load_rows
from .memory import ParametricMemory
from .recipe import Recipe


def dry_run(recipe: Recipe, console: Console | None = None) -> None:
    """Print the resolved recipe, the model's parameters, and the sites of the fast weights.

    Raises:
        ConfigError: something that training needs is missing. What could be printed has been.
    """
    console = console or Console(highlight=False, markup=False)
    console.print(recipe.to_yaml(), soft_wrap=True)
    config, source = find_config(recipe)
    # Only the shapes: on the meta device nothing is allocated, and no weight is read.
    architecture = (config.architectures or [recipe.model.architecture])[0]
    shape_only = dataclasses.replace(recipe.model, path=None, load_in_4bit=False, architecture=architecture)
    with torch.device("meta"):
        model = load_model(shape_only, config, recipe.lora)
    memory = ParametricMemory(model, recipe.memory, mask_token_id=0) if recipe.memory.enabled else None
    console.print(f"Parameters ({source})", soft_wrap=True)
    console.print(parameters_table(model, memory))
    if memory is not None:
        linears = sum(shape.experts or 1 for shape in memory.shapes)
        where = f"from layer {memory.boundary} of {len(staged_backbone(model).layers)} on"
        console.print(f"Fast weights: {len(memory.shapes)} sites, {linears:,} linear layers, {where}", soft_wrap=True)
        console.print(sites_table(memory))
    missing = list(missing_parts(recipe))
    if missing:
        raise ConfigError("missing: " + "; ".join(missing))
    console.print("nothing is missing")


def find_config(recipe: Recipe) -> tuple[PretrainedConfig, str]:
    """The model's config and where it comes from: config.json, or known dimensions where that is out of reach."""
    model = recipe.model
    if model.path is None:
        return config_of(model, vocab_size=model.tokenizer_vocab_size), "dimensions of the recipe, trained from scratch"
    try:
        return config_of(model), f"config.json of {model.path}"
    except ConfigError:
        if model.architecture is None:
            raise
        stand_in = dataclasses.replace(model, path=None, load_in_4bit=False)
        return config_of(stand_in), f"known dimensions of {model.architecture}, as config.json is out of reach"


def parameters_table(model: nn.Module, memory: ParametricMemory | None) -> Table:
    """Parameters of the model, those that train, and the fast weights of one sample."""
    table = Table()
    table.add_column("what")
    table.add_column("number", justify="right")
    table.add_row("all", f"{sum(p.numel() for p in model.parameters()):,}")
    table.add_row("trainable", f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}")
    table.add_row("fast weights, each sample", f"{memory.fast_parameters:,}" if memory else "0 (memory is off)")
    return table


def sites_table(memory: ParametricMemory) -> Table:
    """Where the fast weights are."""
    table = Table()
    table.add_column("site", no_wrap=True)
    for name in ("experts", "in → out", "fast weights"):
        table.add_column(name, justify="right")
    for shape in memory.shapes:
        sizes = f"{shape.in_features} → {shape.out_features}"
        table.add_row(shape.name, str(shape.experts or "-"), sizes, f"{shape.numel(memory.config):,}")
    return table


def missing_parts(recipe: Recipe) -> Iterator[str]:
    """What training would not find, in words: weights, tokenizer, data, packages."""
    model = recipe.model
    if model.path is not None and not _at_hand(model.path, "model.safetensors", "model.safetensors.index.json"):
        yield f"weights of model.path={model.path!r}"
    tokenizer = model.tokenizer or model.path
    if tokenizer is not None and not _at_hand(tokenizer, "tokenizer.json", "tokenizer.model", "vocab.json"):
        yield f"tokenizer {tokenizer!r}"
    if model.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        yield "bitsandbytes, for model.load_in_4bit (pip install bitsandbytes)"
    if not _on_hub(recipe.data.dataset, "dataset"):
        try:
            load_rows(recipe.data)
        except ConfigError as error:
            yield str(error)


def _at_hand(path: str, *names: str) -> bool:
    """Whether any of the files is in a local folder, in the hub's cache, or on a hub that answers."""
    if os.path.isdir(path):
        return any((Path(path) / name).is_file() for name in names)
    if os.path.isabs(path) or path.startswith((".", "~")):
        return False
    cached = (huggingface_hub.try_to_load_from_cache(path, name) for name in names)
    return any(isinstance(found, str) for found in cached) or _on_hub(path, "model")


def _on_hub(name: str, kind: str) -> bool:
    try:
        huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=10)
    except (OSError, ValueError):  # no network, not there, not allowed; not a repository's name
        return False
    return True
