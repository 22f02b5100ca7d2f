"""Recipes that the tests write, and what they say of those that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dllm_memdlm.config import ConfigError
from dllm_memdlm.training.recipe import Recipe, load_recipe

SECTIONS = ("model", "lora", "data", "memory")

BASE = """\
model: {architecture: LLaDAMoEModelLM, dtype: float32}
data: {dataset: rows.jsonl}
memory: {inner_lr: 0.2, rank: 8}
training: {max_steps: 5, bf16: false, learning_rate: 1e-3}
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path, *overrides: str) -> str:
    """The text of the ConfigError, which must be one line that names the file; what follows the name."""
    with pytest.raises(ConfigError) as error:
        load_recipe(path, overrides)
    text = str(error.value)
    assert "\n" not in text and text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


def assert_same(first: Recipe, second: Recipe) -> None:
    for section in SECTIONS:
        assert getattr(first, section) == getattr(second, section), section
    # the folder for logs is named after the time
    one, other = ({**r.training.to_dict(), "logging_dir": None} for r in (first, second))
    assert one == other
