"""Measured memory: all that torch's CPU allocator hands out during a few training steps, to the byte."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import make_tokenizer, seq2seq
from torch import nn
from torch.autograd.profiler import profile

from dllm_memdlm.backbones import config_of, load_model
from dllm_memdlm.compat.dllm_api import NoAttentionMaskWrapper
from dllm_memdlm.training.recipe import Recipe, build_recipe
from dllm_memdlm.training.trainer import MemDLMTrainer


def trainer_of(recipe: Recipe, response: int) -> MemDLMTrainer:
    """A trainer of the recipe's model on random examples, all of `data.max_length` tokens."""
    length, generator = recipe.data.max_length, torch.Generator().manual_seed(0)
    rows = []
    for _ in range(64):
        tokens = torch.randint(3, 48, (length,), generator=generator).tolist()
        rows.append({"input_ids": tokens, "labels": [-100] * (length - response) + tokens[length - response :]})
    tokenizer = make_tokenizer()
    return MemDLMTrainer(
        model=load_model(recipe.model, config_of(recipe.model), recipe.lora),
        args=recipe.training,
        memory=recipe.memory,
        train_dataset=rows,
        data_collator=NoAttentionMaskWrapper(seq2seq(tokenizer)),
        processing_class=tokenizer,
    )


def measure(build: Callable[[], MemDLMTrainer]) -> int:
    """Most bytes allocated at a time while a trainer is built and takes its steps."""
    gc.collect()  # what an earlier run has left would count as freed by this one
    return allocated(lambda: build().train())


def allocated(case: Callable[[], Any]) -> int:
    """Most bytes that torch's allocator has handed out at a time, beyond what it had when `case` began."""
    # Not torch.profiler, which makes a tree of all events
    with profile(profile_memory=True, use_kineto=True) as profiler:
        case()
    live = highest = 0
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


def held_storage(model: nn.Module) -> int:
    """Bytes of a model's tensors, those that share a buffer counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in [*model.parameters(), *model.buffers()]}
    return sum(storage.nbytes() for storage in storages.values())


def measure_rank(values: dict[str, Any], response: int, file: Path) -> None:
    """Measure in one process of a distributed run; writes the bytes to `file` with its rank behind."""
    peak = measure(lambda: trainer_of(build_recipe(values, str(file.parent / "run")), response))
    Path(f"{file}.{os.environ.get('RANK', 0)}").write_text(str(peak), encoding="utf-8")
