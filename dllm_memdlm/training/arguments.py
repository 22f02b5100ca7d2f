"""MemDLMConfig: the arguments of a training run, checked before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import transformers
from pydantic import Field
from torch import nn
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig

from ..compat.dllm_api import MDLMConfig
from ..config import ConfigError, Count, Natural, NotNegative, Positive, check_types, knob, require
from ..method.losses import LOSS_WEIGHT, NORMS
from . import engines

_Seed = Annotated[int, Field(ge=0, lt=2**32, description="whole number in [0, 2^32)")]
_Never = Annotated[Literal[False, None], Field(description="none; fast weights come and go in the layers")]


@dataclass
class MemDLMConfig(MDLMConfig):
    """Training arguments: all of dllm's MDLMConfig, hence of transformers, with the defaults below.

    What concerns the fast weights is in `MemoryConfig`.

    Raises:
        ConfigError: a value is of the wrong type, out of range, or of something that is not installed.
    """

    engine: engines.Engine = knob("auto", "what shares the work; auto is the launcher's choice, else DDP")
    # by a function, as HfArgumentParser takes no other default of a list
    report_to: str | list[str] = field(default_factory=lambda: "none", metadata={"help": "trackers that get the logs"})
    trackio_space_id: str | None = knob(None, "Space of the hub that trackio's logs go to; none: they stay here")
    save_only_model: bool = knob(False, "leave out of checkpoints what a resume needs")
    remove_unused_columns: bool = knob(False, "drop columns that the model does not take; the collator needs them")
    logging_first_step: bool = knob(True, "log the first step too")
    logging_nan_inf_filter: bool = knob(False, "leave losses that are not finite out of the logs")
    right_shift_logits: bool | None = knob(
        None, "logits at position i predict token i + 1; none: as the architecture has it, which Dream's do"
    )
    ddp_find_unused_parameters: bool | None = knob(False, "experts without a token get a gradient of zeros anyway")

    noted = dict[str, Any]()  #: what trackers note beside these, no field; the trainer sets the memory's settings

    #: Types narrower than transformers' own: what it would take without a word, and then train wrongly or end in a
    #: traceback. Ranges of the optimizer's other arguments are the optimizer's to check.
    narrower: ClassVar[dict[str, Any]] = {
        "output_dir": Annotated[str | Path | None, Field(description="text")],
        "accelerator_config": Any,
        "fsdp": Any,
        "resume_from_checkpoint": Annotated[str | Path | None, Field(description="text")],
        "torch_compile": _Never,
        "torch_compile_backend": _Never,
        "torch_compile_mode": _Never,
        "loss_norm_type": Literal[tuple(NORMS)],
        "loss_weight_type": Annotated[
            str, Field(pattern=f"^({LOSS_WEIGHT})$", description="one of scheduler, uniform, cart[geo_p:0.3]")
        ],
        "time_epsilon": Annotated[float, Field(gt=0, lt=1, description="number in (0, 1)")],
        "learning_rate": NotNegative,
        "weight_decay": NotNegative,
        "max_grad_norm": NotNegative | None,
        "label_smoothing_factor": Annotated[float, Field(ge=0, le=0, description="0; this loss has no smoothing")],
        "max_steps": Count | Annotated[Literal[-1], Field(description="-1 for num_train_epochs")],
        "num_train_epochs": Positive,
        "seed": _Seed,
        "data_seed": _Seed | None,
        "dataloader_num_workers": Natural,
        "per_device_train_batch_size": Count,
        "per_device_eval_batch_size": Count,
        "gradient_accumulation_steps": Count,
        "save_safetensors": Annotated[Literal[True], Field(description="true; weights are saved as nothing else")],
    }

    def to_dict(self) -> dict[str, Any]:
        """Return what trackers note of a run: these arguments, and what is in `noted`."""
        return {**super().to_dict(), **self.noted}

    def __post_init__(self) -> None:
        check_types(self, "training")
        if self.gradient_checkpointing and not isinstance(self.gradient_checkpointing_kwargs, str):
            given: Any = self.gradient_checkpointing_kwargs or {}
            self.gradient_checkpointing_kwargs: Any = {"use_reentrant": False} | given
            if self.gradient_checkpointing_kwargs["use_reentrant"]:
                raise ConfigError(
                    "training.gradient_checkpointing_kwargs.use_reentrant=True: expected false; the reentrant kind "
                    "breaks gradients that do not go through `.backward()`"
                )
        self.max_grad_norm: float = self.max_grad_norm or 0.0
        if not (torch.cuda.is_available() or torch.xpu.is_available()):
            self.use_cpu, self.dataloader_pin_memory = True, False
        if self.dataloader_pin_memory and not isinstance(self.accelerator_config, (str, AcceleratorConfig)):
            # A copy that the host waits for would end its running ahead, once for every tensor of a batch.
            self.accelerator_config: Any = {"non_blocking": True} | (self.accelerator_config or {})
        engines.prepare(self)
        with engines.in_force(self):
            super().__post_init__()
        if self.n_gpu > 1:
            self._n_gpu = 1  # one process uses one GPU; nn.DataParallel's replicas would share the fast weights
        folders = (Path(self.output_dir), *Path(self.output_dir).parents)
        place = next(folder for folder in folders if folder.exists())
        require("training", self, "output_dir", place.is_dir(), f"a folder; {place} is a file")
        _check_trackers(self)
        _check_optimizer(self)


def _check_trackers(args: MemDLMConfig) -> None:
    """Refuse trackers that are not there, which the trainer would do once the model is loaded."""
    usable = get_available_reporting_integrations()
    others = ("azure_ml", "flyte")  # which that function does not name
    missing = [name for name in args.report_to if name not in (*usable, *others)]
    how = "".join(f"; for {name}: pip install {name}" for name in missing if name in INTEGRATION_TO_CALLBACK)
    accepted = f"none, all, or of those that are installed: {', '.join(usable)}{how}"
    require("training", args, "report_to", not missing, accepted)


def _check_optimizer(args: MemDLMConfig) -> None:
    """Make the optimizer and its schedule for one number, to know what they refuse before anything is loaded."""
    name = "optim"
    try:
        cls, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
        if args.optim_target_modules is not None:  # which are the model's
            return
        optimizer = cls([nn.Parameter(torch.zeros(1))], **kwargs)
        name = "lr_scheduler_type"
        more = args.lr_scheduler_kwargs or {}
        transformers.get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=more)
    except (ArithmeticError, AssertionError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if "need to pass a" in str(error):  # the model, which is not there yet
            return
        value, said = getattr(args, name), " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"training.{name}={str(getattr(value, 'value', value))!r}: {said}") from None
