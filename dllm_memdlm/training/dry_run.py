"""What a recipe would train, what that takes and what is missing for it, without weights, data, network or GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a recipe is planned for."""

    gpus: int = 1  #: processes, each with a GPU
    memory: int | None = None  #: bytes of one GPU; none gives no verdict
    response_share: float = RESPONSE_SHARE  #: of an example's tokens

    @classmethod
    def from_arguments(cls, gpus: str | None, memory: str | None, response_share: str | None) -> Machine:
        """From the texts of `--gpus`, `--memory` and `--response-share`. Raises ConfigError for what they cannot be."""
        gpus = os.environ.get("WORLD_SIZE", "1") if gpus is None else gpus
        if not gpus.isdecimal() or int(gpus) < 1:
            raise ConfigError(f"--gpus {gpus!r}: expected a whole number, at least 1")
        share = str(RESPONSE_SHARE) if response_share is None else response_share
        if not re.fullmatch(r"0?\.\d+|1(\.0*)?", share) or float(share) == 0:
            raise ConfigError(f"--response-share {share!r}: expected a number above 0, at most 1")
        size = None if memory is None else parse_memory(memory)
        return cls(gpus=int(gpus), memory=size, response_share=float(share))


def dry_run(recipe: Recipe, machine: Machine | None = None, console: Console | None = None) -> None:
    """Print the resolved recipe, the model's parameters, the sites of the fast weights, and what a step takes.

    Raises:
        ConfigError: something that training needs is missing. What could be printed has been.
    """
    console, machine = console or Console(highlight=False, markup=False), machine or Machine()
    console.print(recipe.to_yaml(), soft_wrap=True)
    config, source = find_config(recipe)
    model = shape_model(recipe, config)
    if recipe.memory.enabled:
        memory = ParametricMemory(model, recipe.memory, mask_token_id=0)
        linears = sum(shape.experts or 1 for shape in memory.shapes)
        where = f"from layer {memory.boundary} of {len(staged_backbone(model).layers)} on"
        console.print(f"Fast weights: {len(memory.shapes)} sites, {linears:,} linear layers, {where}", soft_wrap=True)
        console.print(sites_table(memory))
    plan = make_plans(recipe, config, machine.gpus, machine.response_share, model=model)[recipe.memory.enabled]
    console.print(f"Parameters ({source})", soft_wrap=True)
    console.print(parameters_table(plan))
    _print_plan(console, plan, recipe)
    missing, rows = missing_parts(recipe)
    console.print(f"Steps: {steps_of(recipe, plan, rows)}", soft_wrap=True)
    if machine.memory is not None:
        console.print(verdict(plan, recipe, machine.memory), soft_wrap=True)
    if missing:
        raise ConfigError("missing: " + "; ".join(missing))
    console.print("nothing is missing")


def _print_plan(console: Console, plan: Plan, recipe: Recipe) -> None:
    gpus = "1 GPU" if plan.gpus == 1 else f"{plan.gpus} GPUs, {plan.engine}"
    console.print(f"Memory of a GPU in GiB ({gpus}; most at once: {plan.moment})", soft_wrap=True)
    console.print(memory_table(plan))
    console.print(
        f"Each step: {plan.tokens:,} tokens, {plan.samples} examples of {plan.length:,}; "
        f"{plan.flops_mdlm / 1e12:,.4g} TFLOP with MDLM, {plan.flops_memdlm / 1e12:,.4g} with MemDLM "
        f"(× {plan.flops_memdlm / plan.flops_mdlm:.2f})",
        soft_wrap=True,
    )
    answer = f"the last {plan.response:,} masked" if recipe.data.mask_prompt else "all masked"
    console.print(
        f"Assumed: every example has {plan.length:,} tokens, {answer}; experts get equal numbers of tokens. "
        "Not included: CUDA's own memory and fragmentation (allow 2 GiB).",
        soft_wrap=True,
    )


def steps_of(recipe: Recipe, plan: Plan, rows: int | None) -> str:
    """Optimizer steps, in words. `rows`: training examples before the length filter, if they are at hand."""
    args = recipe.training
    if args.max_steps > 0:
        return f"{args.max_steps:,}"
    if rows is None:
        return "unknown: training.max_steps is not set, and the data is not at hand"
    steps = math.ceil(args.num_train_epochs * max(1, rows // plan.samples))
    return f"about {steps:,} ({args.num_train_epochs:g} epochs of {rows:,} examples; long ones would be dropped)"


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


def parameters_table(plan: Plan) -> Table:
    """Parameters of the model, those a token passes through, those that train, and the fast weights of one sample."""
    table = Table()
    table.add_column("what")
    table.add_column("number", justify="right")
    table.add_row("all", f"{plan.parameters:,}")
    table.add_row("active", f"{plan.active:,}")
    table.add_row("trainable", f"{plan.trainable:,}")
    table.add_row("fast weights, each sample", f"{plan.fast:,}" if plan.fast else "0 (memory is off)")
    return table


def memory_table(plan: Plan) -> Table:
    """Bytes of one GPU by what they are for."""
    table = Table()
    table.add_column("what", no_wrap=True)
    table.add_column("at the peak", justify="right")
    table.add_column("at its own highest", justify="right")
    for name, size in plan.at_peak.items():
        if plan.largest[name] == 0:
            continue
        table.add_row(name, f"{size / GIB:,.3f}", f"{plan.largest[name] / GIB:,.3f}")
    table.add_row("together", f"{plan.peak / GIB:,.3f}", "")
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


def missing_parts(recipe: Recipe) -> tuple[list[str], int | None]:
    """What training would not find, in words: weights, tokenizer, data, packages; and the training rows, if at hand."""
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
    if not _on_hub(recipe.data.dataset, "dataset"):
        try:
            rows = len(load_rows(recipe.data)[0].rows)
        except ConfigError as error:
            missing.append(str(error))
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
