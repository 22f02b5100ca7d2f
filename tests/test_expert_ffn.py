"""The backward pass that is written out for all experts, against finite differences; and what is kept for it."""

from __future__ import annotations

import peft
import pytest
import torch
from conftest import assert_close_relative
from test_moe import experts_of, routing
from torch import Tensor, nn

from dllm_memdlm import grouped
from dllm_memdlm.backbones import moe
from dllm_memdlm.backbones.layers import GatedMLP
from dllm_memdlm.backbones.moe import RoutedExperts, held_still, inner_pass
from dllm_memdlm.fast_weights import SiteWeights

WIDTHS = {"gate_proj": (4, 3), "up_proj": (4, 3), "down_proj": (3, 4)}


def small_experts(activation: str = "silu", lora: bool = False, dropout: float = 0.0) -> RoutedExperts:
    torch.manual_seed(0)
    experts = RoutedExperts(GatedMLP(4, 3, activation) for _ in range(3)).double()
    if lora:
        config = peft.LoraConfig(r=2, lora_alpha=6, lora_dropout=dropout, target_modules=list(WIDTHS))
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
def test_gradients_are_those_of_finite_differences(settings, fast, in_turn):
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


def test_dropout_keeps_the_expected_value_and_ends_with_training(in_turn):
    experts = small_experts(lora=True, dropout=0.5)
    x, chosen, weights = routing(torch.float64, [0, 1, 2])
    x = x[..., :4]
    dropped = torch.stack([experts(x, chosen, weights) for _ in range(4)])
    assert not torch.equal(dropped[0], dropped[1])
    experts.eval()
    assert torch.equal(experts(x, chosen, weights), experts(x, chosen, weights))
    for linear in (part for part in experts.modules() if isinstance(part, peft.tuners.lora.Linear)):
        linear.lora_dropout["default"] = nn.Identity()
    experts.train()
    assert torch.equal(experts(x, chosen, weights), experts(x, chosen, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_groups_than_the_kernel_takes_go_some_samples_at_a_time(monkeypatch, dtype, in_turn):
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


def test_little_is_kept_for_the_backward_pass(in_turn):
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


def test_in_the_inner_loop_only_fast_weights_have_gradients(in_turn):
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


@pytest.mark.parametrize(("graph", "least", "expected"), [(True, 5, True), (False, 5, False), (False, 4, True)])
def test_few_rows_are_taken_in_turn_for_a_backward_pass_only(graph, least, expected, monkeypatch):
    experts, ways, run = experts_of(torch.float32, lora=True), [], moe.expert_ffn
    inputs = routing(torch.float32, [0, 1, 2, 3, 4, 5])  # 28 rows for 6 experts
    with_graph = experts(*inputs)
    monkeypatch.setattr(moe, "MANY_ROWS", least)
    monkeypatch.setattr(moe, "expert_ffn", lambda *arguments: ways.append(arguments[-1]) or run(*arguments))
    with torch.set_grad_enabled(graph):
        assert_close_relative(experts(*inputs), with_graph, 1e-6)
    with held_still([experts]):  # what is held for one way is not taken for the other
        for enabled in (True, False, True):
            with torch.set_grad_enabled(enabled):
                assert_close_relative(experts(*inputs), with_graph, 1e-6)
    assert ways == [expected, True, least == 4, True]


def test_a_pass_gives_the_same_bits_after_few_rows_went_at_once():
    """Where in memory a matrix lies can change how its products round."""
    experts, inputs = experts_of(torch.float32, lora=True), routing(torch.float32, [0, 1, 2, 3, 4, 5])
    for parameter in experts.parameters():  # as in a checkpoint's file
        parameter.data = torch.empty(parameter.numel() + 1)[1:].view_as(parameter).copy_(parameter.data)
    before = experts(*inputs)
    places = [parameter.data_ptr() for parameter in experts.parameters()]
    with torch.no_grad():
        experts(*inputs)
    assert torch.equal(experts(*inputs), before)
    assert places == [parameter.data_ptr() for parameter in experts.parameters()]


@pytest.mark.parametrize("samples", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_turn_is_as_at_once(dtype, samples, monkeypatch):
    experts = experts_of(dtype, lora=True)
    results = []
    for in_turn in (True, False):
        monkeypatch.setattr(RoutedExperts, "in_turn", in_turn)
        generator = torch.Generator().manual_seed(5)
        for name, (columns, rows) in {"gate_proj": (16, 8), "up_proj": (16, 8), "down_proj": (8, 16)}.items():
            down = torch.randn(6, samples, 8, columns, generator=generator).requires_grad_()
            up = torch.randn(6, samples, rows, 8, generator=generator).requires_grad_()
            experts.fast.update({name: SiteWeights(down, up, 0.1)} if samples else {})
        x, chosen, weights = routing(dtype, [0, 2, 3, 5])
        x.requires_grad_()
        output = experts(x, chosen, weights)
        output.square().sum().backward()
        fast = [m.grad for site in experts.fast.values() for m in (site.down, site.up)]
        results.append([output, x.grad, *fast, *(p.grad for p in experts.parameters() if p.requires_grad)])
        experts.zero_grad()
    for ours, together in zip(*results, strict=True):
        assert_close_relative(ours, together, 1e-6 if dtype == torch.float32 else 4e-2)


def test_what_is_held_still_is_stacked_once_and_let_go(monkeypatch):
    monkeypatch.setattr(RoutedExperts, "in_turn", False)
    experts = experts_of(torch.float32, lora=True)
    x, chosen, weights = routing(torch.float32, [0, 1, 2])
    expected = experts(x, chosen, weights)
    with held_still([experts]):
        with torch.no_grad():
            assert torch.equal(experts(x, chosen, weights), expected)
        output = experts(x, chosen, weights)
        stacked = experts._made_of(torch.float32, False, False)[0].adapters[0].down
        assert stacked.requires_grad and experts._made_of(torch.float32, False, False)[0].adapters[0].down is stacked
        with inner_pass([experts]):
            assert not experts._made_of(torch.float32, False, False)[0].adapters[0].down.requires_grad
        with held_still([experts]):  # within, it is the same
            assert experts._made_of(torch.float32, False, False)[0].adapters[0].down is stacked
        assert experts._held is not None
    output.sum().backward()
    assert all(p.grad is not None for p in experts.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.mul_(2)
    assert not torch.allclose(experts(x, chosen, weights), expected)
