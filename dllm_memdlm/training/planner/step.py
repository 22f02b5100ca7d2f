"""The trainer's own step on fake tensors: the bytes alive in it, by what they are for, and its FLOPs."""

from __future__ import annotations

import types
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...backbones import staged_backbone
from ...backbones.output import CHUNK
from ...config import MemoryConfig
from ...method import noise
from ...method.bilevel import BilevelStep
from ...method.inner_loop import ParametricMemory
from ...method.trajectory import Trajectory, build_trajectory
from ...method.windows import prompt_trajectory
from ...versions import checkpoint_activations
from .live import LiveBytes
from .shapes import held_bytes

#: What a step's own bytes are for.
ACTIVATIONS, LOGITS, FAST, GRADIENTS = "activations", "logits", "fast weights", "gradients"


@dataclass(frozen=True)
class Sizes:
    """What the tensors of a step depend on, besides the model."""

    batch: int  #: samples of one micro-batch
    length: int  #: tokens of a sample
    masked: int  #: tokens of a sample with a loss
    prompt: int = 1  #: tokens of a window of its prompt
    windows: int = 1  #: of a prompt
    prompt_loss: float = 0.0  #: the weight of the loss of prompts
    norm: str = "token"  #: how the outer loss is normalised, a key of `losses.NORMS`
    amp: torch.dtype | None = None  #: autocast's dtype; none where it is off
    cast: torch.dtype | None = None  #: what an engine turns all weights into, if it does
    device: str = "cuda"  #: whose way of computing is followed, cuda or cpu
    checkpointing: bool = False  #: whether the prefix is recomputed in the backward pass
    accumulates: bool = False  #: whether gradients of an earlier micro-batch are there already


def fake_model(model: nn.Module, sizes: Sizes) -> FakeTensorMode:
    """Prepare a model on the meta device for steps, as transformers and accelerate do; it loses its tensors."""

    def fake(tensor: Tensor) -> Tensor:
        cast = sizes.cast if tensor.is_floating_point() else None
        return torch.empty(tensor.shape, dtype=cast or tensor.dtype)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model.train()._apply(fake)
    staged_backbone(model).get_output_embeddings().chunk = CHUNK[sizes.device]
    if sizes.checkpointing:
        checkpoint_activations(model, preserve_rng_state=False)  # fake random numbers have no state
    if sizes.amp is not None:
        forward = torch.autocast("cpu", sizes.amp)(type(model).forward)
        model.forward = types.MethodType(convert_outputs_to_fp32(forward), model)
    return mode


def step(
    model: nn.Module,
    mode: FakeTensorMode,
    memory: ParametricMemory | None,
    sizes: Sizes,
    stays: float = 1.0,
    watch: AbstractContextManager[Any] | None = None,
) -> LiveBytes:
    """Take the forward and the backward pass of one micro-batch of a model that `fake_model` has prepared.

    Without `memory` it is a step of plain MDLM. `stays` is the part of a weight's gradient that is still there when the
    backward pass is over; the rest is with the other GPUs. `watch` is another mode that is to see every operator.
    """
    live = LiveBytes(_kinds(model, memory, sizes))
    for tensor in (*model.parameters(), *model.buffers()):
        live.leave_out(tensor)
    if sizes.accumulates:
        live.hold(GRADIENTS, int(stays * held_bytes(model, trainable=True)))
    made = 0.0 if sizes.accumulates else stays  # of a gradient, beside what is there
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: live.turn_into(p.grad, GRADIENTS, made))
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    # On a CPU transformers has all of the step under autocast, on a GPU accelerate has each stage by itself.
    whole = sizes.amp is not None and sizes.device == "cpu"
    batch = {name: mode.from_tensor(value) for name, value in _batch(sizes, memory).items()}
    with mode, live, watch or nullcontext():
        with torch.autocast("cpu", sizes.amp) if whole else nullcontext():
            live.moment = "outer forward"
            windows = [Trajectory.from_batch(batch, "prompt_")] * sizes.windows
            own: dict[str, Any] = {"windows": windows, "prompt": windows[0]}
            own |= {"prompt_loss": sizes.prompt_loss, "loss_norm": sizes.norm}
            outer, fast = BilevelStep(model, memory, Trajectory.from_batch(batch), 0, **own), None
            if memory is not None:
                live.moment = "inner loop"
                fast = outer.write().fast_weights
            live.moment = "outer forward"
            loss, _ = outer.loss(model, fast)
            if sizes.prompt_loss > 0:
                loss = loss + outer.prompt_term()[0]
        del outer, fast
        live.moment = "outer backward"
        loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return live


def _batch(sizes: Sizes, memory: ParametricMemory | None) -> dict[str, Tensor]:
    """Examples whose last tokens are all masked, in every inner state too that may have so many."""
    tokens = torch.ones(sizes.batch, sizes.length, dtype=torch.int64)
    maskable = torch.zeros_like(tokens, dtype=torch.bool)
    maskable[:, sizes.length - sizes.masked :] = True
    keys, level = noise.example_keys(0, 0, torch.arange(sizes.batch)), torch.ones(sizes.batch)
    # At worst an inner state reveals as much as it masks: here, where all is masked, it would reveal nothing.
    config = MemoryConfig(enabled=False) if memory is None else replace(memory.config, targets="masked")
    batch = build_trajectory(tokens, maskable, level, level, keys, config).to_batch()
    window = torch.ones(sizes.batch, sizes.prompt, dtype=torch.int64)
    return batch | prompt_trajectory(window, window.bool(), keys, config).to_batch("prompt_")


def _kinds(model: nn.Module, memory: ParametricMemory | None, sizes: Sizes) -> Any:
    """What a tensor is for, told by its shape."""
    vocabulary, fast = staged_backbone(model).config.vocab_size, set()
    shapes, config = ([], MemoryConfig()) if memory is None else (memory.shapes, memory.config)
    for shape in shapes:
        samples = sizes.batch if config.scope == "sample" else 1
        for size in shape.tensors(config).values():
            groups = (samples,) if shape.experts is None else (shape.experts, samples)
            fast |= {(*groups, *size), (samples * (shape.experts or 1), *size)}

    def kind_of(tensor: Tensor) -> str:
        if tuple(tensor.shape) in fast:
            return FAST
        return LOGITS if tensor.dim() > 1 and tensor.shape[-1] == vocabulary else ACTIVATIONS

    return kind_of
