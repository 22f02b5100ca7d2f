"""MemDLMConfig: the arguments of a training run, checked before anything is built."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_pt_utils import AcceleratorConfig

from . import engines
from .config import ConfigError, require
from .dllm_api import MDLMConfig
from .losses import NORMS


@dataclass
class MemDLMConfig(MDLMConfig):
    """Training arguments: all of dllm's MDLMConfig, hence of transformers, with the defaults below.

    What concerns the fast weights is in `MemoryConfig`.
    """

    engine: str = "auto"
    report_to: str = "none"
    save_only_model: bool = False
    remove_unused_columns: bool = False
    logging_first_step: bool = True
    logging_nan_inf_filter: bool = False
    ddp_find_unused_parameters: bool | None = False  # experts without a token get a gradient of zeros

    def __post_init__(self) -> None:
        if self.gradient_checkpointing and not self.gradient_checkpointing_kwargs:
            # The reentrant kind, transformers' default, breaks gradients that do not go through `.backward()`.
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if not (torch.cuda.is_available() or torch.xpu.is_available()):
            self.use_cpu, self.dataloader_pin_memory = True, False
        if self.dataloader_pin_memory and not isinstance(self.accelerator_config, (str, AcceleratorConfig)):
            # A copy that the host waits for would end its running ahead, once for every tensor of a batch.
            self.accelerator_config = {"non_blocking": True} | (self.accelerator_config or {})
        require("training", self, "engine", self.engine in engines.ENGINES, f"one of {', '.join(engines.ENGINES)}")
        engines.prepare(self)
        super().__post_init__()
        if self.n_gpu > 1:
            self._n_gpu = 1  # one process uses one GPU; nn.DataParallel's replicas would share the fast weights
        for name, known in (("loss_norm_type", tuple(NORMS)), ("loss_weight_type", ("scheduler", "uniform"))):
            choice = getattr(self, name)
            require("training", self, name, choice in known, f"one of {', '.join(known)}")
        require("training", self, "save_safetensors", self.save_safetensors, "true; weights are saved as nothing else")
        require("training", self, "time_epsilon", 0 < self.time_epsilon < 1, "in (0, 1)")
        require("training", self, "learning_rate", self.learning_rate >= 0, "at least 0")
        require("training", self, "dataloader_num_workers", self.dataloader_num_workers >= 0, "at least 0")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            require("training", self, name, getattr(self, name) >= 1, "at least 1")
        try:
            get_reporting_integration_callbacks(self.report_to)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"training.report_to={self.report_to!r}: {' '.join(str(error).split())}") from None
