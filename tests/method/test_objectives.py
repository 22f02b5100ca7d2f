"""Inner objectives: what the naive step, which computes each in plain lines, does not show."""

from __future__ import annotations

import typing

import pytest
import torch
from torch import Tensor

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method.objectives import OBJECTIVES, kl, reverse_kl
from dllm_memdlm.method.reference import inner_loss

TAUGHT = {name: objective for name, objective in OBJECTIVES.items() if objective is not None}


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(2, 3, 4, 11, generator=generator, dtype=torch.float64)).to(dtype)
    return student.requires_grad_(), teacher


def gradient_of(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x)[0]


def test_table_is_that_of_the_config():
    assert set(OBJECTIVES) == set(typing.get_args(typing.get_type_hints(MemoryConfig)["objective"]))
    assert {name: o.on_logits for name, o in TAUGHT.items()} == {name: "kl" in name for name in TAUGHT}


@pytest.mark.parametrize("name", TAUGHT)
def test_values_and_gradients(name):
    loss, (student, teacher) = TAUGHT[name].loss, pair()
    value, expected = loss(student, teacher), inner_loss(name, (student, student), (teacher, teacher), None)
    gradient = gradient_of(value, student)
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradient, gradient_of(expected, student), atol=1e-12, rtol=1e-12)
    assert (loss(student - 0.05 * gradient, teacher) < value).all()
    at_rest = loss(student, student.detach().clone())
    assert max(at_rest.abs().max(), gradient_of(at_rest, student).abs().max()) < 1e-12


@pytest.mark.parametrize("name", TAUGHT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    loss, (student, teacher) = TAUGHT[name].loss, pair(dtype)
    value = loss(student, teacher)
    assert value.dtype == torch.float32 and value.shape == (3, 4)
    assert (value - loss(student.detach().double(), teacher.double())).abs().max() < 1e-5
    assert gradient_of(value, student).dtype == dtype


@pytest.mark.parametrize("loss", [kl, reverse_kl])
def test_extreme_logits_stay_finite(loss):
    student = torch.tensor([[[100.0, -100.0, 0.0]]], requires_grad=True)
    value = loss(student, torch.tensor([[[-100.0, 100.0, 0.0]]]))
    assert value.item() == pytest.approx(200, rel=1e-5)
    assert torch.isfinite(gradient_of(value, student)).all()
