"""`torch_compile`: layer by layer, with the same numbers."""

from __future__ import annotations

import pytest
import torch
from conftest import KINDS, assert_close_relative, make_trainer, tiny, train_batch
from steps import Step, initial, memory_for

from dllm_memdlm.backbones import staged_backbone
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.versions import checkpoint_activations


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """transformers sets these for good, and processes that other tests start would inherit them."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.parametrize(
    ("kind", "enabled", "checkpointing"),
    [(kind, enabled, enabled != (kind == "llada2")) for kind in KINDS for enabled in (True, False)],
)
def test_compiled_layers_take_the_same_step(kind, enabled, checkpointing, tokenizer, tmp_path):
    memory = memory_for(kind) if enabled else MemoryConfig(enabled=False)
    plain = make_trainer(tiny(kind, lora=True), tokenizer, tmp_path / "plain", memory)
    batch = train_batch(plain)
    start = initial(plain, batch) if enabled else None
    expected = Step(plain, dict(batch), start)

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny(kind, lora=True)
    compiled = make_trainer(model, tokenizer, tmp_path / "compiled", memory, torch_compile_backend="eager")
    if checkpointing:
        checkpoint_activations(model)
    names = list(compiled.model.state_dict())
    model = compiled.accelerator.prepare(compiled.model)
    assert model is compiled.model and list(model.state_dict()) == names == list(plain.model.state_dict())
    with_fast_weights = [layer._compiled_call_impl is None for layer in staged_backbone(model).layers]
    boundary = compiled.memory.boundary if memory.enabled else len(with_fast_weights)
    assert with_fast_weights == [number >= boundary for number in range(len(with_fast_weights))]
    found = Step(compiled, dict(batch), start)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"
    assert_close_relative(found.loss, expected.loss, 1e-6)
    for name, gradient in expected.gradients.items():
        assert_close_relative(found.gradients[name], gradient, 1e-4, name)


@pytest.mark.filterwarnings("ignore")
def test_the_launcher_may_ask_for_it_and_the_next_run_does_not_inherit_it(tokenizer, tmp_path, monkeypatch):
    def compiled(**training: str) -> list[bool]:
        memory = MemoryConfig(enabled=False)
        trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, memory, **training)
        assert trainer.accelerator.prepare(trainer.model) is trainer.model
        return [layer._compiled_call_impl is not None for layer in staged_backbone(trainer.model).layers]

    assert all(compiled(torch_compile_backend="eager"))
    assert not any(compiled())
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    assert all(compiled())


def test_a_layer_that_was_compiled_is_not_once_it_has_fast_weights(tokenizer, tmp_path):
    model = tiny("llama")
    for layer in staged_backbone(model).layers:
        layer.compile(backend="eager")
    memory = make_trainer(model, tokenizer, tmp_path, memory_for("llama")).memory
    left = [layer._compiled_call_impl is not None for layer in staged_backbone(model).layers]
    assert left == [number < memory.boundary for number in range(len(left))] and not all(left)
