"""Two processes with half of the batch each end at the weights of one with the whole batch, under every engine."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import recipe_files
import small_run
import torch
import yaml
from conftest import DIMENSIONS
from processes import launch
from safetensors.torch import load_file
from torch import Tensor

from dllm_memdlm.train import main

ENGINES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}

#: Five steps. Plain SGD: AdamW divides a rounding error of a vanishing gradient by itself. A large inner learning rate,
#: so that a wrong inner loop shows.
COMMON = (
    *("training.max_steps=5", "training.optim=sgd", "training.learning_rate=0.05", "training.warmup_ratio=0.0"),
    *("training.save_strategy='no'", "training.eval_steps=3", "memory.inner_lr=10", "memory.grad_clip=0.2"),
)
CHECKPOINTING, ACCUMULATION = "training.gradient_checkpointing=true", "training.gradient_accumulation_steps=2"
EPSILON = "training.adam_epsilon=1e-3"
WIDE_MEMORY = ("memory.layer_fraction=0.67", "memory.steps=3", "memory.objective=kl")
#: Prompts are of several lengths, so the processes differ in their windows.
OF_PROMPTS = ("memory.source=prompt", "memory.strategy=cover", "memory.window=3", "memory.prompt_loss=0.3")
LORA = ("lora.enabled=true", "lora.r=4", "lora.alpha=8", "lora.dropout=0.0")
#: A first layer that is dense, then routed and shared experts.
LLADA2 = {"hidden_size": 32, **DIMENSIONS["llada2"]}
LLADA2 |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
#: Elsewhere rounding, which the inner rate makes larger, sends a token through another expert, under every engine.
NO_TIES = ("training.seed=7", "memory.inner_lr=3")
#: What is trained, by name. Every case has its own reference in one process.
CASES: dict[str, tuple[str, ...]] = {
    "LLaDA-MoE, LoRA": LORA,
    "LLaDA-MoE, LoRA, checkpointing, accumulation": (*LORA, CHECKPOINTING, ACCUMULATION),
    "LLaDA-MoE, all weights, AdamW": ("training.optim=adamw_torch", "training.learning_rate=3e-3", EPSILON),
    "LLaDA-MoE, LoRA, MDLM": (*LORA, "memory.enabled=false"),
    "LLaDA-MoE, LoRA, one φ for all (memory.sync)": (*LORA, "memory.scope=batch", "memory.sync=true"),
    "LLaDA-MoE, LoRA, memory of prompts": (*LORA, *OF_PROMPTS),
    "LLaDA2.1, LoRA, two adapted layers, K = 3, KL": (*LORA, *WIDE_MEMORY),
    "LLaDA2.1, all weights, checkpointing": (CHECKPOINTING, *NO_TIES),
    "LLaDA2.1, all weights, accumulation": (ACCUMULATION, *NO_TIES),
    "LLaDA2.1, LoRA, checkpointing": (*LORA, CHECKPOINTING),
    "a checkpoint, LoRA": (*LORA, *NO_TIES),
    "4 bit, LoRA": (*LORA, "model.load_in_4bit=true"),
    "4 bit, LoRA, memory of prompts": (*LORA, *OF_PROMPTS, "model.load_in_4bit=true"),
}
#: In every `make test`, under all engines but ZeRO-1; the others run in `make test-distributed`.
SHORT = "LLaDA-MoE, LoRA, checkpointing, accumulation"

#: The largest difference of a weight from one process's, over the largest distance a weight has moved.
TOLERANCE = 3e-5
TABLE = "Two processes of 4 against one of 8 after 5 steps: largest difference of a weight ÷ largest move of a weight"


@dataclass
class Run:
    weights: dict[str, Tensor]
    logs: list[dict[str, Any]]
    output: str


def logged(run: Run, name: str) -> list[float]:
    return [log[name] for log in run.logs if name in log]


def train(recipe: str, settings: tuple[str, ...]) -> None:
    """What each process does: the command that a user types."""
    assert main([recipe, *settings, "--debug"]) == 0


def trained(recipe: Path, folder: Path, processes: int, *settings: str) -> Run:
    launch(processes, folder, train, str(recipe), (f"training.output_dir={folder}", *settings))
    output = (folder / "process0.log").read_text()
    return Run(small_run.trained_weights(folder), small_run.logs_of(folder), output)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, Path]:
    """By backbone. Responses of several lengths in examples of one length, as padding would be a part of the loss."""
    folder = tmp_path_factory.mktemp("distributed")
    llada_moe = small_run.write_recipe(folder, rows=small_run.UNEQUAL_ROWS)
    values = yaml.safe_load(llada_moe.read_text())

    def with_model(name: str, **model: Any) -> Path:
        text = yaml.safe_dump({**values, "model": {"dtype": "float32", **model}})
        return recipe_files.write(folder / f"{name}.yaml", text)

    llada2 = with_model("llada2", **{**values["model"], "architecture": "LLaDA2MoeModelLM", "dimensions": LLADA2})
    wide = ("model.dimensions.hidden_size=64", "model.dimensions.expert_intermediate_size=64")
    trained(llada_moe, folder / "saved", 1, *COMMON, *wide, "training.max_steps=1")  # blocks of 64 weights are packed
    checkpoint = with_model("checkpoint", path=str(folder / "saved"))
    found = {"LLaDA-MoE": llada_moe, "LLaDA2.1": llada2, "a checkpoint": checkpoint, "4 bit": checkpoint}
    for name, recipe in (("LLaDA-MoE", llada_moe), ("LLaDA2.1", llada2)):
        base = folder / f"base of {recipe.stem}"
        small_run.write_base(recipe, base)
        found[f"{name}, LoRA"] = with_model(f"{recipe.stem}_lora", path=str(base))
    return found


def recipe_of(case: str, recipes: dict[str, Path]) -> Path:
    """A LoRA is trained on a saved base."""
    backbone, _, what = case.partition(", ")
    return recipes.get(f"{backbone}, {what.partition(',')[0]}", recipes[backbone])


@pytest.fixture(scope="module")
def references(recipes, tmp_path_factory) -> Any:
    """Runs in one process by case: the weights at the start, and the run."""
    done: dict[str, tuple[dict[str, Tensor], Run]] = {}

    def of(case: str) -> tuple[dict[str, Tensor], Run]:
        if case not in done:
            folder = tmp_path_factory.mktemp("one")
            recipe = recipe_of(case, recipes)
            settings = (*COMMON, *CASES[case], "training.per_device_train_batch_size=8")
            start = trained(recipe, folder / "start", 1, *settings, "training.max_steps=1", "training.learning_rate=0")
            done[case] = start.weights, trained(recipe, folder / "run", 1, *settings)
        return done[case]

    return of


def pairs() -> Iterator[Any]:
    """Cases and engines. Packed weights are not shared out: recipes that ask for it are refused."""
    for case, engine in itertools.product(CASES, ENGINES):
        if case.startswith("4 bit") and engine in ("fsdp2", "zero3"):
            continue
        yield pytest.param(case, engine, marks=() if case == SHORT and engine != "zero1" else pytest.mark.distributed)


@pytest.mark.parametrize(("case", "engine"), list(pairs()))
def test_two_halves_are_one_whole(case, engine, recipes, references, tmp_path, record_property):
    start, one = references(case)
    settings = (*COMMON, *CASES[case], "training.per_device_train_batch_size=4", f"training.engine={engine}")
    two = trained(recipe_of(case, recipes), tmp_path, 2, *settings)
    assert f"engine: {ENGINES[engine]}, 2 processes" in two.output and "saved to" in two.output
    assert "saved to" not in (tmp_path / "process1.log").read_text(), "one process speaks"
    assert two.weights.keys() == one.weights.keys() == start.keys()
    moved = max((one.weights[name] - start[name]).abs().max().item() for name in start)
    off = max((two.weights[name] - one.weights[name]).abs().max().item() for name in start)
    record_property("table", (TABLE, case, ENGINES[engine], f"{off / moved:.1e}"))
    assert moved > 1e-3 and off <= TOLERANCE * moved
    for name in ("loss", "grad_norm", "inner_loss_1", "inner_loss_2", "eval_loss", "eval_loss_memory_off", "nll"):
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-4, abs=2e-4), name
    if "memory.enabled=false" not in CASES[case]:
        # the fast weights had an effect, and it is the one that they have in a single process
        on, without = logged(one, "eval_loss"), logged(one, "eval_loss_memory_off")
        assert min(abs(a - b) for a, b in zip(on, without, strict=True)) > 3e-4


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(e, marks=pytest.mark.distributed) for e in ENGINES if e != "ddp")]
)
def test_uneven_last_batches_do_not_hang(engine, recipes, tmp_path):
    """Sixteen examples in batches of 2 · 3: the last has four. One φ for all, so that the inner loop waits, too."""
    settings = (*COMMON, *LORA, "training.per_device_train_batch_size=3", "training.max_steps=-1")
    settings += ("training.num_train_epochs=2", "training.group_by_length=true", f"training.engine={engine}")
    run = trained(recipes["LLaDA-MoE, LoRA"], tmp_path, 2, *settings, "memory.scope=batch", "memory.sync=true")
    assert len(logged(run, "loss")) == 6 and all(map(math.isfinite, logged(run, "loss")))
    assert logged(run, "eval_loss"), "four examples in batches of 2 · 4"


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_bfloat16_as_in_the_full_size_recipes(engine, recipes, tmp_path):
    """ZeRO casts the weights, FSDP2 shares out float32 ones, a single process uses autocast: alike, not the same."""
    settings = (*COMMON, *LORA, "training.bf16=true", "model.dtype=bfloat16", "training.gradient_checkpointing=true")
    one = trained(recipes["LLaDA-MoE, LoRA"], tmp_path / "one", 1, *settings, "training.per_device_train_batch_size=8")
    two = trained(recipes["LLaDA-MoE, LoRA"], tmp_path / "two", 2, *settings, f"training.engine={engine}")
    for name in ("loss", "inner_loss_1", "inner_loss_2", "eval_loss", "eval_loss_memory_off"):
        assert logged(two, name) and logged(two, name) == pytest.approx(logged(one, name), rel=0.05), name


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_the_best_model_comes_back(engine, recipes, tmp_path):
    """By the highest loss, so that it is not the last one."""
    settings = (*COMMON, *LORA, "training.eval_steps=1", "training.save_strategy=steps", "training.save_steps=1")
    best = ("training.load_best_model_at_end=true", "training.greater_is_better=true", f"training.engine={engine}")
    metric = "training.metric_for_best_model=eval_loss_memory_off"
    run = trained(recipes["LLaDA-MoE, LoRA"], tmp_path, 2, *settings, *best, metric)
    losses = logged(run, "eval_loss_memory_off")
    step = 1 + losses.index(max(losses))
    assert step < 5 and len(losses) == 5
    assert json.loads((tmp_path / "trainer_state.json").read_text())["best_global_step"] == step
    saved = [load_file(tmp_path / f"checkpoint-{s}" / "adapter_model.safetensors") for s in (step, 5)]
    same = [all(torch.equal(run.weights[name], tensor) for name, tensor in weights.items()) for weights in saved]
    assert same == [True, False]
