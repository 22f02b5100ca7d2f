"""Settings under which the tests' memory writes, a recorded step, and what the trainer's tests read from a run."""

from __future__ import annotations

from typing import Any

import torch
from conftest import AMPLIFIED, MASK, take_gradients
from torch import Tensor, nn

from benchmarks.naive_experts import plain_experts
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method.fast_weights import FastWeights
from dllm_memdlm.method.inner_loop import Written
from dllm_memdlm.method.reference import full_forward, mdlm_loss, one_by_one
from dllm_memdlm.method.trajectory import Trajectory
from dllm_memdlm.training.trainer import MemDLMTrainer

SMALL = {"rank": 4, "alpha": 8.0, "layer_fraction": 0.4}  # layers 1 and 2 of 3
OFF = MemoryConfig(**SMALL, enabled=False)
#: Memory as it is used: of prompts in windows, which the tests' examples have one or two of.
OF_PROMPTS = {"source": "prompt", "strategy": "cover", "steps": 3, "window": 3, "prompt_loss": 0.3}


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "scope_batch": {"scope": "batch"},
    "full": {"kind": "full"},
    "full_scope_batch": {"kind": "full", "scope": "batch"},
    "three_steps": {"steps": 3},
    "one_step": {"steps": 1},
    "two_epochs": {"epochs": 2},
    "newly_revealed": {"targets": "newly_revealed"},
    "newly_revealed_scope_batch": {"targets": "newly_revealed", "steps": 3, "scope": "batch"},
    "inconsistent": {"strategy": "inconsistent"},
    "inconsistent_three_steps": {"strategy": "inconsistent", "steps": 3},
    "pre_anchor_only": {"strategy": "pre_anchor_only"},
    "anchor_only": {"strategy": "anchor_only", "epochs": 2},
    "kl": {"objective": "kl"},
    "reverse_kl": {"objective": "reverse_kl"},
    "hidden_mse": {"objective": "hidden_mse"},
    "hidden_cosine": {"objective": "hidden_cosine"},
    "kl_pre_anchor_only": {"objective": "kl", "strategy": "pre_anchor_only"},
    "uniform": {"weighting": "uniform"},
    "global_clip": {"clip": "global"},
    "global_clip_scope_batch": {"clip": "global", "scope": "batch"},
    "no_clip": {"clip": "none", "inner_lr": 0.1},
    "clip_of_zero": {"grad_clip": 0.0, "inner_lr": 0.1},
    "odd_rank": {"rank": 3},
    "all_layers": {"layer_fraction": 1.0},
}


def memory_for(backbone: str, **changes: Any) -> MemoryConfig:
    return MemoryConfig(**{**SMALL, **AMPLIFIED[backbone], **changes})


class Step:
    """One step of the trainer, and what its inner loop wrote."""

    def __init__(self, trainer: MemDLMTrainer, batch: dict[str, Any], start: FastWeights | None = None) -> None:
        self.written: Written | None = None
        write = trainer.memory.write if trainer.memory else None

        def recording(*args: Any, **kwargs: Any) -> Written:
            self.written = write(*args, **{"initial": start, **kwargs})
            return self.written

        if write:
            trainer.memory.write = recording
        trainer.model.zero_grad()
        self.loss = trainer.compute_loss(trainer.model, batch)
        self.loss.backward()
        self.gradients = take_gradients(trainer.model)
        self.loss = self.loss.detach()
        if write:
            del trainer.memory.write


def initial(trainer: MemDLMTrainer, batch: dict[str, Any]) -> FastWeights:
    keys = trainer.memory.keys_of(Trajectory.from_batch(batch))
    fast = FastWeights.initial(trainer.memory.shapes, trainer.memory_config, keys, keys.device)
    # float32, but as wide as the model where the comparison is in float64
    dtype = torch.promote_types(torch.float32, next(trainer.model.parameters()).dtype)
    return FastWeights({name: v.to(dtype) for name, v in fast.tensors.items()}, fast.scaling)


def flat(fast: FastWeights) -> list[dict[str, Tensor]]:
    """The fast weights of each sample, under `layer.tensor`, experts one by one."""
    return [one_by_one(fast.tensors, sample) for sample in range(fast.samples)]


def train_logs(trainer: MemDLMTrainer) -> list[dict[str, Any]]:
    return [log for log in trainer.state.log_history if "loss" in log]


def plain_loss(model: nn.Module, batch: dict[str, Any], norm: str = "token", shift: bool = False) -> Tensor:
    """Plain MDLM's, from logits everywhere."""
    tokens = torch.where(batch["anchor_mask"], MASK, batch["input_ids"])
    with plain_experts(model):
        logits, _ = full_forward(model, tokens, batch.get("attention_mask"), shift)
    names = ("input_ids", "anchor_mask", "maskable", "noise_level")
    return mdlm_loss(logits, *(batch[name] for name in names), norm)
