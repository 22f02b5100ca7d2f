"""MemDLMConfig: the arguments of a training run, checked before anything is built."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.trainer_pt_utils import AcceleratorConfig

from ..compat.dllm_api import MDLMConfig
from ..config import ConfigError, require
from ..method.losses import NORMS
from . import engines


@dataclass
class MemDLMConfig(MDLMConfig):
    """Training arguments: all of dllm's MDLMConfig, hence of transformers, with the defaults below.

    What concerns the fast weights is in `MemoryConfig`.
    """

    engine: str = "auto"
    # by a function, as HfArgumentParser takes no other default of a list
    report_to: str | list[str] = field(default_factory=lambda: "none")
    save_only_model: bool = False
    remove_unused_columns: bool = False
    logging_first_step: bool = True
    logging_nan_inf_filter: bool = False
    ddp_find_unused_parameters: bool | None = False  # experts without a token get a gradient of zeros

    def __post_init__(self) -> None:
        if self.gradient_checkpointing and not isinstance(self.gradient_checkpointing_kwargs, str):
            self.gradient_checkpointing_kwargs = {"use_reentrant": False} | (self.gradient_checkpointing_kwargs or {})
            if self.gradient_checkpointing_kwargs["use_reentrant"]:
                raise ConfigError(
                    "training.gradient_checkpointing_kwargs.use_reentrant=True: expected false; the reentrant kind "
                    "breaks gradients that do not go through `.backward()`"
                )
        for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode"):
            require("training", self, name, not getattr(self, name), "none; fast weights come and go in the layers")
        self.max_grad_norm = self.max_grad_norm or 0.0
        if not (torch.cuda.is_available() or torch.xpu.is_available()):
            self.use_cpu, self.dataloader_pin_memory = True, False
        if self.dataloader_pin_memory and not isinstance(self.accelerator_config, (str, AcceleratorConfig)):
            # A copy that the host waits for would end its running ahead, once for every tensor of a batch.
            self.accelerator_config = {"non_blocking": True} | (self.accelerator_config or {})
        require("training", self, "engine", self.engine in engines.ENGINES, f"one of {', '.join(engines.ENGINES)}")
        engines.prepare(self)
        with engines.in_force(self):
            super().__post_init__()
        if self.n_gpu > 1:
            self._n_gpu = 1  # one process uses one GPU; nn.DataParallel's replicas would share the fast weights
        for name, known in (("loss_norm_type", tuple(NORMS)), ("loss_weight_type", ("scheduler", "uniform"))):
            choice = getattr(self, name)
            require("training", self, name, choice in known, f"one of {', '.join(known)}")
        for name, (holds, accepted) in ACCEPTED.items():
            if hasattr(self, name):
                require("training", self, name, holds(getattr(self, name)), accepted)
        folders = (Path(self.output_dir), *Path(self.output_dir).parents)
        place = next(folder for folder in folders if folder.exists())
        require("training", self, "output_dir", place.is_dir(), f"a folder; {place} is a file")
        _check_trackers(self.report_to)
        _check_optimizer(self)


def _number(low: float, high: float = math.inf, open_end: bool = False) -> Callable[[Any], bool]:
    """Whether a number is finite, at least `low`, and at most `high` (below it with `open_end`)."""
    return lambda value: math.isfinite(value) and low <= value and (value < high if open_end else value <= high)


def _count(value: int) -> bool:
    return value >= 1


def _unset_or(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


_SEED = _number(0, 2**32, open_end=True)
#: What transformers' arguments may be here, beyond what transformers checks: whether a value will do, and in words.
ACCEPTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "save_safetensors": (bool, "true; weights are saved as nothing else"),
    "time_epsilon": (lambda value: 0 < value < 1, "in (0, 1)"),
    "learning_rate": (_number(0), "at least 0, and finite"),
    "weight_decay": (_number(0), "at least 0, and finite"),
    "adam_beta1": (_number(0, 1, open_end=True), "in [0, 1)"),
    "adam_beta2": (_number(0, 1, open_end=True), "in [0, 1)"),
    "adam_epsilon": (_number(0), "at least 0, and finite"),
    "max_grad_norm": (_unset_or(_number(0)), "at least 0, and finite"),
    "label_smoothing_factor": (lambda value: value == 0, "0; the masked diffusion loss has no smoothing"),
    "max_steps": (lambda value: value == -1 or value >= 1, "at least 1, or -1 for num_train_epochs"),
    "num_train_epochs": (lambda value: math.isfinite(value) and value > 0, "more than 0"),
    "seed": (_SEED, "in [0, 2^32)"),
    "data_seed": (_unset_or(_SEED), "in [0, 2^32)"),
    "dataloader_num_workers": (_number(0), "at least 0"),
    "per_device_train_batch_size": (_count, "at least 1"),
    "per_device_eval_batch_size": (_count, "at least 1"),
    "gradient_accumulation_steps": (_count, "at least 1"),
}


def _check_trackers(report_to: str | list[str]) -> None:
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    try:
        get_reporting_integration_callbacks(names)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"training.report_to={report_to!r}: {' '.join(str(error).split())}") from None
    for name in names:
        if name not in ("all", "none", "flyte", "azure_ml", *get_available_reporting_integrations()):
            raise ConfigError(
                f"training.report_to={report_to!r}: {name} is not installed; expected one that is, or none"
            )


def _check_optimizer(args: MemDLMConfig) -> None:
    """Make the optimizer and its schedule for one number, to know what they refuse before anything is built."""
    kwargs = {}
    try:
        cls, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
        if args.optim_target_modules is None:
            optimizer = cls([nn.Parameter(torch.zeros(1))], **kwargs)
    except (AssertionError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if "need to pass a" in str(error):  # the model, which is not there yet
            return
        where = f"training.optim={str(getattr(args.optim, 'value', args.optim))!r} with {kwargs or 'its arguments'}"
        raise ConfigError(f"{where}: {_one_line(error)}") from None
    if args.optim_target_modules is not None:
        return
    try:
        transformers.get_scheduler(
            args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=args.lr_scheduler_kwargs or {}
        )
    except (ArithmeticError, AssertionError, KeyError, TypeError, ValueError) as error:
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise ConfigError(
            f"training.lr_scheduler_type={name!r} with lr_scheduler_kwargs={args.lr_scheduler_kwargs!r}: "
            f"{_one_line(error)}"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
