"""The memory leaves no trace: not after an exception, not in a checkpoint, not in the optimizer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS, make_trainer, tiny
from conftest import train_batch as batch_of
from steps import Step, initial, memory_for
from torch import Tensor, nn

from dllm_memdlm.backbones import staged_backbone
from dllm_memdlm.backbones.expert_names import split_names
from dllm_memdlm.backbones.moe import RoutedExperts

# === invariant 4: no trace ===


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a step must leave as it was."""
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": {(name, kind): len(getattr(module, kind)) for name, module in modules.items() for kind in hooks},
        "fast": {name: dict(module.fast) for name, module in modules.items() if isinstance(module, RoutedExperts)},
        "mode": {name: module.training for name, module in modules.items()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "state": list(model.state_dict()),
    }


class Failing(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "where"), [("train", "first layer"), ("train", "last layer"), ("eval", "last layer")])
def test_an_exception_leaves_no_trace(kind, mode, where, tokenizer, tmp_path, monkeypatch):
    trainer = make_trainer(tiny(kind, lora=True), tokenizer, tmp_path, memory_for(kind))
    model, batch = trainer.model, batch_of(trainer)
    getattr(model, mode)()
    before = traces(model)
    layer = staged_backbone(model).layers[0 if where == "first layer" else -1]
    norm = layer.post_attention_layernorm
    forward, calls, fail_at = norm.forward, 0, math.inf

    def counting(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise Failing
        return forward(x)

    monkeypatch.setattr(norm, "forward", counting)
    trainer.compute_loss(model, batch)
    assert traces(model) == before
    passes = calls
    assert passes >= (3 if where == "last layer" else 2)  # two inner steps and the outer one; two trunks
    for fail_at in range(1, passes + 1):
        calls = 0
        with pytest.raises(Failing):
            trainer.compute_loss(model, batch)
        assert traces(model) == before, f"failure in pass {fail_at}"
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_while_holding_leaves_no_trace(kind, tokenizer, tmp_path):
    trainer = make_trainer(tiny(kind), tokenizer, tmp_path, memory_for(kind))
    fast = initial(trainer, batch_of(trainer))
    before = traces(trainer.model)
    with pytest.raises(Failing), trainer.memory.holding(fast):
        assert traces(trainer.model) != before
        raise Failing
    assert traces(trainer.model) == before
    with trainer.memory.holding(None):
        assert traces(trainer.model) == before


def test_fast_weights_are_not_put_over_others(tokenizer, tmp_path):
    trainer = make_trainer(tiny("llada_moe"), tokenizer, tmp_path, memory_for("llada_moe"))
    fast = initial(trainer, batch_of(trainer))
    before = traces(trainer.model)
    with trainer.memory.holding(fast):
        inside = traces(trainer.model)
        with pytest.raises(RuntimeError, match="already holds fast weights"), trainer.memory.holding(fast):
            pass
        assert traces(trainer.model)["fast"].keys() == inside["fast"].keys()
        assert traces(trainer.model)["hooks"] == inside["hooks"]
    assert traces(trainer.model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_no_fast_weight_is_saved_or_optimised(kind, tokenizer, tmp_path):
    model = tiny(kind, lora=True)
    names, trainable = set(model.state_dict()), {p for p in model.parameters() if p.requires_grad}
    trainer = make_trainer(
        model, tokenizer, tmp_path, memory_for(kind), max_steps=1, save_strategy="steps", save_steps=1, max_grad_norm=1
    )
    seen: list[dict[str, Any]] = []
    training_step = trainer.training_step
    trainer.training_step = lambda model, inputs, *args: (
        seen.append(dict(inputs)) or training_step(model, inputs, *args)
    )
    before = {name: v.clone() for name, v in model.state_dict().items()}
    trainer.train()
    after = {name: v.clone() for name, v in model.state_dict().items()}
    model.load_state_dict(before)
    step = Step(trainer, seen[0])
    model.load_state_dict(after)

    assert set(model.state_dict()) == names
    optimised = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert set(optimised) == trainable and len(optimised) == len(trainable)
    expected = torch.stack([g.norm() for g in step.gradients.values()]).norm().item()
    logged = next(log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log)
    assert logged == pytest.approx(expected, rel=1e-5)

    folder = Path(tmp_path) / "checkpoint-1"
    from safetensors.torch import load_file

    saved = load_file(folder / "adapter_model.safetensors")
    own = {name for name in split_names(after) if "lora_" in name}
    assert {name.replace(".weight", ".default.weight") for name in saved} == own
    model.save_pretrained(tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys() == saved.keys()
    with trainer.memory.holding(step.written.fast_weights):
        assert set(model.state_dict()) == names
        assert {p for p in model.parameters() if p.requires_grad} == trainable
