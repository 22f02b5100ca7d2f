"""A run that is stopped and resumed ends at the weights of one that never stopped, bit by bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import examples, make_trainer, tiny
from steps import OF_PROMPTS, train_logs

from dllm_memdlm.config import MemoryConfig

MEMORY = MemoryConfig(rank=4, alpha=8.0, layer_fraction=0.4, inner_lr=1.0, dropout=0.3)


def run(folder: Path, tokenizer: Any, kind: str, resume: str | None = None, **settings: Any) -> tuple[Any, Any]:
    """A run of six steps with LoRA dropout and memory dropout on fresh objects; examples of one length in no order.

    Returns the trainer and the weights that it has trained.
    """
    defaults: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    model, rows = tiny(kind, lora=settings.pop("lora", 0.3)), examples(settings.pop("rows", 12))
    memory = replace(MEMORY, **settings.pop("memory", {}))
    trainer = make_trainer(model, tokenizer, folder, memory, rows, **defaults | settings)
    if resume:
        torch.rand(5)  # where the generator stands must not matter to a resumed run
    trainer.train(resume_from_checkpoint=resume)
    return trainer, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


GROUPED = {"gradient_accumulation_steps": 2, "group_by_length": True, "per_device_train_batch_size": 2, "rows": 18}


@pytest.mark.parametrize(
    ("kind", "stop", "settings"),
    [
        *(("llada_moe", 3, {}), ("llada_moe", 3, {"lora": False}), ("llama", 3, GROUPED)),
        ("llama", 3, {"memory": OF_PROMPTS}),
        *(("llama", stop, {"rows": 6, "dataloader_num_workers": 2 * (stop == 2)}) for stop in (2, 3)),
    ],
)
def test_a_resumed_run_ends_at_the_same_bits(kind, stop, settings, tokenizer, tmp_path):
    """Stopped within an epoch, and with six rows, of which an epoch has two steps, at its end and in the second one."""
    settings = {"save_steps": stop, **settings}
    straight, expected = run(tmp_path / "straight", tokenizer, kind, **settings)
    checkpoint = str(tmp_path / "straight" / f"checkpoint-{stop}")
    resumed, actual = run(tmp_path / "resumed", tokenizer, kind, checkpoint, **settings)
    assert resumed.state.global_step == 6
    losses = [[log["loss"] for log in train_logs(trainer)] for trainer in (straight, resumed)]
    assert losses[0] == losses[1]
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []
    start = dict(tiny(kind, lora=settings.get("lora", 0.3)).named_parameters())
    assert sum(not torch.equal(expected[name], start[name]) for name in expected) > 0.5 * len(expected)
