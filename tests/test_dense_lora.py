"""The LoRA of linear layers: PEFT's own forward pass is the reference."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners import lora
from torch import nn

from dllm_memdlm.backbones.dense_lora import DenseLora
from dllm_memdlm.backbones.stock_peft import StockLoraConfig


def adapted(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 16, bias=False)).to(dtype)
    config = StockLoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=["0", "1"])
    model = peft.get_peft_model(base, config.on(base))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def result(model: nn.Module, x: torch.Tensor, autocast: bool = False) -> list[torch.Tensor]:
    """What comes out, and the gradients of the input and of every adapter."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x)
    output.float().square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return [output.detach(), x.grad, *gradients]


def as_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenseLora, "forward", lora.Linear.forward)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_as_peft_forward_and_backward(dropout, monkeypatch):
    model, x = adapted(dropout), torch.randn(2, 7, 24)
    ours = result(model, x)
    as_peft(monkeypatch)
    for own, expected in zip(ours, result(model, x), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


def test_under_autocast_no_farther_from_float64_than_peft(monkeypatch):
    model = adapted()
    x = torch.randn(2, 7, 24).bfloat16()
    ours = result(model, x, autocast=True)
    as_peft(monkeypatch)
    theirs = result(model, x, autocast=True)
    exact = result(model.double(), x.double())
    for own, other, expected in zip(ours, theirs, exact, strict=True):
        assert own.dtype == other.dtype
        assert (own - expected).norm() < 1.1 * (other - expected).norm() + 1e-3 * expected.norm()


def test_gradients_in_float64():
    model = adapted().double()
    layer = model.get_base_model()[1]
    assert type(layer) is DenseLora
    assert torch.autograd.gradcheck(layer, torch.randn(3, 40, dtype=torch.float64, requires_grad=True))


def test_several_adapters_as_peft(monkeypatch):
    model, x = adapted(), torch.randn(2, 7, 24)
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["0", "1"]))
    model.base_model.set_adapter(["default", "other"])
    ours = result(model, x)
    as_peft(monkeypatch)
    for own, expected in zip(ours, result(model, x), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


def test_adapters_in_another_dtype_are_peft_s_own(monkeypatch):
    model, x = adapted(dtype=torch.bfloat16), torch.randn(2, 7, 24).bfloat16()  # PEFT's adapters are in float32
    ours = result(model, x)
    as_peft(monkeypatch)
    for own, expected in zip(ours, result(model, x), strict=True):
        assert own.dtype == expected.dtype and torch.equal(own, expected)


def test_on_a_layer_in_4_bit(monkeypatch):
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    base = nn.Sequential(Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")
    config = StockLoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules=["0"])
    model, x = peft.get_peft_model(base, config.on(base)), torch.randn(2, 7, 64)
    layer = model.get_base_model()[0]
    assert isinstance(layer, lora.Linear4bit) and "_Addition" in str(model(x).grad_fn)
    ours = result(model, x)
    monkeypatch.setattr(type(layer), "forward", lora.Linear4bit.forward)
    for own, expected in zip(ours, result(model, x), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


def test_merged_and_disabled():
    model, x = adapted().eval(), torch.randn(7, 24)
    expected = model(x)
    with model.disable_adapter():
        without = model(x)
    assert not torch.equal(without, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
