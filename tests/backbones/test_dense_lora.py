"""The LoRA of linear layers: PEFT's own forward pass is the reference."""

from __future__ import annotations

import contextlib

import peft
import pytest
import torch
from peft.tuners import lora
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dllm_memdlm.backbones.lora import DenseLora
from dllm_memdlm.backbones.moe import inner_pass
from dllm_memdlm.backbones.stock_peft import StockLoraConfig


def adapted(dropout: float = 0.0, dtype: torch.dtype = torch.float32, bias: bool = False) -> peft.PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.Linear(40, 16, bias=False)).to(dtype)
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


@pytest.mark.parametrize(("dropout", "bias"), [(0.0, False), (0.3, False), (1.0, False), (0.3, True)])
def test_as_peft_forward_and_backward(dropout, bias, monkeypatch):
    model, x = adapted(dropout, bias=bias), torch.randn(2, 7, 24)
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


@pytest.mark.parametrize("bias", [False, True])
def test_on_a_layer_in_4_bit(bias, monkeypatch):
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    base = nn.Sequential(Linear4bit(64, 64, bias=bias, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")
    config = StockLoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules=["0"])
    model, x = peft.get_peft_model(base, config.on(base)), torch.randn(2, 7, 64)
    layer = model.get_base_model()[0]
    assert isinstance(layer, lora.Linear4bit) and ("_Addition" in str(model(x).grad_fn)) != bias
    ours = result(model, x)
    monkeypatch.setattr(type(layer), "forward", lora.Linear4bit.forward)
    for own, expected in zip(ours, result(model, x), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["base", "down", "replaced"])
def test_layers_that_somebody_waits_for_are_called(kind, monkeypatch):
    """ZeRO-3 and accelerate bring a layer's weights when it is called; others want to see what it gives."""
    model, x = adapted(), torch.randn(2, 7, 24)
    layer, called = model.get_base_model()[1], []
    part = layer.base_layer if kind == "base" else layer.lora_A["default"]
    if kind == "replaced":
        own = part.forward
        part.forward = lambda x: called.append(x) or own(x)
    else:
        part.register_forward_pre_hook(lambda *given: called.append(given))
    ours = result(model, x)
    assert len(called) == 1
    as_peft(monkeypatch)
    for own, expected in zip(ours, result(model, x), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


def test_no_rows():
    output, gradient, *_ = result(adapted(), torch.randn(2, 0, 24))
    assert output.shape == (2, 0, 16) and gradient.shape == (2, 0, 24)


def test_in_the_inner_loop_its_weights_are_constants():
    model, products = adapted(0.3), []
    for context in (inner_pass([]), contextlib.nullcontext()):
        x = torch.randn(3, 24, requires_grad=True)
        with context:
            output = model(x)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(output.sum(), x)
        products.append(counter.get_total_flops())
    assert products[1] - products[0] == 2 * 3 * 4 * (24 + 40 + 40 + 16), "three rows, rank 4"


def test_layers_of_others_are_peft_s(monkeypatch):
    class Other(nn.Linear):
        pass

    other = peft.get_peft_model(nn.Sequential(Other(4, 4)), StockLoraConfig(target_modules=["0"]).on(nn.Sequential()))
    assert type(other.get_base_model()[0]) is lora.Linear
    config = StockLoraConfig(target_modules=["0"], fan_in_fan_out=True)
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True"):
        turned = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config.on(nn.Sequential()))
    assert type(turned.get_base_model()[0]) is lora.Linear


def test_merged_and_disabled():
    model, x = adapted().eval(), torch.randn(7, 24)
    expected = model(x)
    with model.disable_adapter():
        without = model(x)
    assert not torch.equal(without, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
