"""Recipes that the tests write."""

from __future__ import annotations

from pathlib import Path

from dllm_memdlm.training.recipe import Recipe

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


def assert_same(first: Recipe, second: Recipe) -> None:
    for section in SECTIONS:
        assert getattr(first, section) == getattr(second, section), section
    # the folder for logs is named after the time
    one, other = ({**r.training.to_dict(), "logging_dir": None} for r in (first, second))
    assert one == other
