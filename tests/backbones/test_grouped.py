"""Grouped products: kernel, loop, batched product, and one row at a time give the same numbers and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.device import Clock
from dllm_memdlm.backbones.grouped import grouped_linear, grouped_linear_loop, grouped_outer

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
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
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
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
            torch.testing.assert_close(actual.double(), of_it, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("widths", [(16, 32), (4, 3)], ids=str)
def test_which_cases_run_on_the_kernel(dtype, widths):
    """Of all widths, though it reads 16 bytes at a time; torch's loop over the groups is in it, on a CPU."""
    x, weight, offsets, upstream = make_case([3, 0, 5], *widths, dtype)
    with Clock() as clock:
        torch.autograd.grad(grouped_linear(x, weight, offsets), (x, weight), upstream)
        grouped_outer(upstream, x.detach(), offsets, 3)
    found = clock.calls["aten::_grouped_mm"], clock.calls["aten::mm"]
    assert found == (4, 0) if dtype != torch.float64 else found[0] == 0 < found[1]


def test_weights_take_the_dtype_of_the_rows():
    x, weight, offsets, _ = make_case([2, 3], 16, 8, torch.float32)
    y = grouped_linear(x.bfloat16(), weight, offsets)
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.float().square().sum(), weight)[0].dtype == torch.float32
