"""The LoRA of linear layers: PEFT's own forward pass is the reference."""

from __future__ import annotations

import contextlib

import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners import lora
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dllm_memdlm.backbones.lora import DenseLora
from dllm_memdlm.backbones.moe import frozen
from dllm_memdlm.backbones.stock_peft import StockLoraConfig


def adapted(base: nn.Module | None = None, dropout: float = 0.0, bias: bool = False) -> peft.PeftModel:
    torch.manual_seed(0)
    base = base or nn.Sequential(nn.Linear(24, 40, bias=bias), nn.Linear(40, 16, bias=False))
    targets = [str(number) for number in range(len(base))]
    config = StockLoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, init_lora_weights=False, target_modules=targets)
    return peft.get_peft_model(base, config.on(base))


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


def same_as_peft(model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tolerance: float = 1e-5) -> None:
    ours = result(model, x)
    for layer in model.get_base_model():
        theirs = lora.Linear if isinstance(layer, lora.Linear) else lora.Linear4bit
        monkeypatch.setattr(type(layer), "forward", theirs.forward)
    for own, expected in zip(ours, result(model, x), strict=True):
        assert own.dtype == expected.dtype
        torch.testing.assert_close(own, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize(("dropout", "bias"), [(0.0, False), (0.3, False), (1.0, False), (0.3, True)])
def test_as_peft_forward_and_backward(dropout, bias, monkeypatch):
    model = adapted(dropout=dropout, bias=bias)
    layer = model.get_base_model()[1]
    assert type(layer) is DenseLora and layer(torch.randn(2, 0, 40)).shape == (2, 0, 16)
    same_as_peft(model, torch.randn(2, 7, 24), monkeypatch)


def test_several_adapters_as_peft(monkeypatch):
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["0", "1"]))
    model.base_model.set_adapter(["default", "other"])
    same_as_peft(model, torch.randn(2, 7, 24), monkeypatch)


@pytest.mark.parametrize("bias", [False, True])
def test_on_a_layer_in_4_bit(bias, monkeypatch):
    packed = nn.Sequential(Linear4bit(64, 64, bias=bias, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")
    model, x = adapted(packed), torch.randn(2, 7, 64)
    assert isinstance(model.get_base_model()[0], lora.Linear4bit) and ("_Addition" in str(model(x).grad_fn)) != bias
    same_as_peft(model, x, monkeypatch)


def test_adapters_in_another_dtype_are_peft_s_own(monkeypatch):
    base = nn.Sequential(nn.Linear(24, 40, bias=False)).bfloat16()  # PEFT's adapters are in float32
    same_as_peft(adapted(base), torch.randn(2, 7, 24).bfloat16(), monkeypatch, tolerance=0)


def test_under_autocast_no_farther_from_float64_than_peft(monkeypatch):
    model, x = adapted(), torch.randn(2, 7, 24).bfloat16()
    ours = result(model, x, autocast=True)
    monkeypatch.setattr(DenseLora, "forward", lora.Linear.forward)
    theirs, exact = result(model, x, autocast=True), result(model.double(), x.double())
    for own, other, expected in zip(ours, theirs, exact, strict=True):
        assert own.dtype == other.dtype
        assert (own - expected).norm() < 1.1 * (other - expected).norm() + 1e-3 * expected.norm()


@pytest.mark.parametrize("kind", ["base", "down", "replaced"])
def test_layers_that_somebody_waits_for_are_called(kind, monkeypatch):
    """ZeRO-3 and accelerate bring a layer's weights when it is called; others want to see what it gives."""
    model, x, called = adapted(), torch.randn(2, 7, 24), []
    layer = model.get_base_model()[1]
    part = layer.base_layer if kind == "base" else layer.lora_A["default"]
    if kind == "replaced":
        own = part.forward
        part.forward = lambda x: called.append(x) or own(x)
    else:
        part.register_forward_pre_hook(lambda *given: called.append(given))
    model(x)
    assert len(called) == 1
    same_as_peft(model, x, monkeypatch)


def test_in_the_inner_loop_its_weights_are_constants():
    model, products = adapted(dropout=0.3), []
    for context in (frozen([]), contextlib.nullcontext()):
        x = torch.randn(3, 24, requires_grad=True)
        with context:
            output = model(x)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(output.sum(), x)
        products.append(counter.get_total_flops())
    assert products[1] - products[0] == 2 * 3 * 4 * (24 + 40 + 40 + 16), "three rows, rank 4"


def test_layers_of_others_are_peft_s():
    class Other(nn.Linear):
        pass

    config = StockLoraConfig(target_modules=["0"], fan_in_fan_out=True)
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True"):
        turned = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config.on(nn.Sequential()))
    for model in (adapted(nn.Sequential(Other(4, 4))), turned):
        assert type(model.get_base_model()[0]) is lora.Linear


def test_merged_and_disabled():
    model, x = adapted().eval(), torch.randn(7, 24)
    expected = model(x)
    with model.disable_adapter():
        assert not torch.equal(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)
