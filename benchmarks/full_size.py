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
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from dllm_memdlm.backbones import staged_backbone
from dllm_memdlm.backbones.sites import adapted_layers
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.dry_run import verdict
from dllm_memdlm.info import devices, package_versions
from dllm_memdlm.planner import Plan
from dllm_memdlm.recipe import Recipe
from dllm_memdlm.trainer import MemDLMTrainer

from . import inference, models
from .device import finish
from .random_models import RATIO, plans_of, random_model, recipe_of
from .report import Section, write
from .timing import rates
from .watch import NEEDED, Watched, watch

RECIPES = ("recipes/llada_moe.yaml", "recipes/llada2_mini.yaml")
KINDS = {False: "plain MDLM", True: "MemDLM"}
GIB = 2**30


class Report:
    """The tables, on disk after every row."""

    def __init__(self, output: Path, about: dict[str, Any]) -> None:
        self.output, self.about = output, about
        self.steps = Section(
            title="A training step at full size",
            columns=[
                *("model", "training", "s", "tokens/s", "÷ plain"),
                *("TFLOP", "FLOP limit s", "GB", "byte limit s", "÷ the longer"),
                *("peak GiB", "planned", "GPU busy", "waits"),
            ],
            note="Whole optimizer steps of the trainer: data, forward, backward, clipping, optimizer; prompt:response "
            f"{RATIO}:1, all of the response masked; random weights. TFLOP as the planner counts them; GB of weights, "
            "read as often as layers are passed, without activations; limits by what the device reaches in a large "
            "product and in a copy. Peaks, and planned ones, beyond weights and optimizer. GPU busy: seconds of its "
            "kernels over those of a step. Waits: how often the host waits for the GPU in a step.",
        )
        self.host = Section(
            title="What the host does in a step, s",
            columns=["model", "training", "data", "loss, gradients, clipping", "optimizer", "the rest", "first step"],
            note="Seconds until the host has said everything, not until the GPU has done it.",
        )
        self.waits = Section(title="Where the host waits in a step", columns=["model", "training", "line", "times"])
        self.kernels = Section(
            title="The longest kernels of a step",
            columns=["model", "training", "kernel", "calls", "ms", "of all"],
            note="On a CPU: operators.",
        )
        self.loading = Section(
            title="Making a model of random weights",
            columns=["model", "s", "held GiB", "reserved GiB", "reserved after training"],
            note="Reserved: what torch's allocator has taken from the GPU, what it does not use included.",
        )
        self.inference = inference.section()

    def tables(self) -> list[Section]:
        tables = (self.steps, self.host, self.waits, self.kernels, self.loading, self.inference)
        return [table for table in tables if table.rows]

    def save(self) -> list[Path]:
        return write(self.tables(), "At full size", self.about, self.output, "bench-gpu")


def measure(name: str, recipe: Recipe, plans: dict[bool, Plan], report: Report) -> None:
    """Plain MDLM and MemDLM of one recipe, then decoding. Without plans their cells stay empty."""
    args, device = recipe.training, recipe.training.device
    reached = rates(device, torch.bfloat16 if args.bf16 else getattr(torch, recipe.model.dtype))
    start = time.perf_counter()
    model = random_model(recipe)
    finish(device)
    report.loading.rows.append([name, time.perf_counter() - start, *_held(device), None])
    report.save()
    plain = 0.0
    for on, kind in KINDS.items():
        memory = dataclasses.replace(recipe.memory, enabled=on)
        found = trained(model, recipe, memory)
        plain = plain or found.seconds
        tokens = args.train_batch_size * recipe.data.max_length
        read = weights_read(model, memory, args.gradient_checkpointing)
        flops = flop_limit = planned = None
        byte_limit = read / reached.bytes
        if plans:
            plan = plans[on]
            flops = plan.flops_memdlm if on else plan.flops_mdlm
            flop_limit = flops / reached.flops
            planned = (plan.peak - plan.at_peak["weights"] - plan.at_peak["optimizer"]) / GIB
        busy = sum(kernel.seconds for kernel in found.kernels)
        report.steps.rows.append(
            [
                *(name, kind, found.seconds, round(tokens / found.seconds), found.seconds / plain),
                *(flops and flops / 1e12, flop_limit, read / 1e9, byte_limit),
                found.seconds / max(flop_limit or 0, byte_limit),
                *(found.memory.peak / GIB, planned, f"{busy / found.seconds:.0%}", sum(found.waits.values())),
            ]
        )
        report.host.rows.append([name, kind, *found.host.values(), found.first])
        report.waits.rows += [[name, kind, line, times] for line, times in found.waits.most_common(10)]
        for kernel in found.kernels[:20]:
            cells = [kernel.name[:100], kernel.calls, kernel.seconds * 1e3, f"{kernel.seconds / busy:.1%}"]
            report.kernels.rows.append([name, kind, *cells])
        report.loading.rows[-1][-1] = _held(device)[1]
        report.save()
    if not recipe.model.load_in_4bit:
        inference.measure(name, model, recipe, report.inference, report.save)


