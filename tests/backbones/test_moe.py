"""Routed experts: sorted, packed and grouped against a loop over experts.

The backward pass, which is written out, against finite differences; and what is kept for it.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from conftest import assert_close_relative
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.naive_experts import LoopOverExperts
from dllm_memdlm.backbones import moe
from dllm_memdlm.backbones import routes as moe_routes
from dllm_memdlm.backbones.experts import ExpertLinear
from dllm_memdlm.backbones.lora import ExpertLora
from dllm_memdlm.backbones.moe import RoutedExperts, frozen
from dllm_memdlm.backbones.routes import Routes
from dllm_memdlm.backbones.site_weights import SiteWeights

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2}
WIDTHS = {"gate_proj": (16, 8), "up_proj": (16, 8), "down_proj": (8, 16)}
CASES = {
    "weights": ({}, None),
    "gelu": ({"activation": "gelu"}, None),
    "lora": ({"lora": True}, None),
    "dropout": ({"lora": True, "lora_dropout": 0.4}, None),
    "shared fast weights": ({"lora": True}, (1, False)),
    "fast weights": ({"lora": True, "lora_dropout": 0.4}, (2, False)),
    "full fast weights": ({}, (2, True)),
}


def experts_of(
    dtype: torch.dtype, lora: bool = False, hidden: int = 16, width: int = 8, **settings: Any
) -> RoutedExperts:
    """Routed experts, of which LoRA leaves nothing but its own weights to be trained."""
    torch.manual_seed(0)
    experts = RoutedExperts(6, hidden, width, settings.pop("activation", "silu")).to(dtype)
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


def fast_weights(samples: int, full: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, SiteWeights]:
    generator = torch.Generator().manual_seed(5)

    def draw(*size: int) -> Tensor:
        return torch.randn(6, samples, *size, generator=generator).to(dtype)

    if full:
        return {name: SiteWeights(None, draw(rows, columns), 1.0) for name, (columns, rows) in WIDTHS.items()}
    return {name: SiteWeights(draw(8, columns), draw(rows, 8), 0.1) for name, (columns, rows) in WIDTHS.items()}


def leaves_of(experts: RoutedExperts) -> list[Tensor]:
    """What a gradient is taken by: fast weights, and what trains."""
    fast = [m.requires_grad_() for site in experts.fast.values() for m in (site.down, site.up) if m is not None]
    return fast + [p for p in experts.parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lora", [False, True])
def test_sorted_experts_are_a_loop_over_experts(dtype, lora):
    """Experts that no token chose have a gradient, too: zeros, or ranks that hit others would wait for each other."""
    experts, used = experts_of(dtype, lora), [1, 2, 4]
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


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_finite_differences(case):
    settings, samples = CASES[case]
    experts = experts_of(torch.float64, **settings)
    if samples is not None:
        experts.fast.update(fast_weights(*samples, dtype=torch.float64))
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 16, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.rand(2, 3, 2, generator=generator, dtype=torch.float64).requires_grad_()
    chosen = torch.tensor([[[0, 2], [2, 0], [1, 0]], [[0, 2], [0, 2], [2, 0]]])  # expert 1 has one row

    def output(*_: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same dropout every time
        return experts(x, chosen, weights)

    assert torch.autograd.gradcheck(output, (x, weights, *leaves_of(experts)), fast_mode=True, atol=1e-7, rtol=1e-5)
    assert torch.equal(experts(x, chosen, weights), output()) == ("lora_dropout" not in settings), "drawn anew"


def test_more_groups_than_the_kernel_takes_go_some_samples_at_a_time(monkeypatch):
    assert moe.MAX_GROUPS == 1023, "CUDA's kernel refuses 1,024"
    experts = experts_of(torch.float32, lora=True)
    experts.fast.update(fast_weights(5))
    x, chosen, weights = torch.randn(5, 7, 16), torch.rand(5, 7, 6).topk(2).indices, torch.rand(5, 7, 2)
    together = experts(x, chosen, weights)
    monkeypatch.setattr(moe, "MAX_GROUPS", 12)  # two samples of six experts
    assert_close_relative(experts(x, chosen, weights), together, 1e-6)
    with pytest.raises(ValueError, match="fast weights of 5 samples on a batch of 4"):
        experts(x[:4], chosen[:4], weights[:4])


def test_little_is_kept_for_the_backward_pass():
    """Gate's and up's output and the low-rank products; not the sorted rows, nor anything in between."""
    experts = experts_of(torch.float32, lora=True, hidden=64, width=32)
    x = torch.randn(2, 50, 64, requires_grad=True)
    chosen, weights = torch.rand(2, 50, 6).topk(2).indices, torch.rand(2, 50, 2)
    rows, kept = 2 * 50 * 2, {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.dim() == 2:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        experts(x, chosen, weights)
    for given in (x, *experts.parameters()):
        kept.pop(given.data_ptr(), None)
    assert sum(tensor.numel() for tensor in kept.values()) == rows * (1 + 2 * 32 + 3 * 8)


def test_in_the_inner_loop_only_fast_weights_have_gradients():
    experts, inputs, found = experts_of(torch.float64, lora=True), routing(torch.float64, [0, 1, 2]), []
    experts.fast.update(fast_weights(2, dtype=torch.float64))
    leaves = leaves_of(experts)
    leaves, trained = leaves[:6], leaves[6:]
    for context in (frozen([]), frozen([experts])):
        with context:
            output = experts(*inputs)
        found.append(torch.autograd.grad(output.sum(), leaves, retain_graph=True))
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(output.sum(), trained)
    expected = torch.autograd.grad(experts(*inputs).sum(), leaves + trained)
    assert all(map(torch.equal, found[0] + found[1], expected[: len(leaves)] * 2)) and all(g.any() for g in expected)


@pytest.mark.parametrize("samples", [None, (1,), (2,), (2, True)], ids=str)
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, "autocast"], ids=str)
def test_padded_is_as_sorted(dtype, lora, samples, monkeypatch):
    """Nothing goes through fillers, forward or backward, and they draw no dropout."""
    own = torch.float32 if dtype == "autocast" else dtype
    experts = experts_of(own, lora=lora)
    experts.fast.update({} if samples is None else fast_weights(*samples))
    for linear in (experts.gate_proj, experts.up_proj, experts.down_proj) if lora else ():
        linear.lora_dropout["default"] = nn.Dropout(0.4)
    results, padded = [], spy_on(monkeypatch)
    for few in (0, 32):
        monkeypatch.setattr(moe, "FEW_ROWS", few)
        torch.manual_seed(3)
        x, chosen, weights = routing(own, [0, 2, 3, 5])
        leaves = [x.requires_grad_(), weights.requires_grad_(), *leaves_of(experts)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            output = experts(x, chosen, weights)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), leaves)])
    assert padded == [False, True]
    for expected, found in zip(*results, strict=True):
        assert_close_relative(found, expected, {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 4e-2))


@pytest.mark.parametrize("grad", [True, False])
def test_no_tokens_and_no_values(grad, monkeypatch):
    experts, inputs = experts_of(torch.float32, lora=True), routing(torch.float32, [0, 2])
    with torch.set_grad_enabled(grad):
        assert experts(*(part[:, :0] for part in inputs)).shape == (2, 0, 16)
    monkeypatch.setattr(moe, "FEW_ROWS", 32)  # torch knows no shapes of the kernel in float32
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert experts(*map(mode.from_tensor, inputs)).shape == inputs[0].shape


def spy_on(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the rows of each pass were padded."""
    if torch.get_default_device().type != "cpu":
        pytest.skip("a GPU pads no rows")
    padded, run = [], moe.expert_ffn

    def spy(x: Tensor, weights: Tensor, routes: Routes, *rest: Any) -> Tensor:
        padded.append(routes.offsets is None)
        return run(x, weights, routes, *rest)

    monkeypatch.setattr(moe, "expert_ffn", spy)
    return padded


