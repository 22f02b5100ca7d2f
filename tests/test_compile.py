"""`torch_compile`: layer by layer, with the same numbers."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import KINDS, assert_close_relative, make_trainer, tiny, train_batch
from steps import Step, initial, memory_for

from dllm_memdlm.backbones import staged_backbone
from dllm_memdlm.config import MemoryConfig


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.parametrize("enabled", [True, False], ids=["MemDLM", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_take_the_same_step(kind, enabled, tokenizer, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        monkeypatch.delenv(name)
    memory = memory_for(kind) if enabled else MemoryConfig(enabled=False)
    plain = make_trainer(tiny(kind, lora=True), tokenizer, tmp_path / "plain", memory)
    batch = train_batch(plain)
    start = initial(plain, batch) if enabled else None
    expected = Step(plain, dict(batch), start)

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # to be put back: transformers sets it for good
        compiled = make_trainer(
            tiny(kind, lora=True), tokenizer, tmp_path / "compiled", memory, torch_compile_backend="eager"
        )
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