def trained(model: nn.Module, recipe: Recipe, memory: MemoryConfig) -> Watched:
    """A run of a few steps on random examples.

    Raises:
        RuntimeError: the recipe asks for bfloat16, and the layers did not compute under autocast.
    """
    args, generator = recipe.training, torch.Generator(device="cpu").manual_seed(1)
    vocabulary, length = staged_backbone(model).config.vocab_size, recipe.data.max_length
    tokens = torch.randint(3, vocabulary, (NEEDED * args.train_batch_size, length), generator=generator, device="cpu")
    labels = tokens.clone()
    labels[:, : length * RATIO // (RATIO + 1)] = -100
    rows = [{"input_ids": x, "labels": y} for x, y in zip(tokens.tolist(), labels.tolist(), strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir, args.max_steps = folder, NEEDED
        trainer = MemDLMTrainer(
            model, args, memory, data_collator=stacked, train_dataset=rows, processing_class=models.TOKENIZER
        )
        found = watch(trainer)
    if args.bf16 and found.autocast != {True}:
        raise RuntimeError("training.bf16=true, but the layers have computed without autocast")
    del trainer
    model.zero_grad()
    gc.collect()
    return found


def stacked(rows: list[dict[str, Any]], return_tensors: str = "pt") -> dict[str, Tensor]:
    """A batch of examples of one length."""
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


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


def _held(device: torch.device) -> tuple[float | None, float | None]:
    """GiB that tensors have, and that torch's allocator has taken."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.memory_allocated(device) / GIB, torch.cuda.memory_reserved(device) / GIB


def plans_for(name: str, recipe: Recipe, file: Path | None) -> dict[bool, Plan]:
    """The plans of a recipe, from the file if they are there; else they are made, and kept there.

    Raises:
        ConfigError: the device has less memory than planned.
    """
    kept = json.loads(file.read_text()) if file is not None and file.exists() else {}
    if name not in kept:
        kept[name] = [dataclasses.asdict(plan) for _, plan in sorted(plans_of(recipe).items())]
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(kept))
    plans = {on: Plan(**values) for on, values in enumerate(kept[name])}
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
    parser.add_argument("--plans", type=Path, metavar="FILE", help="where plans are kept (default: nowhere)")
    parser.add_argument("--plan-only", action="store_true", help="make the plans, for a GPU, and measure nothing")
    parser.add_argument("--output", type=Path, default=Path("reports"), help="where to write (default: reports)")
    args = parser.parse_args(argv)
    if not (args.cpu or args.plan_only or torch.cuda.is_available()):
        parser.error(f"expected a CUDA device; torch {torch.__version__} finds none")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # of a log, where no table need be squeezed
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    report = Report(args.output, {"machine": devices()[0], "versions": versions})
    try:
        for path, bits in itertools.product(args.recipes, args.bits):
            recipe, name = recipe_of(path, bits, args.set, small=args.cpu), f"{Path(path).stem}, {bits} bit"
            try:
                plans = plans_for(name, recipe, args.plans)
            except ConfigError:
                raise
            except Exception as error:  # a fault of the planner's must not cost the timings
                if args.plan_only:
                    raise
                console.print(f"{name}: no plan ({type(error).__name__}: {error})", soft_wrap=True, markup=False)
                plans = {}
            if not args.plan_only:
                measure(name, recipe, plans, report)
                gc.collect()
    except ConfigError as error:
        parser.error(str(error))
    if not args.plan_only:
        for table in report.tables():
            table.print(console)
        for path in report.save():
            console.print(str(path), soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
