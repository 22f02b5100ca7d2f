"""MemDLM (memory-enhanced diffusion language model training, arXiv 2603.22241) for dllm.

    trainer = MemDLMTrainer(model, args=MemDLMConfig(...), memory=MemoryConfig(), train_dataset=..., ...)

Importing this package imports nothing else until a name is used, and changes no other library.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AnchorTrajectoryCollator": "collator",
    "ConfigError": "config",
    "DataConfig": "config",
    "LoraConfig": "config",
    "MemoryConfig": "config",
    "ModelConfig": "config",
    "FastWeights": "fast_weights",
    "ParametricMemory": "memory",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "register": "registry",
    "MemDLMConfig": "trainer",
    "MemDLMTrainer": "trainer",
    "Trajectory": "trajectory",
    "build_trajectory": "trajectory",
    "prompt_trajectory": "trajectory",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