def test_what_is_padded(monkeypatch):
    """Few rows, of at least half of the experts; whatever the mode, as a pass that is repeated must draw alike."""
    experts, padded = experts_of(torch.float32, lora=True), spy_on(monkeypatch)
    inputs = routing(torch.float32, [0, 1, 2, 3, 4, 5])  # 28 rows for 6 experts
    two_of_six = [part[:1, :1] for part in inputs]
    for few, grad in ((5, True), (5, False), (4, True)):
        monkeypatch.setattr(moe, "FEW_ROWS", few)
        with torch.set_grad_enabled(grad):
            experts.train(grad)(*inputs)
    for start in (2**18, 16 * 8 - 1):
        monkeypatch.setattr(moe_routes, "START", start)
        experts(*two_of_six)
    assert padded == [True, True, False, True, False]


def test_offsets_are_contiguous():
    """CUDA's kernel reads them one after the other, whatever their strides; a CPU's does not."""
    routes = Routes.of(torch.tensor([[[0, 3], [3, 0]], [[3, 1], [1, 3]]]), experts=4, samples=2)
    assert routes.offsets.tolist() == [2, 4, 4, 8] and routes.fast_offsets.tolist() == [2, 2, 2, 4, 4, 4, 6, 8]
    assert routes.offsets.is_contiguous() and routes.fast_offsets.is_contiguous()
