"""Inner objectives against torch's own losses and closed-form gradients."""

from __future__ import annotations

import typing

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method.objectives import OBJECTIVES, hidden_cosine, hidden_mse, kl, reverse_kl

TEACHED = [kl, reverse_kl, hidden_mse, hidden_cosine]


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(2, 3, 4, 11, generator=generator, dtype=torch.float64)).to(dtype)
    return student.requires_grad_(), teacher


def gradient_of(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x)[0]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_table_is_that_of_the_config():
    assert set(OBJECTIVES) == set(typing.get_args(typing.get_type_hints(MemoryConfig)["objective"]))
    assert {name: (o.loss, o.on_logits) for name, o in OBJECTIVES.items() if o is not None} == {
        "kl": (kl, True),
        "reverse_kl": (reverse_kl, True),
        "hidden_mse": (hidden_mse, False),
        "hidden_cosine": (hidden_cosine, False),
    }


def test_divergences():
    student, teacher = pair()
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    forward, backward = kl(student, teacher), reverse_kl(student, teacher)
    close(forward, (p.exp() * (p - q)).sum(-1))
    close(forward, F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
    close(backward, F.kl_div(p, q, reduction="none", log_target=True).sum(-1))
    close(gradient_of(forward, student), q.exp() - p.exp())
    close(gradient_of(backward, student), q.exp() * (q - p - backward[..., None]))
    assert (forward > 0).all() and (forward - backward).abs().min() > 1e-3
    for loss in (kl, reverse_kl):
        close(loss(student + 5, teacher - 3), loss(student, teacher))  # as softmax ignores it


def test_hidden_mse():
    student, teacher = pair()
    loss = hidden_mse(student, teacher)
    close(loss, F.mse_loss(student, teacher, reduction="none").mean(-1))
    close(gradient_of(loss, student), 2 * (student - teacher) / 11)


def test_hidden_cosine():
    student, teacher = pair()
    loss = hidden_cosine(student, teacher)
    close(loss, 1 - (student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1)))
    close((gradient_of(loss, student) * student).sum(-1), torch.zeros(3, 4, dtype=torch.float64))  # length is nothing
    close(hidden_cosine(student, -student), torch.full((3, 4), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("loss", TEACHED, ids=lambda f: f.__name__)
def test_where_both_agree_it_is_zero_and_elsewhere_the_student_moves(loss):
    student, teacher = pair()
    value = loss(student, student.detach().clone())
    close(value, torch.zeros(3, 4, dtype=torch.float64))
    close(gradient_of(value, student), torch.zeros(3, 4, 11, dtype=torch.float64))
    value = loss(student, teacher)
    assert (loss(student - 0.05 * gradient_of(value, student), teacher) < value).all()


@pytest.mark.parametrize("loss", TEACHED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    student, teacher = pair(dtype)
    value = loss(student, teacher)
    assert value.dtype == torch.float32 and value.shape == (3, 4)
    assert (value - loss(student.detach().double(), teacher.double())).abs().max() < 1e-5
    assert gradient_of(value, student).dtype == dtype


@pytest.mark.parametrize("loss", [kl, reverse_kl], ids=lambda f: f.__name__)
def test_extreme_logits_stay_finite(loss):
    student = torch.tensor([[[100.0, -100.0, 0.0]]], requires_grad=True)
    value = loss(student, torch.tensor([[[-100.0, 100.0, 0.0]]]))
    assert value.item() == pytest.approx(200, rel=1e-5)
    assert torch.isfinite(gradient_of(value, student)).all()
