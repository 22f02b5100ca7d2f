"""The paper's models at full size, with random weights: what a training step takes, and what it could.

`python -m benchmarks.full_size [RECIPE …] [--bits 16 4] [--set key=value …]`, or `make bench-gpu`. Batch, length,
precision, LoRA, memory and optimizer are the recipe's, and the trainer's own loop runs them. Writes bench-gpu.json and
bench-gpu.md anew after everything that it has measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dllm_memdlm.backbones import staged_backbone
from dllm_memdlm.backbones.sites import adapted_layers
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.machine import devices, package_versions
from dllm_memdlm.training.dry_run import verdict
from dllm_memdlm.training.planner import Plan
from dllm_memdlm.training.recipe import Recipe
from dllm_memdlm.training.trainer import MemDLMTrainer

from . import inference, models, report
from .device import finish
from .full_size_tables import GIB, PLAIN, Report
from .random_models import RATIO, plans_of, random_model, recipe_of
from .timing import rates
from .watch import NEEDED, Watched, watch

RECIPES = ("recipes/llada_moe.yaml", "recipes/llada2_mini.yaml")
#: Where time runs out, plain MDLM is what is missing.
KINDS = {True: "MemDLM", False: PLAIN}


def measure(name: str, recipe: Recipe, plans: dict[bool, Plan], tables: Report) -> list[str]:
    """MemDLM and plain MDLM of one recipe, then decoding. Returns what could not be measured, and why."""
    args, device, faults = recipe.training, recipe.training.device, []
    reached = rates(device, torch.bfloat16 if args.bf16 else getattr(torch, recipe.model.dtype))
    start = time.perf_counter()
    model = random_model(recipe)
    finish(device)
    tables.loading.rows.append([name, time.perf_counter() - start, *_held(device), None])
    tables.save(f"{name}: model")
    for on, kind in KINDS.items():
        memory = dataclasses.replace(recipe.memory, enabled=on)
        read = weights_read(model, memory, args.gradient_checkpointing)
        known = ([name, kind], args.train_batch_size * recipe.data.max_length, read, reached, plans.get(on))
        found = trained(model, recipe, memory, partial(tables.note, *known))
        tables.loading.rows[-1][-1] = _held(device)[1]
        faults += [f"{name}, {kind}: {fault}" for fault in found.faults]
    if not recipe.model.load_in_4bit:
        faults += inference.measure(name, model, recipe, tables.inference, tables.save)
    return faults


def trained(
    model: nn.Module, recipe: Recipe, memory: MemoryConfig, note: Callable[[Watched], None] = lambda found: None
) -> Watched:
    """A run of a few steps on random examples. `note` gets what there is, as soon as it is there.

    Raises:
        RuntimeError: the recipe asks for bfloat16, and the layers did not compute under autocast.
    """
    args, generator = recipe.training, torch.Generator(device="cpu").manual_seed(1)
    vocabulary, length = staged_backbone(model).config.vocab_size, recipe.data.max_length
    tokens = torch.randint(3, vocabulary, (NEEDED * args.train_batch_size, length), generator=generator, device="cpu")
    labels = tokens.clone()
    labels[:, : length * RATIO // (RATIO + 1)] = -100
    rows = [{"input_ids": x, "labels": y} for x, y in zip(tokens.tolist(), labels.tolist(), strict=True)]

    def checked(found: Watched) -> None:
        if args.bf16 and found.autocast != {True}:
            raise RuntimeError("training.bf16=true, but the layers have computed without autocast")
        note(found)

    with tempfile.TemporaryDirectory() as folder:
        args.output_dir, args.max_steps = folder, NEEDED
        trainer = MemDLMTrainer(
            model, args, memory, data_collator=stacked, train_dataset=rows, processing_class=models.TOKENIZER
        )
        found = watch(trainer, checked)
    del trainer
    model.zero_grad()
    gc.collect()
    return found


def stacked(rows: list[dict[str, Any]], return_tensors: str = "pt") -> dict[str, Tensor]:
    """A batch of examples of one length."""
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def weights_read(model: nn.Module, memory: MemoryConfig, checkpointing: bool) -> int:
    """The fewest bytes of weights that a step has to read: each once a pass over its layer, and no activations.

    The prefix is passed forward, backward, and with checkpointing forward once more; in plain MDLM it is all layers but
    the last. Memory adds a forward pass for every state but the last, and two passes of the suffix for each inner step.
    """
    backbone = staged_backbone(model)
    boundary = adapted_layers(len(backbone.layers), memory).start if memory.enabled else len(backbone.layers) - 1
    inner_steps = memory.steps if memory.enabled else 0
    prefix, suffix = (
        sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
        for layers in (backbone.layers[:boundary], [*backbone.layers[boundary:], backbone.get_output_embeddings()])
    )
    return (2 + checkpointing + max(0, inner_steps - 1)) * prefix + 2 * (1 + inner_steps) * suffix


def _held(device: torch.device) -> tuple[float | None, float | None]:
    """GiB that tensors have, and that torch's allocator has taken."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.memory_allocated(device) / GIB, torch.cuda.memory_reserved(device) / GIB


