"""The seam to dllm: its classes where dllm is installed, the bundled ones where it is not. Nothing else asks.

`python -m dllm_memdlm.info` prints which are in use, and why.
"""
# ruff: noqa: F401 (other modules import these names from here)

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import warnings
from pathlib import Path

#: The dllm commit that the bundled subset follows and the contract tests compare with.
DLLM_COMMIT = "ca176752"

_origin = getattr(importlib.util.find_spec("dllm"), "origin", None)
HAS_DLLM = _origin is not None  # a bare folder called dllm is a namespace package, not dllm
_description = f"dllm at {_origin}" if HAS_DLLM else "bundled subset (dllm is not installed)"

if HAS_DLLM:
    try:
        with warnings.catch_warnings():  # those of dllm's own sources, which `python -W error` would make fatal
            warnings.simplefilter("ignore")
            from dllm.core.samplers import BaseSampler, BaseSamplerConfig, BaseSamplerOutput
            from dllm.core.schedulers import BaseAlphaScheduler, LinearAlphaScheduler
            from dllm.core.trainers import MDLMConfig, MDLMTrainer
            from dllm.utils.collators import CollatorWrapper, NoAttentionMaskWrapper
            from dllm.utils.data import prepend_bos
    except (ImportError, AttributeError, RuntimeError) as error:  # a dependency is missing, or another dllm
        HAS_DLLM = False
        _reason = f"{type(error).__name__}: {error}".splitlines()[0]
        _description = f"bundled subset (dllm at {_origin} is not usable: {_reason}; known to work: {DLLM_COMMIT})"
        warnings.warn(f"using the {_description}", stacklevel=2)

if not HAS_DLLM:
    from .bundled import (
        BaseAlphaScheduler,
        BaseSampler,
        BaseSamplerConfig,
        BaseSamplerOutput,
        CollatorWrapper,
        LinearAlphaScheduler,
        MDLMConfig,
        MDLMTrainer,
        NoAttentionMaskWrapper,
        prepend_bos,
    )


def describe() -> str:
    """Which implementation is in use, and why, in one line."""
    return _description


def commit() -> str:
    """Return the commit of the dllm in use, eight digits; nothing where it is no git checkout."""
    folder = None if _origin is None else Path(_origin).parents[1]
    if folder is None or not (folder / ".git").exists() or shutil.which("git") is None:
        return ""
    git = ["git", "-C", str(folder), "rev-parse", "--short=8", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()
