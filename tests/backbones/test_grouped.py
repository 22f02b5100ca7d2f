"""Grouped products: kernel, loop, and one row at a time give the same numbers and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.device import Clock
from dllm_memdlm.backbones.grouped import grouped_linear, grouped_linear_loop, grouped_outer, split

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SIZES = [[3, 5, 2], [0, 4, 0, 0, 6], [7, 0], [1], [0, 0, 9]]


def make_case(
    sizes: list[int], inner: int, outer: int, dtype: torch.dtype, requires_grad: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, offsets, and the gradient that comes back."""
    generator = torch.Generator().manual_seed(sum(sizes) + inner + outer)
    x = torch.randn(sum(sizes), inner, generator=generator, dtype=torch.float64) / inner**0.5
    weight = torch.randn(len(sizes), outer, inner, generator=generator, dtype=torch.float64)
    upstream = torch.randn(sum(sizes), outer, generator=generator, dtype=torch.float64)
    offsets = torch.tensor(sizes).cumsum(0).to(torch.int32)
    x, weight = (value.to(dtype).requires_grad_(requires_grad) for value in (x, weight))
    return x, weight, offsets, upstream.to(dtype)


def explicit(x: Tensor, weight: Tensor, sizes: list[int], upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the gradients of x and weight, row by row in float64."""
    x, weight, upstream = x.detach().double(), weight.detach().double(), upstream.double()
    y = torch.zeros(len(x), weight.shape[1], dtype=torch.float64)
    grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
    group_of_row = [g for g, size in enumerate(sizes) for _ in range(size)]
    for row, g in enumerate(group_of_row):
        y[row] = weight[g] @ x[row]
        grad_x[row] = weight[g].T @ upstream[row]
        grad_weight[g] += torch.outer(upstream[row], x[row])
    return y, grad_x, grad_weight


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype and actual.shape == expected.shape
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("widths", [(16, 32), (16, 8), (6, 10), (16, 5), (7, 16)], ids=str)
@pytest.mark.parametrize("function", [grouped_linear, grouped_linear_loop], ids=lambda f: f.__name__)
def test_equals_row_by_row(function, widths, dtype, sizes):
    x, weight, offsets, upstream = make_case(sizes, *widths, dtype)
    y = function(x, weight, offsets)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), upstream)
    for actual, expected in zip((y, grad_x, grad_weight), explicit(x, weight, sizes, upstream), strict=True):
        assert_close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("widths", [(16, 32), (6, 16), (16, 12), (4, 3)], ids=str)
def test_which_cases_run_on_the_kernel(dtype, widths):
    """Of all widths, though it reads 16 bytes at a time; torch's loop over the groups is in it, on a CPU."""
    x, weight, offsets, upstream = make_case([3, 0, 5], *widths, dtype)
    with Clock() as clock:
        torch.autograd.grad(grouped_linear(x, weight, offsets), (x, weight), upstream)
        grouped_outer(upstream, x.detach(), offsets, 3)
    found = clock.calls["aten::_grouped_mm"], clock.calls["aten::mm"]
    assert found == (4, 0) if dtype != torch.float64 else found[0] == 0 < found[1]


@pytest.mark.parametrize("widths", [(16, 8), (6, 10)], ids=str)
def test_experts_without_rows_receive_zeros_as_gradient(widths):
    x, weight, offsets, upstream = make_case([0, 4, 0], *widths, torch.float32)
    (gradient,) = torch.autograd.grad(grouped_linear(x, weight, offsets), weight, upstream)
    assert not gradient[0].any() and not gradient[2].any()
    assert gradient[1].any()


@pytest.mark.parametrize("widths", [(16, 8), (6, 10)], ids=str)
def test_no_rows_at_all(widths):
    x, weight, offsets, upstream = make_case([0, 0, 0], *widths, torch.float32)
    y = grouped_linear(x, weight, offsets)
    assert y.shape == (0, widths[1])
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), upstream)
    assert grad_x.shape == x.shape and not grad_weight.any()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("widths", [(16, 32), (6, 10), (16, 5)], ids=str)
def test_outer_products_are_the_gradient_of_the_matrices(widths, dtype, sizes):
    x, _, offsets, upstream = make_case(sizes, *widths, dtype, requires_grad=False)
    zeros = torch.zeros(len(sizes), widths[1], widths[0])
    assert_close(grouped_outer(upstream, x, offsets, len(sizes)), explicit(x, zeros, sizes, upstream)[2], dtype)


@pytest.mark.parametrize("widths", [(16, 8), (6, 10)], ids=str)
def test_weights_take_the_dtype_of_the_rows(widths):
    x, weight, offsets, upstream = make_case([2, 3], *widths, torch.float32)
    y = grouped_linear(x.bfloat16(), weight, offsets)
    assert_close(y, explicit(x.bfloat16(), weight.bfloat16(), [2, 3], upstream)[0], torch.bfloat16)
    assert torch.autograd.grad(y.float().square().sum(), weight)[0].dtype == torch.float32


def test_split():
    rows = torch.arange(10)
    parts = split(rows, torch.tensor([3, 3, 8, 10], dtype=torch.int32))
    assert [part.tolist() for part in parts] == [[0, 1, 2], [], [3, 4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("widths", [(16, 32), (6, 10)], ids=str)
def test_groups_of_equally_many_rows(widths, dtype):
    x, weight, offsets, upstream = make_case([4, 4, 4], *widths, dtype, requires_grad=False)
    expected = explicit(x, weight, [4, 4, 4], upstream)[0]
    for where_they_end in (offsets, None):
        assert_close(grouped_linear(x, weight.double(), where_they_end), expected, dtype)
        outer = explicit(x, weight, [4, 4, 4], upstream)[2]
        assert_close(grouped_outer(upstream, x, where_they_end, 3), outer, dtype)
