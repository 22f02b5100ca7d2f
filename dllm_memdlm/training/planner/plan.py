"""What a recipe's training takes on each GPU, worked out before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from dataclasses import dataclass

import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers import PretrainedConfig

from ...backbones import staged_backbone
from ...config import ConfigError
from ...method.inner_loop import ParametricMemory
from ...method.windows import window_count
from ..recipe import Recipe
from .shapes import active_count, held_bytes, parameter_count, shape_model
from .step import ACTIVATIONS, FAST, GRADIENTS, LOGITS, Sizes, fake_model, step

#: Of an example's tokens, if nothing is said.
RESPONSE_SHARE = 0.25

#: Engines that share out the weights themselves, and those of DeepSpeed.
SHARES_WEIGHTS = ("zero3", "fsdp2")
ZERO = ("zero1", "zero2", "zero3")

#: DeepSpeed's stage 3 lets go of weights only beyond so many elements (stage3_max_live_parameters, its default).
LIVE_ELEMENTS = 10**9

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Share:
    """Bytes on one GPU that are there in every pass."""

    weights: int
    optimizer: int
    buffers: int = 0  #: gradients in flight, and the room an engine keeps for them
    gathered: int = 0  #: weights of the layers under way, put together from all GPUs
    stays: float = 1.0  #: part of a gradient that stays on the GPU once the backward pass has made it


def share(model: nn.Module, layers: nn.ModuleList, engine: str, gpus: int, cast: torch.dtype | None) -> Share:
    """The share of one of `gpus` GPUs. `cast`: what layers compute with, if the engine turns their weights into it."""
    everything, trainable = held_bytes(model, cast=cast), held_bytes(model, trainable=True, cast=cast)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if engine in ZERO:
        # A float32 copy of the weights that train, which is the one updated, and two moments.
        optimizer = 12 * count // gpus
        if engine != "zero3":
            return Share(everything, optimizer, stays=1 / gpus)
        element = everything / max(1, sum(t.numel() for t in model.parameters()))
        gathered = min(everything, int(LIVE_ELEMENTS * element))
        return Share(everything // gpus, optimizer, 4 * count // gpus, gathered, stays=0.0)
    if engine == "fsdp2":
        # Gathered are the layer under way and the next one, on its way; and what belongs to no layer.
        sizes = [held_bytes(layer, cast=cast) for layer in layers]
        gathered = 2 * max(sizes) + everything - sum(sizes)
        kept = held_bytes(model, cast=cast and torch.float32)  # accelerate widens what it shares out
        adam = 8 * count if cast else 2 * trainable
        return Share(kept // gpus, adam // gpus, 0, gathered, stays=1 / gpus)
    # Adam's two moments are of the weights' dtype. DDP averages gradients in buckets, a second copy of them all.
    return Share(everything, 2 * trainable, trainable if engine == "ddp" else 0)


@dataclass(frozen=True)
class Plan:
    """Predictions for one recipe on some GPUs. Bytes are those of one GPU; FLOPs and tokens those of all together."""

    engine: str  #: in force; `none` on one GPU
    gpus: int
    parameters: int
    active: int  #: of them, those that one token passes through
    trainable: int
    fast: int  #: fast weights of one sample
    batch: int  #: samples of one micro-batch on one GPU
    accumulation: int
    length: int  #: tokens of a sample
    response: int  #: tokens of it that are masked
    flops_mdlm: int  #: of one optimizer step
    flops_memdlm: int
    at_peak: dict[str, int]  #: bytes by what they are for when all together are most
    largest: dict[str, int]  #: bytes by what they are for, each at its own highest
    moment: str  #: of the peak, in words

    @property
    def peak(self) -> int:
        """Most bytes at a time."""
        return sum(self.at_peak.values())

    @property
    def samples(self) -> int:
        """Samples of one optimizer step."""
        return self.batch * self.accumulation * self.gpus

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.samples * self.length


def make_plans(
    recipe: Recipe,
    config: PretrainedConfig,
    gpus: int = 1,
    response_share: float = RESPONSE_SHARE,
    device: str = "cuda",
    model: nn.Module | None = None,
) -> dict[bool, Plan]:
    """Return the plans of a recipe without memory and with it, by whether it has one.

    All examples are taken to be of `data.max_length` tokens, and the last `response_share` of each, or all of it where
    the prompt is masked too, to be masked whole, as it is at worst. With `data.visible` a prompt counts as one window,
    and as what is seen of it where it is read whole: other windows take time, but no more bytes. cuda and cpu differ in
    what autocast and dropout keep: `device` says whose way is followed. `model`, if it is there already, is used up.
    """
    args, model = recipe.training, shape_model(recipe, config) if model is None else model
    engine = "none" if gpus == 1 else "ddp" if args.engine == "auto" else args.engine
    low = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    cast = low if engine in (*ZERO, "fsdp2") else None  # then there is no autocast, or nothing left for it
    length = recipe.data.max_length
    masked = max(1, math.ceil(length * (response_share if recipe.data.mask_prompt else 1)))
    prompt = max(1, length - masked)
    if recipe.data.visible is not None:  # a memory reads more than that: how much, the data says
        prompt = recipe.memory.window or prompt
    windows = window_count(prompt, recipe.memory.window)
    sizes = Sizes(
        batch=args.per_device_train_batch_size,
        length=length,
        masked=masked,
        prompt=math.ceil(prompt / windows),
        windows=windows,
        prompt_loss=recipe.memory.prompt_loss,
        norm=args.loss_norm_type,
        amp=low if cast is None else None,
        cast=cast,
        device=device,
        checkpointing=args.gradient_checkpointing,
        accumulates=args.gradient_accumulation_steps > 1,
    )
    held = share(model, staged_backbone(model).layers, engine, gpus, cast)
    counts = (parameter_count(model), active_count(model), parameter_count(model, trainable=True))
    memory = ParametricMemory(model, dataclasses.replace(recipe.memory, enabled=True), mask_token_id=0)
    mode = fake_model(model, sizes)
    with disable_input_dtype_casting(model, active=low is not None):  # as in training
        steps = {on: step(model, mode, memory if on else None, sizes, held.stays) for on in (False, True)}
    micro_batches = args.gradient_accumulation_steps * gpus
    flops_mdlm, flops_memdlm = (steps[on].flops * micro_batches for on in (False, True))
    plans = {}
    for on, live in steps.items():
        fast = memory.fast_parameters if on else 0
        step_sizes = (sizes.batch, args.gradient_accumulation_steps, length, sizes.masked)
        flops, by_use = (flops_mdlm, flops_memdlm), (_with_share(live.highest, held), _with_share(live.largest, held))
        plans[on] = Plan(engine, gpus, *counts, fast, *step_sizes, *flops, *by_use, live.highest_moment)
    return plans


def _with_share(step: Counter[str], held: Share) -> dict[str, int]:
    """Add a step's own bytes to those that are there all the time."""
    kept = {"weights": held.weights, "gathered weights": held.gathered, "optimizer": held.optimizer}
    own = {name: step[name] for name in (GRADIENTS, ACTIVATIONS, FAST, LOGITS)}
    return kept | own | {GRADIENTS: own[GRADIENTS] + held.buffers}


