"""A recipe of a tiny model on local examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from dllm_memdlm.backbones import config_of, load_model
from dllm_memdlm.data import tokenizer_for, training_texts
from dllm_memdlm.training.recipe import Recipe, load_recipe

#: Twenty examples of one length, in a tokenizer with a token for each byte: sixteen to train on, four to evaluate on.
ROWS = [{"instruction": f"Say {i % 10} twice, please.", "output": f"{i % 10} and {i % 10}"} for i in range(20)]

#: As many tokens in every example, and other numbers of them in its response.
UNEQUAL_ROWS = [
    {"instruction": "?" * (8 + i * 7 % 11), "output": chr(97 + i) * 2 + "." * (20 - i * 7 % 11)} for i in range(20)
]

RECIPE = """\
model:
  architecture: LLaDAMoEModelLM
  dtype: float32
  tokenizer_vocab_size: 263
  dimensions:
    hidden_size: 32
    num_hidden_layers: 3
    num_attention_heads: 4
    num_experts: 4
    num_experts_per_tok: 2
    expert_intermediate_size: 16
lora: {enabled: false}
data: {dataset: DATASET, eval_fraction: 0.2}
memory: {rank: 4, alpha: 8, layer_fraction: 0.4, dropout: 0.5}
training:
  max_steps: 4
  per_device_train_batch_size: 4
  learning_rate: 1e-2
  time_epsilon: 0.1
  bf16: false
  logging_steps: 1
  eval_steps: 2
  save_steps: 2
  disable_tqdm: true
"""


def write_recipe(folder: Path, name: str = "tiny", rows: list[dict[str, str]] = ROWS) -> Path:
    """A recipe of a model of 50 thousand parameters, on local examples."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.replace("DATASET", str(folder / "rows.jsonl")), encoding="utf-8")
    return path


def write_base(recipe_file: Path, folder: Path, seed: int = 42) -> tuple[str, ...]:
    """The model of a recipe, with random weights, in a folder of its own. Returns the settings that take it."""
    recipe = load_recipe(recipe_file)
    tokenizer = tokenizer_for(recipe.model, lambda: training_texts(recipe.data), folder / "tokenizers")
    load_model(recipe.model, config_of(recipe.model, vocab_size=len(tokenizer)), seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return (f"model.path={folder}", "model.architecture=null", "model.dimensions={}")


def recipe_for(recipe_file: Path, folder: Path, *overrides: str) -> Recipe:
    return load_recipe(recipe_file, [f"training.output_dir={folder}", *overrides])


def logs_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def trained_weights(folder: Path) -> dict[str, Tensor]:
    """What a run has saved: an adapter or a whole model."""
    names = (folder / "adapter_model.safetensors", folder / "model.safetensors")
    return load_file(next(filter(Path.exists, names)))


def without_times(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("seconds", "runtime", "per_second", "flos")
    return [{k: v for k, v in log.items() if not any(word in k for word in timed)} for log in logs]
