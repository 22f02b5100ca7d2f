"""MemDLM (memory-enhanced diffusion language model training, arXiv 2603.22241) for dllm.

    trainer = MemDLMTrainer(model, args=MemDLMConfig(...), memory=MemoryConfig(), train_dataset=..., ...)

Importing this package imports nothing else until a name is used, and changes no other library. It keeps OpenMP's
threads on a CPU from spinning long while they wait (GOMP_SPINCOUNT, unless it or OMP_WAIT_POLICY is set): on cores that
have other work a step can take thirty times as long. torch reads it when it is imported, so import this package first.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "30000"

__version__ = "0.2.0"

_HOME = {
    "AnchorTrajectoryCollator": "training.collator",
    "ConfigError": "config",
    "DataConfig": "config",
    "LoraConfig": "config",
    "MemoryConfig": "config",
    "ModelConfig": "config",
    "FastWeights": "method.fast_weights",
    "ParametricMemory": "method.inner_loop",
    "Recipe": "training.recipe",
    "load_recipe": "training.recipe",
    "register": "training.registry",
    "MemDLMConfig": "training.arguments",
    "MemDLMTrainer": "training.trainer",
    "Trajectory": "method.trajectory",
    "build_trajectory": "method.trajectory",
    "prompt_trajectory": "method.windows",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
