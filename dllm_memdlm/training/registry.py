"""Make the trainer and the collator known to dllm, on request: importing this package changes nothing there."""

from __future__ import annotations

from ..compat.dllm_api import HAS_DLLM
from .collator import AnchorTrajectoryCollator
from .trainer import MemDLMConfig, MemDLMTrainer


def register() -> bool:
    """Register with dllm, so that `dllm.core.trainers.MemDLMTrainer` and its kin resolve.

    The names are set on `dllm.core.trainers` and `dllm.utils`. Where dllm has a trainer registry, which
    `patches/0001-trainer-registry.patch` adds, "memdlm" resolves there too. Calling it again changes nothing.

    Returns:
        Whether dllm is there to register with.
    """
    if not HAS_DLLM:
        return False
    import dllm

    trainers = dllm.core.trainers
    if hasattr(trainers, "register_trainer"):
        trainers.register_trainer("memdlm", trainer=MemDLMTrainer, config=MemDLMConfig)
    trainers.MemDLMTrainer, trainers.MemDLMConfig = MemDLMTrainer, MemDLMConfig
    dllm.utils.AnchorTrajectoryCollator = AnchorTrajectoryCollator
    return True
