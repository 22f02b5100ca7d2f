"""What a recipe would train, what that takes and what is missing for it, without weights, data, network or GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from ..backbones import config_of, staged_backbone
from ..config import ConfigError
from ..data import load_rows
from ..method.inner_loop import ParametricMemory
from .planner import RESPONSE_SHARE, Plan, advice, make_plans, parse_memory, shape_model
from .recipe import Recipe

GIB = 2**30


def planned_for(gpus: str | None, memory: str | None, response_share: str | None) -> dict[str, Any]:
    """Return arguments of `dry_run` for the texts of these flags. Raises ConfigError for what they cannot be."""
    gpus = os.environ.get("WORLD_SIZE", "1") if gpus is None else gpus
    if not gpus.isdecimal() or int(gpus) < 1:
        raise ConfigError(f"--gpus {gpus!r}: expected a whole number, at least 1")
    share = str(RESPONSE_SHARE) if response_share is None else response_share
    if not re.fullmatch(r"0?\.\d+|1(\.0*)?", share) or float(share) == 0:
        raise ConfigError(f"--response-share {share!r}: expected a number above 0, at most 1")
    size = None if memory is None else parse_memory(memory)
    return {"gpus": int(gpus), "memory": size, "response_share": float(share)}


def dry_run(recipe: Recipe, gpus: int = 1, memory: int | None = None, response_share: float = RESPONSE_SHARE) -> None:
    """Print the resolved recipe, the model's parameters, the sites of the fast weights, and what a step takes.

    Args:
        recipe: what would be trained.
        gpus: processes, each with a GPU.
        memory: bytes of one GPU; none gives no verdict.
        response_share: part of an example's tokens that is masked.

    Raises:
        ConfigError: something that training needs is missing. What could be printed has been.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(recipe.to_yaml())
    config, source = find_config(recipe)
    model = shape_model(recipe, config)
    if recipe.memory.enabled:
        fast = ParametricMemory(model, recipe.memory, mask_token_id=0)
        linears = sum(shape.experts or 1 for shape in fast.shapes)
        where = f"from layer {fast.boundary} of {len(staged_backbone(model).layers)} on"
        console.print(f"Fast weights: {len(fast.shapes)} sites, {linears:,} linear layers, {where}")
        rows = [
            (s.name, s.experts or "-", f"{s.in_features} → {s.out_features}", f"{s.numel(fast.config):,}")
            for s in fast.shapes
        ]
        console.print(_table(("site", "experts", "in → out", "fast weights"), rows))
    plan = make_plans(recipe, config, gpus, response_share, model=model)[recipe.memory.enabled]
    console.print(f"Parameters ({source})")
    counts = {"all": plan.parameters, "active": plan.active, "trainable": plan.trainable}
    numbers = {name: f"{count:,}" for name, count in counts.items()}
    numbers["fast weights, each sample"] = f"{plan.fast:,}" if plan.fast else "0 (memory is off)"
    console.print(_table(("what", "number"), numbers.items()))
    _print_plan(console, plan, recipe)
    missing, examples = missing_parts(recipe)
    console.print(f"Steps: {steps_of(recipe, plan, examples)}")
    if memory is not None:
        console.print(verdict(plan, recipe, memory))
    if missing:
        raise ConfigError("missing: " + "; ".join(missing))
    console.print("nothing is missing")


def _print_plan(console: Console, plan: Plan, recipe: Recipe) -> None:
    gpus = "1 GPU" if plan.gpus == 1 else f"{plan.gpus} GPUs, {plan.engine}"
    console.print(f"Memory of a GPU in GiB ({gpus}; most at once: {plan.moment})")
    kinds = [name for name in plan.at_peak if plan.largest[name]]
    rows = [(name, f"{plan.at_peak[name] / GIB:,.3f}", f"{plan.largest[name] / GIB:,.3f}") for name in kinds]
    rows.append(("together", f"{plan.peak / GIB:,.3f}", ""))
    console.print(_table(("what", "at the peak", "at its own highest"), rows))
    console.print(
        f"Each step: {plan.tokens:,} tokens, {plan.samples} examples of {plan.length:,}; "
        f"{plan.flops_mdlm / 1e12:,.4g} TFLOP with MDLM, {plan.flops_memdlm / 1e12:,.4g} with MemDLM "
        f"(× {plan.flops_memdlm / plan.flops_mdlm:.2f})"
    )
    answer = f"the last {plan.response:,} masked" if recipe.data.mask_prompt else "all masked"
    console.print(
        f"Assumed: every example has {plan.length:,} tokens, {answer}; experts get equal numbers of tokens. "
        "Not included: CUDA's own memory and fragmentation (allow 2 GiB)."
    )


def _table(columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> Table:
    """Names on the left, numbers on the right."""
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*map(str, row))
    return table


def steps_of(recipe: Recipe, plan: Plan, examples: int | None) -> str:
    """Optimizer steps, in words. `examples`: those to train on, before the length filter, if they are at hand."""
    args = recipe.training
    if args.max_steps > 0:
        return f"{args.max_steps:,}"
    if examples is None:
        return "unknown: training.max_steps is not set, and the data is not at hand"
    steps = math.ceil(args.num_train_epochs * max(1, examples // plan.samples))
    return f"about {steps:,} ({args.num_train_epochs:g} epochs of {examples:,} examples; long ones would be dropped)"


def verdict(plan: Plan, recipe: Recipe, memory: int) -> str:
    """One line: whether it fits, by how much, and else what to change first."""
    spare = memory - plan.peak
    sizes = f"{plan.peak / GIB:.1f} of {memory / GIB:.1f} GiB"
    if spare < 0:
        return f"does not fit: {sizes}, {-spare / GIB:.1f} GiB too much; first try {advice(plan, recipe)}"
    tight = "; tight" if spare < 2 * GIB else ""
    return f"fits: {sizes}, {spare / GIB:.1f} GiB to spare{tight}"


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


def missing_parts(recipe: Recipe) -> tuple[list[str], int | None]:
    """What training would not find, in words, and the number of rows to train on, if they are at hand."""
    model, missing, rows = recipe.model, [], None
    if model.path is not None and not _at_hand(model.path, "model.safetensors", "model.safetensors.index.json"):
        missing.append(f"weights of model.path={model.path!r}")
    tokenizer = model.tokenizer or model.path
    if tokenizer is not None and not _at_hand(tokenizer, "tokenizer.json", "tokenizer.model", "vocab.json"):
        missing.append(f"tokenizer {tokenizer!r}")
    if model.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        missing.append("bitsandbytes, for model.load_in_4bit (pip install bitsandbytes)")
    if recipe.lora.path is not None and not _at_hand(recipe.lora.path, "adapter_model.safetensors"):
        missing.append(f"adapter lora.path={recipe.lora.path!r}")
    here = {name: part for name, part in recipe.data.parts().items() if not _on_hub(name, "dataset")}
    try:
        counts = [len(load_rows(dataclasses.replace(part, streaming=False))[0].rows) for part in here.values()]
    except ConfigError as error:
        missing.append(str(error))
    else:
        rows = sum(counts) if len(counts) == len(recipe.data.parts()) else None
    return missing, rows


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