def parse_memory(text: str) -> int:
    """Bytes of `80GiB`, `141 GB`, … Raises ConfigError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)\s*", text, re.IGNORECASE)
    unit = UNITS.get(found[2].upper()) if found else None
    if not found or not unit or float(found[1]) <= 0:
        raise ConfigError(f"--memory {text!r}: expected a size such as 80GiB, 141GB or 40000MiB")
    return int(float(found[1]) * unit)


def advice(plan: Plan, recipe: Recipe) -> str:
    """The first thing to change where a plan does not fit."""
    of_step = plan.at_peak[ACTIVATIONS] + plan.at_peak[LOGITS] + plan.at_peak[FAST]
    if of_step > plan.peak / 2:
        if not recipe.training.gradient_checkpointing:
            return "training.gradient_checkpointing=true"
        if plan.batch > 1:
            smaller, more = plan.batch // 2, plan.accumulation * 2
            return f"training.per_device_train_batch_size={smaller}, with training.gradient_accumulation_steps={more}"
        return f"data.max_length={plan.length // 2}"
    if plan.gpus > 1 and plan.engine not in SHARES_WEIGHTS and not recipe.model.load_in_4bit:
        return "training.engine=fsdp2"
    if recipe.model.path is not None and not recipe.model.load_in_4bit and recipe.lora.enabled:
        return "model.load_in_4bit=true"
    if not recipe.lora.enabled:
        return "lora.enabled=true"
    return "more GPUs, with training.engine=fsdp2"
