"""Weights of a checkpoint in a model that FSDP2 shares out."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ...backbones.expert_names import is_stacked, split_name
from ...backbones.stock_peft import own_state
from ...config import ConfigError


def load_shared_out(model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """Read the weights of a checkpoint into a model that FSDP2 shares out, of which every process holds a part.

    accelerate (1.11) saves and restores an adapter's first part alone; the checkpoint's own safetensors are whole.

    Raises:
        ConfigError: there are none.
    """
    folder = Path(checkpoint)
    files = sorted(folder.glob("adapter_model*.safetensors")) or sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ConfigError(f"{checkpoint}: expected adapter_model.safetensors or model.safetensors")
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
        holder = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (not a mapping)
        for name, part in own_state(model).items():
            names = split_name(name, len(part)) if is_stacked(name) else [name]
            if not holder.keys() & set(names):  # tied to another weight, which is there
                continue
            tensors = [holder[one].get_tensor(one) for one in names]
            tensor = torch.stack(tensors) if is_stacked(name) else tensors[0]
            if isinstance(part, DTensor):
                tensor = distribute_tensor(
                    tensor.to(part.device), part.device_mesh, part.placements, src_data_rank=None
                )
            part.copy_(tensor)
