"""The paper's models at full size, with random weights: a step, and how far it is from what the device could do.

`python -m benchmarks.full_size [RECIPE …] [--set key=value …]`, or `make bench-gpu`. Batch, length, precision, LoRA and
memory are the recipe's; weights that it would load in 4 bit are in its dtype. Writes reports/bench-gpu.json and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from dllm_memdlm.backbones import config_of, load_model, staged_backbone
from dllm_memdlm.backbones.sites import adapted_layers
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.dry_run import verdict
from dllm_memdlm.info import package_versions
from dllm_memdlm.planner import Plan, make_plan
from dllm_memdlm.recipe import Recipe, load_recipe

from . import steps
from .memory import peak_memory
from .report import Cell, Section, write
from .timing import rates, side_by_side

RECIPES = ("recipes/llada_moe.yaml", "recipes/llada2_mini.yaml")
#: What stands in for the weights.
RANDOM = ("model.path=null", "model.load_in_4bit=false")
#: A step, and nothing around it.
ALONE = ("training.gradient_accumulation_steps=1", "training.eval_strategy='no'", "training.disable_tqdm=true")
CPU = ("training.use_cpu=true",)
RATIO = 7  #: prompt tokens to one of the response
GIB = 2**30


def weights_read(model: nn.Module, memory: MemoryConfig, checkpointing: bool) -> int:
    """The fewest bytes of weights that a step has to read: each once a pass over its layer, and no activations.

    The trunk is passed forward, backward, and with checkpointing forward once more; in plain MDLM it is all layers but
    the last. Memory adds a forward pass for every state but the last, and two passes of the head for every inner step.
    """
    backbone = staged_backbone(model)
    boundary = adapted_layers(len(backbone.layers), memory).start if memory.enabled else len(backbone.layers) - 1
    inner_steps = memory.steps if memory.enabled else 0
    trunk, head = (
        sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
        for layers in (backbone.layers[:boundary], [*backbone.layers[boundary:], backbone.lm_head])
    )
    return (2 + checkpointing + max(0, inner_steps - 1)) * trunk + 2 * (1 + inner_steps) * head


def full_size(paths: Sequence[str], overrides: Sequence[str], repeats: int) -> Section:
    """Plain MDLM and MemDLM of every recipe. Raises ConfigError where one does not fit the device."""
    section = Section(
        title="A training step at full size",
        columns=[
            *("model", "step", "s", "tokens/s", "÷ plain"),
            *("TFLOP", "FLOP limit s", "GB", "byte limit s", "÷ the longer", "peak GiB", "planned"),
        ],
        note=f"Forward and backward, prompt:response {RATIO}:1, half of the response masked; random weights, medians "
        f"of {repeats} turns. TFLOP as the planner counts them; GB of weights, read as often as layers are passed, "
        "without activations; limits by what the device reaches in a large product and in a copy. Peaks, and planned "
        "ones, beyond the weights.",
    )
    for path in paths:
        recipe = load_recipe(path, [*RANDOM, *ALONE, *overrides])
        section.rows += _rows(Path(path).stem, recipe, repeats)
    return section


def _rows(name: str, recipe: Recipe, repeats: int) -> list[list[Cell]]:
    args, config, device = recipe.training, config_of(recipe.model), recipe.training.device
    batch, length = args.per_device_train_batch_size, recipe.data.max_length
    memories = {"plain": dataclasses.replace(recipe.memory, enabled=False), "MemDLM": recipe.memory}
    plans = {kind: _plan(dataclasses.replace(recipe, memory=memory), config) for kind, memory in memories.items()}
    with device:
        model = load_model(recipe.model, config, recipe.lora, seed=args.seed).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    cases = {}
    for kind, memory in memories.items():
        trainer = steps.trainer_of(model, memory, args)
        inputs = steps.batch_of(config.vocab_size, batch, length, RATIO, memory)
        cases[kind] = steps.ours(trainer, {key: value.to(device) for key, value in inputs.items()})
        cases[kind]()  # the first step of a model also packs its experts
    timed = side_by_side(cases, repeats)
    reached = rates(device, torch.bfloat16 if args.bf16 else getattr(torch, recipe.model.dtype))
    rows: list[list[Cell]] = []
    for kind, plan in plans.items():
        seconds, flops = timed[kind].seconds, plan.flops_memdlm if memories[kind].enabled else plan.flops_mdlm
        read = weights_read(model, memories[kind], args.gradient_checkpointing)
        limits = flops / reached.flops, read / reached.bytes
        planned = plan.peak - plan.at_peak["weights"] - plan.at_peak["optimizer"]
        rows.append(
            [
                *(f"{name}, {batch} × {length}", kind, seconds, round(batch * length / seconds)),
                *(timed[kind].ratio(timed["plain"]), flops / 1e12, limits[0], read / 1e9, limits[1]),
                *(seconds / max(limits), peak_memory(cases[kind], device) / GIB, planned / GIB),
            ]
        )
    return rows


def _plan(recipe: Recipe, config: Any) -> Plan:
    device = recipe.training.device
    plan = make_plan(recipe, config, response_share=0.5 / (RATIO + 1), device=device.type)
    if device.type == "cuda":
        held = torch.cuda.get_device_properties(device).total_memory
        if plan.peak > held:
            raise ConfigError(verdict(plan, recipe, held))
    return plan


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.full_size", description="Time training steps at full size.")
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), metavar="RECIPE", help=f"default: {RECIPES}")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="changes to every recipe")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: 5)")
    parser.add_argument("--cpu", action="store_true", help="on a CPU: small recipes, to try the benchmark itself")
    parser.add_argument("--output", type=Path, default=Path("reports"), help="where to write (default: reports)")
    args = parser.parse_args(argv)
    if not (args.cpu or torch.cuda.is_available()):
        parser.error(f"expected a CUDA device; torch {torch.__version__} finds none")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # of a log, where no table need be squeezed
    try:
        section = full_size(args.recipes, [*args.set, *CPU] if args.cpu else args.set, args.repeats)
    except ConfigError as error:
        parser.error(str(error))
    section.print(console)
    device = "CPU" if args.cpu else torch.cuda.get_device_name()
    about = {
        "machine": device,
        "versions": ", ".join(f"{name} {version}" for name, version in package_versions().items()),
    }
    for path in write([section], "Benchmarks at full size", about, args.output, "bench-gpu"):
        console.print(str(path), soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
