"""Interpreters of their own, with lm-eval or a stand-in of it, for what happens when it is imported."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dllm_memdlm

ROOT = Path(dllm_memdlm.__file__).parents[1]

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'dllm-memdlm[eval]'"
)

#: As in 0.4.13: the registry is filled by lm_eval.models.
REGISTRY = """
class Registry(dict):
    def register(self, name, target):
        self[name] = target
model_registry = Registry()
"""
MODELS = """
from lm_eval.api.registry import model_registry
model_registry.register("dummy", target="lm_eval.models.dummy:DummyLM")
"""


def run(*arguments: str, paths: tuple[Path, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, where these paths come first."""
    before = [*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(before), **environment},
        cwd=paths[0] if paths else None,
        capture_output=True,
        text=True,
        timeout=300,
    )


def printed(done: subprocess.CompletedProcess[str]) -> Any:
    """The last line that it printed, as JSON."""
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def write_lm_eval(folder: Path, registry: str = REGISTRY, models: str = MODELS, **others: str) -> None:
    """A package lm_eval of these modules; `others` are files at its top."""
    files = {"__init__.py": "", "api/__init__.py": "", "api/registry.py": registry, "models/__init__.py": models}
    for name, text in {**files, **others}.items():
        path = folder / "lm_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
