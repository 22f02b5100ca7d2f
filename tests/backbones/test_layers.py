"""What the backbones are made of: grouped products, the loss without the logits, rotations and norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import assert_close_relative
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

from benchmarks.device import Clock
from dllm_memdlm.backbones import output
from dllm_memdlm.backbones.grouped import grouped_linear, grouped_linear_loop, grouped_outer
from dllm_memdlm.backbones.layers import RMSNorm, rotate
from dllm_memdlm.backbones.output import OutputLinear, token_nll

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, "autocast": 2e-2}
B, M, D, V = 2, 30, 16, 40


def layer_and_rows(dtype: torch.dtype, frozen: bool, bias: bool = False) -> tuple[OutputLinear, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = OutputLinear(D, V, bias=bias).to(dtype)
    layer.weight.requires_grad_(not frozen).data *= 4
    return layer, torch.randn(B, M, D).to(dtype).requires_grad_(), torch.randint(0, V, (B, M))


@pytest.mark.parametrize("chunk", [3 * V, 2**25], ids=["3 rows at a time", "at once"])
@pytest.mark.parametrize(("frozen", "bias"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_is_the_loss_of_the_logits(dtype, frozen, bias, chunk, monkeypatch):
    monkeypatch.setitem(output.CHUNK, "cpu", chunk)
    layer, rows, wanted = layer_and_rows(torch.float32 if dtype == "autocast" else dtype, frozen, bias)
    results = []
    for nll_of in (lambda: layer(rows, wanted), lambda: token_nll(layer(rows), wanted)):
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=dtype == "autocast"):
            nll = nll_of()
        (nll * torch.linspace(0, 2, B * M).view(B, M)).sum().backward()
        results.append([nll.detach(), rows.grad, layer.weight.grad])
        rows.grad = layer.weight.grad = None
    assert results[0][0].dtype == torch.promote_types(rows.dtype, torch.float32)
    for ours, plain in zip(*results, strict=True):
        assert (ours is None) == (plain is None)
        if plain is not None:
            assert ours.dtype == plain.dtype
            assert_close_relative(ours, plain, TOLERANCE[dtype])


class Largest(TorchDispatchMode):
    """The most elements that a tensor made within has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, out.numel() if isinstance(out, Tensor) else 0)
        return out


def test_all_the_logits_are_never_there(monkeypatch):
    monkeypatch.setitem(output.CHUNK, "cpu", 3 * V)
    layer, rows, wanted = layer_and_rows(torch.float32, frozen=True)
    with Largest() as largest:
        layer(rows, wanted).sum().backward()
    assert largest.elements == max(B * M * D, V * D, 3 * V) < B * M * V


@pytest.mark.parametrize("turned", [8, 4], ids=["all features", "half of them"])
def test_rotation(turned):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(1, 5, turned // 2, generator=generator, dtype=torch.float64).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    first, rest = x[..., :turned], x[..., turned:]
    expected = torch.cat([first * cos[:, None] + rotate_half(first) * sin[:, None], rest], dim=-1)
    torch.testing.assert_close(rotate(x, cos, sin), expected, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda value: rotate(value, cos, sin), (x,))
    low = rotate(x.detach().bfloat16().requires_grad_(), cos.float(), sin.float())
    assert low.dtype == torch.float32
    low.sum().backward()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("autocast", [False, True])
def test_norm(autocast, dtype, tolerance):
    results = []
    for kind in (LlamaRMSNorm, RMSNorm):
        norm = kind(16, eps=1e-5)
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        norm.weight.data = torch.linspace(0.5, 1.5, 16).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = norm(x)
        output.float().square().sum().backward()
        results.append((output, x.grad, norm.weight.grad))
    for expected, found in zip(*results, strict=True):
        assert_close_relative(found, expected, tolerance)
        assert found.dtype == dtype


GROUPED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SIZES = [[3, 5, 2], [0, 4, 0, 0, 6], [0, 0], [4, 4, 4]]


def make_case(sizes: list[int], inner: int, outer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, offsets, and the gradient that comes back."""
    generator = torch.Generator().manual_seed(sum(sizes) + inner + outer)
    x = torch.randn(sum(sizes), inner, generator=generator, dtype=torch.float64) / inner**0.5
    weight = torch.randn(len(sizes), outer, inner, generator=generator, dtype=torch.float64)
    upstream = torch.randn(sum(sizes), outer, generator=generator, dtype=torch.float64)
    x, weight = (value.to(dtype).requires_grad_() for value in (x, weight))
    return x, weight, torch.tensor(sizes).cumsum(0).to(torch.int32), upstream.to(dtype)


def explicit(x: Tensor, weight: Tensor, sizes: list[int], upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the gradients of x and weight, row by row in float64."""
    x, weight = (value.detach().double().requires_grad_() for value in (x, weight))
    of_rows = weight.repeat_interleave(torch.tensor(sizes), dim=0)
    y = (of_rows @ x[:, :, None])[:, :, 0]
    return y, *torch.autograd.grad(y, (x, weight), upstream.double())


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", GROUPED, ids=str)
@pytest.mark.parametrize("widths", [(16, 32), (6, 10), (16, 5)], ids=str)
def test_equals_row_by_row(widths, dtype, sizes):
    """Groups without rows receive zeros as gradient; where all have equally many no offsets are needed."""
    x, weight, offsets, upstream = make_case(sizes, *widths, dtype)
    expected = explicit(x, weight, sizes, upstream)
    ways = [(grouped_linear, offsets), (grouped_linear_loop, offsets)]
    ways += [(grouped_linear, None)] if len(set(sizes)) == 1 and sum(sizes) else []
    for function, ends in ways:
        y = function(x, weight, ends)
        found = y, *torch.autograd.grad(y, (x, weight), upstream), grouped_outer(upstream, x.detach(), ends, len(sizes))
        for actual, of_it in zip(found, (*expected, expected[2]), strict=True):
            assert actual.dtype == dtype and actual.shape == of_it.shape
            torch.testing.assert_close(actual.double(), of_it, atol=GROUPED[dtype], rtol=GROUPED[dtype])


@pytest.mark.parametrize("dtype", GROUPED, ids=str)
@pytest.mark.parametrize("widths", [(16, 32), (4, 3)], ids=str)
def test_which_cases_run_on_the_kernel(dtype, widths):
    """Of all widths, though it reads 16 bytes at a time; torch's loop over the groups is in it, on a CPU."""
    x, weight, offsets, upstream = make_case([3, 0, 5], *widths, dtype)
    with Clock() as clock:
        torch.autograd.grad(grouped_linear(x, weight, offsets), (x, weight), upstream)
        grouped_outer(upstream, x.detach(), offsets, 3)
    found = clock.calls["aten::_grouped_mm"], clock.calls["aten::mm"]
    assert found == (4, 0) if dtype != torch.float64 else found[0] == 0 < found[1]
