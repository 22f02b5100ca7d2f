"""The backward pass that is written out for all experts, against finite differences; and what is kept for it."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from conftest import assert_close_relative
from test_moe import experts_of, routing
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dllm_memdlm.backbones import grouped, moe
from dllm_memdlm.backbones import routes as moe_routes
from dllm_memdlm.backbones.experts import ExpertLinear
from dllm_memdlm.backbones.lora import ExpertLora
from dllm_memdlm.backbones.moe import RoutedExperts, inner_pass
from dllm_memdlm.backbones.routes import Routes
from dllm_memdlm.backbones.site_weights import SiteWeights

WIDTHS = {"gate_proj": (4, 3), "up_proj": (4, 3), "down_proj": (3, 4)}


def small_experts(activation: str = "silu", lora: bool = False, dropout: float = 0.0) -> RoutedExperts:
    torch.manual_seed(0)
    experts = RoutedExperts(3, 4, 3, activation).double()
    if lora:
        config = peft.LoraConfig(r=2, lora_alpha=6, lora_dropout=dropout, target_modules=list(WIDTHS))
        config._register_custom_module({ExpertLinear: ExpertLora})
        peft.inject_adapter_in_model(config, experts)
        for name, parameter in experts.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter, dtype=torch.float64)
    return experts


def fast_weights(samples: int, full: bool = False) -> dict[str, SiteWeights]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(3, samples, *shape, generator=generator, dtype=torch.float64).requires_grad_()

    if full:
        return {name: SiteWeights(None, draw(rows, columns), 1.0) for name, (columns, rows) in WIDTHS.items()}
    return {name: SiteWeights(draw(2, columns), draw(rows, 2), 0.5) for name, (columns, rows) in WIDTHS.items()}


@pytest.mark.parametrize(
    ("settings", "fast"),
    [
        ({}, {}),
        ({"activation": "gelu"}, {}),
        ({"lora": True}, {}),
        ({"lora": True, "dropout": 0.4}, {}),
        ({"lora": True}, fast_weights(1)),
        ({"lora": True, "dropout": 0.4}, fast_weights(2)),
        ({}, fast_weights(2, full=True)),
    ],
    ids=["weights", "gelu", "lora", "dropout", "shared fast weights", "fast weights", "full fast weights"],
)
def test_gradients_are_those_of_finite_differences(settings, fast):
    experts = small_experts(**settings)
    experts.fast.update(fast)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.rand(2, 3, 2, generator=generator, dtype=torch.float64).requires_grad_()
    chosen = torch.tensor([[[0, 2], [2, 0], [1, 0]], [[0, 2], [0, 2], [2, 0]]])  # expert 1 has one row
    trained = [p for p in experts.parameters() if p.requires_grad]
    trained += [m for site in fast.values() for m in (site.down, site.up) if m is not None]

    def output(*_: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same dropout every time
        return experts(x, chosen, weights)

    assert torch.autograd.gradcheck(output, (x, weights, *trained))


def test_dropout_keeps_the_expected_value_and_ends_with_training():
    experts = small_experts(lora=True, dropout=0.5)
    x, chosen, weights = routing(torch.float64, [0, 1, 2])
    x = x[..., :4]
    dropped = torch.stack([experts(x, chosen, weights) for _ in range(4)])
    assert not torch.equal(dropped[0], dropped[1])
    experts.eval()
    assert torch.equal(experts(x, chosen, weights), experts(x, chosen, weights))
    for linear in (part for part in experts.modules() if isinstance(part, ExpertLora)):
        linear.lora_dropout["default"] = nn.Identity()
    experts.train()
    assert torch.equal(experts(x, chosen, weights), experts(x, chosen, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_groups_than_the_kernel_takes_go_some_samples_at_a_time(monkeypatch, dtype):
    experts = experts_of(dtype, lora=True)
    generator = torch.Generator().manual_seed(4)
    shapes = {"gate_proj": (16, 8), "up_proj": (16, 8), "down_proj": (8, 16)}
    experts.fast.update(
        {
            name: SiteWeights(
                torch.randn(6, 5, 8, i, generator=generator), torch.randn(6, 5, o, 8, generator=generator), 0.1
            )
            for name, (i, o) in shapes.items()
        }
    )
    x = torch.randn(5, 7, 16, generator=generator).to(dtype)
    chosen = torch.rand(5, 7, 6, generator=generator).topk(2).indices
    weights = torch.rand(5, 7, 2, generator=generator).to(dtype)
    together = experts(x, chosen, weights)
    monkeypatch.setattr(moe, "MAX_GROUPS", 12)  # two samples of six experts
    assert_close_relative(experts(x, chosen, weights), together, 1e-6 if dtype == torch.float32 else 2e-2)
    assert grouped.MAX_GROUPS == 1023, "CUDA's kernel refuses 1,024"


def test_little_is_kept_for_the_backward_pass():
    """Gate's and up's output and the low-rank products; not the sorted rows, nor anything in between."""
    experts = experts_of(torch.float32, lora=True, count=6, hidden=64, width=32)
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
    experts = small_experts(lora=True)
    experts.fast.update(fast_weights(2))
    x, chosen, weights = routing(torch.float64, [0, 1, 2])
    leaves = [m for site in experts.fast.values() for m in (site.down, site.up)]

    def gradients() -> tuple[list[Tensor], Tensor]:
        output = experts(x[..., :4], chosen, weights)
        return list(torch.autograd.grad(output.sum(), leaves, retain_graph=True)), output

    expected, _ = gradients()
    with inner_pass([experts]):
        found, output = gradients()
    assert all(map(torch.equal, found, expected))
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(output.sum(), [p for p in experts.parameters() if p.requires_grad])
    experts(x[..., :4], chosen, weights).sum().backward()
    assert all(p.grad is not None for p in experts.parameters() if p.requires_grad)


def small_fast_weights(samples: int, full: bool = False) -> dict[str, SiteWeights]:
    generator = torch.Generator().manual_seed(5)

    def draw(*size: int) -> Tensor:
        return torch.randn(6, samples, *size, generator=generator)

    widths = {"gate_proj": (16, 8), "up_proj": (16, 8), "down_proj": (8, 16)}
    if full:
        return {name: SiteWeights(None, draw(rows, columns), 1.0) for name, (columns, rows) in widths.items()}
    return {name: SiteWeights(draw(8, columns), draw(rows, 8), 0.1) for name, (columns, rows) in widths.items()}


def sorted_and_padded(experts: RoutedExperts, inputs: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch):
    """Outputs and all gradients, without padding and with it."""
    results, padded = [], spy_on(monkeypatch)
    for few in (0, 32):
        monkeypatch.setattr(moe, "FEW_ROWS", few)
        torch.manual_seed(3)
        x, chosen, weights = (value.detach().clone() for value in inputs)
        fast = [m for site in experts.fast.values() for m in (site.down, site.up) if m is not None]
        leaves = [leaf.requires_grad_() for leaf in (x, weights, *fast)]
        leaves += [p for p in experts.parameters() if p.requires_grad]
        output = experts(x, chosen, weights)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), leaves)])
    assert padded == [False, True]
    return zip(*results, strict=True)


@pytest.mark.parametrize("samples", [0, 1, 2])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_padded_is_as_sorted(dtype, lora, samples, monkeypatch):
    """Nothing goes through fillers, forward or backward."""
    experts = experts_of(dtype, lora=lora)
    experts.fast.update(small_fast_weights(samples) if samples else {})
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 4e-2)
    for expected, found in sorted_and_padded(experts, routing(dtype, [0, 2, 3, 5]), monkeypatch):
        assert_close_relative(found, expected, tolerance)


def test_fillers_draw_no_dropout(monkeypatch):
    experts = experts_of(torch.float64, lora=True)
    for linear in (experts.gate_proj, experts.up_proj, experts.down_proj):
        linear.lora_dropout["default"] = nn.Dropout(0.4)
    for expected, found in sorted_and_padded(experts, routing(torch.float64, [0, 2, 3, 5]), monkeypatch):
        assert_close_relative(found, expected, 1e-12)


def test_full_size_fast_weights_are_padded_too(monkeypatch):
    experts = experts_of(torch.float32, lora=False)
    experts.fast.update(small_fast_weights(2, full=True))
    for expected, found in sorted_and_padded(experts, routing(torch.float32, [0, 2, 3, 5]), monkeypatch):
        assert_close_relative(found, expected, 2e-6)


def test_padded_under_autocast_and_without_values(monkeypatch):
    experts, inputs = experts_of(torch.float32, lora=True), routing(torch.float32, [0, 2, 3, 5])
    with torch.autocast("cpu", torch.bfloat16):
        for expected, found in sorted_and_padded(experts, inputs, monkeypatch):
            assert_close_relative(found, expected, 2e-2)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert experts(*map(mode.from_tensor, inputs)).shape == inputs[0].shape


def test_no_tokens():
    experts = experts_of(torch.float32, lora=True)
    x, chosen, weights = (part[:, :0] for part in routing(torch.float32, [0, 2]))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert experts(x, chosen, weights).shape == (2, 0, 16)


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
    x, chosen, weights = inputs
    monkeypatch.setattr(moe, "FEW_ROWS", 5)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            experts.train(grad)(*inputs)
    monkeypatch.setattr(moe, "FEW_ROWS", 4)
    experts(*inputs)
    two_of_six = x[:1, :1], chosen[:1, :1], weights[:1, :1]
    experts(*two_of_six)
    monkeypatch.setattr(moe_routes, "START", 16 * 8 - 1)
    experts(*two_of_six)
    assert padded == [True, True, False, True, False]


def test_padding(monkeypatch):
    chosen = torch.tensor([[[0, 3], [3, 0], [3, 1]]])
    routes = Routes.of(chosen, experts=4, samples=1).padded(2**20)
    assert routes.offsets is None and routes.fast_offsets is None
    assert routes.tokens.view(4, 3)[[0, 0, 1, 3, 3, 3], [0, 1, 0, 0, 1, 2]].tolist() == [0, 1, 2, 0, 1, 2]
    assert routes.back.tolist() == [[0, 9], [10, 1], [11, 3]]
    weights = torch.arange(1.0, 7.0)
    assert routes.weights(weights)[routes.back, 0].flatten().equal(weights)
    assert routes.weights(weights).sum() == weights.sum(), "fillers have none"
    unpadded = Routes.of(chosen, experts=4, samples=1)
    monkeypatch.setattr(moe_routes, "CHEAP_ROWS", 2)
    monkeypatch.setattr(moe_routes, "MOST_PADDING", 1.9)  # three rows for each of four experts are twice as many
    assert unpadded.padded(2**20) is unpadded


def test_offsets_are_contiguous():
    """CUDA's kernel reads them one after the other, whatever their strides; a CPU's does not."""
    routes = Routes.of(torch.tensor([[[0, 3], [3, 0]], [[3, 1], [1, 3]]]), experts=4, samples=2)
    assert routes.offsets.tolist() == [2, 4, 4, 8] and routes.fast_offsets.tolist() == [2, 2, 2, 4, 4, 4, 6, 8]
    assert routes.offsets.is_contiguous() and routes.fast_offsets.is_contiguous()
