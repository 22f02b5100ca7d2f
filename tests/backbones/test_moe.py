"""Routed experts: sorted, packed and grouped against a loop over experts."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from conftest import assert_close_relative, take_gradients, tiny
from inputs import tokens
from torch import Tensor, nn

from benchmarks.naive_experts import LoopOverExperts
from dllm_memdlm.backbones.experts import ExpertLinear
from dllm_memdlm.backbones.lora import ExpertLora
from dllm_memdlm.backbones.moe import RoutedExperts
from dllm_memdlm.backbones.site_weights import SiteWeights

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2}
WIDTHS = {"gate_proj": (16, 8), "up_proj": (16, 8), "down_proj": (8, 16)}


def experts_of(
    dtype: torch.dtype, lora: bool, count: int = 6, hidden: int = 16, width: int = 8, **settings: Any
) -> RoutedExperts:
    """Routed experts, of which LoRA leaves nothing but its own weights to be trained."""
    torch.manual_seed(0)
    experts = RoutedExperts(count, hidden, width, settings.pop("activation", "silu")).to(dtype)
    if lora:
        config = peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": list(WIDTHS), **settings})
        config._register_custom_module({ExpertLinear: ExpertLora})
        peft.inject_adapter_in_model(config, experts)
        for name, parameter in experts.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
            parameter.data = parameter.data.to(dtype)
    return experts


def routing(dtype: torch.dtype, used: list[int], top_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 7, 16, generator=generator).to(dtype)
    orders = torch.stack([torch.randperm(len(used), generator=generator)[:top_k] for _ in range(14)])
    weights = torch.rand(2, 7, top_k, generator=generator).to(dtype)
    return x, torch.tensor(used)[orders].view(2, 7, top_k), weights


def fast_weights(samples: int, full: bool = False, count: int = 6, widths: Any = None) -> dict[str, SiteWeights]:
    generator = torch.Generator().manual_seed(5)

    def draw(*size: int) -> Tensor:
        return torch.randn(count, samples, *size, generator=generator)

    sizes = (widths or WIDTHS).items()
    if full:
        return {name: SiteWeights(None, draw(rows, columns), 1.0) for name, (columns, rows) in sizes}
    return {name: SiteWeights(draw(8, columns), draw(rows, 8), 0.1) for name, (columns, rows) in sizes}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("used", [[0, 1, 2, 3, 4, 5], [1, 4]], ids=["all", "few"])
def test_sorted_experts_are_a_loop_over_experts(dtype, lora, used):
    experts = experts_of(dtype, lora)
    results = []
    for run in (experts, LoopOverExperts(experts)):
        x, chosen, weights = routing(dtype, used)
        output = run(x.requires_grad_(), chosen, weights.requires_grad_())
        output.square().sum().backward()
        results.append([output, x.grad, weights.grad, *(p.grad for p in experts.parameters() if p.requires_grad)])
        experts.zero_grad()
    assert results[0][0].dtype == dtype
    for number, (ours, plain) in enumerate(zip(*results, strict=True)):
        if number < 3:
            assert_close_relative(ours, plain, TOLERANCE[dtype])
            continue
        for expert, (part, expected) in enumerate(zip(ours, plain, strict=True)):
            assert_close_relative(part, expected, 2 * TOLERANCE[dtype])
            assert bool(part.any()) == (expert in used)


def test_a_float32_lora_on_bfloat16_experts_computes_in_bfloat16(products):
    """As PEFT loads adapters: in float32 a GPU has no grouped product. PEFT itself widens each expert's input."""
    experts = experts_of(torch.bfloat16, lora=True)
    for name, parameter in experts.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    results = []
    for run in (experts, LoopOverExperts(experts)):
        run(*routing(torch.bfloat16, [0, 1, 2, 3, 4, 5])).float().square().sum().backward()
        results.append([p.grad for p in experts.parameters() if p.requires_grad])
        experts.zero_grad()
    assert products == {torch.bfloat16}
    for gradient, expected in zip(*results, strict=True):
        assert gradient.dtype == torch.float32
        assert_close_relative(gradient, expected, 2 * TOLERANCE[torch.bfloat16])


def test_disabled_and_merged_adapters_are_followed():
    experts, inputs = experts_of(torch.float32, lora=True), routing(torch.float32, [0, 1, 2])
    layers = [module for module in experts.modules() if isinstance(module, ExpertLora)]
    with_adapters = experts(*inputs)
    for layer in layers:
        layer.merge()
    assert_close_relative(experts(*inputs), with_adapters, 1e-5)
    for layer in layers:
        layer.unmerge()
        layer.enable_adapters(False)
    plain = LoopOverExperts(experts)(*inputs)
    assert not torch.allclose(plain, with_adapters, atol=1e-2)
    assert_close_relative(experts(*inputs), plain, 1e-5)
    nn.init.constant_(layers[0].lora_A["default"].weight, torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        layers[0].merge(safe_merge=True)


@pytest.mark.parametrize("kind", ["llada_moe", "llada2"])
@pytest.mark.parametrize("lora", [False, True])
def test_experts_that_no_token_chose_have_a_gradient(kind, lora):
    model = tiny(kind, lora=lora, num_experts=24)
    model(input_ids=tokens()[:1, :3]).logits.square().sum().backward()
    gradients = take_gradients(model)  # none missing
    experts = {name: g for name, g in gradients.items() if ".experts." in name}
    assert len(experts) == sum(isinstance(m, RoutedExperts) for m in model.modules()) * (6 if lora else 3)
    assert all(len(g) == 24 and 0 < g.flatten(1).any(1).sum() < 12 for g in experts.values())