def plans_for(name: str, recipe: Recipe, folder: Path | None, make: bool) -> dict[bool, Plan]:
    """The plans of a recipe: kept in the folder, or made and kept there, or none.

    Raises:
        ConfigError: the device has less memory than planned.
    """
    file = None if folder is None else folder / f"{name.replace(', ', '-').replace(' ', '')}.json"
    if make:
        plans = plans_of(recipe)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps([dataclasses.asdict(plans[on]) for on in (False, True)]))
    elif file is not None and file.exists():
        plans = dict(enumerate(Plan(**values) for values in json.loads(file.read_text())))
    else:
        return {}
    if recipe.training.device.type == "cuda":
        held = torch.cuda.get_device_properties(recipe.training.device).total_memory
        if plans[True].peak > held:
            raise ConfigError(verdict(plans[True], recipe, held))
    return plans


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.full_size", description="Time training steps at full size.")
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), metavar="RECIPE", help=f"default: {RECIPES}")
    parser.add_argument("--bits", nargs="+", type=int, choices=(16, 4), default=(16, 4), help="of the base's weights")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="changes to every recipe")
    parser.add_argument("--cpu", action="store_true", help="on a CPU, cut down: to try the benchmark itself")
    parser.add_argument("--plans", type=Path, metavar="FOLDER", help="take the plans from here, and make none")
    parser.add_argument("--plan-only", action="store_true", help="put the plans there, and measure nothing")
    parser.add_argument("--output", type=Path, default=Path("reports"), help="where to write (default: reports)")
    args = parser.parse_args(argv)
    if not (args.cpu or args.plan_only or torch.cuda.is_available()):
        parser.error(f"expected a CUDA device; torch {torch.__version__} finds none")
    console = report.console()
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    tables = Report(args.output, {"machine": devices()[0], "versions": versions})
    faults: list[str] = []
    try:
        for path, bits in itertools.product(args.recipes, args.bits):
            recipe, name = recipe_of(path, bits, args.set, small=args.cpu), f"{Path(path).stem}, {bits} bit"
            try:
                plans = plans_for(name, recipe, args.plans, make=args.plans is None or args.plan_only)
            except ConfigError:
                raise
            except Exception as error:  # a fault of the planner's must not cost the timings
                faults.append(f"{name}: no plan, {type(error).__name__}: {error}")
                plans = {}
            for on, plan in plans.items():
                console.print(f"{name}: {plan.peak / GIB:.1f} GiB planned for {KINDS[on]}", soft_wrap=True)
            if not args.plan_only:
                faults += measure(name, recipe, plans, tables)
                gc.collect()
    except ConfigError as error:
        parser.error(str(error))
    if not args.plan_only:
        for table in tables.tables():
            table.print(console)
        for path in tables.save("all"):
            console.print(str(path), soft_wrap=True)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
