"""A training step never waits for the device: it runs on tensors that have shapes and no values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import examples, make_trainer, tiny, train_batch
from steps import OF_PROMPTS, OFF, VARIANTS, memory_for
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from dllm_memdlm.training.planner.live import LiveBytes
from dllm_memdlm.training.trainer import MemDLMTrainer


@contextmanager
def without_values() -> Iterator[FakeTensorMode]:
    # LiveBytes knows the shape of grouped products, in every dtype that their kernel takes.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, LiveBytes():
        yield mode


def step(trainer: MemDLMTrainer) -> list[Tensor]:
    """The loss and all gradients."""
    batch = train_batch(trainer)
    trainer.state.logging_steps, trainer.state.global_step = 100, 5  # of a step that is not logged
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.compute_loss(trainer.model.train(), dict(batch))
    with without_values() as mode:
        batch = tree_map_only(Tensor, mode.from_tensor, batch)
        loss = trainer.compute_loss(trainer.model.train(), batch)
        return [loss, *torch.autograd.grad(loss, trained, allow_unused=True)]


#: Those that compute on the device what others do not; with experts those that change what these do.
WITH_EXPERTS = ("paper", "full_scope_batch", "off", "kl", "odd_rank")
OTHERS = ("prompts", "all_layers", "newly_revealed", "hidden_mse", "hidden_cosine", "global_clip_scope_batch")
CASES = {"llada2": WITH_EXPERTS[:3], "llada_moe": WITH_EXPERTS, "llama": (*WITH_EXPERTS, *OTHERS, "no_clip", "uniform")}


@pytest.mark.parametrize(("kind", "variant"), [(kind, name) for kind, names in CASES.items() for name in names])
def test_a_step_needs_no_values(kind, variant, tokenizer, tmp_path):
    plain = variant == "off"
    settings = {**VARIANTS, "prompts": OF_PROMPTS, "off": {}}[variant]
    memory = OFF if plain else memory_for(kind, **{"rank": 4, **settings, "dropout": 0.5})
    model = tiny(kind, lora=not plain, num_hidden_layers=2)  # one before the memory, and one with it
    trainer = make_trainer(model, tokenizer, tmp_path, memory, examples(4))
    assert all(isinstance(result, FakeTensor) for result in step(trainer) if result is not None)


@pytest.mark.parametrize(
    "wait",
    [Tensor.item, Tensor.tolist, lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.nonzero()],
    ids=["item", "tolist", "bool", "boolean index", "nonzero"],
)
def test_this_would_be_seen(wait: Any):
    with without_values(), pytest.raises((DataDependentOutputException, RuntimeError)):
        wait(torch.ones(1))
