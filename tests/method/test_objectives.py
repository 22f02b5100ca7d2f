"""Inner objectives against torch's own losses, formulas in Python's numbers, and closed-form gradients."""

from __future__ import annotations

import math
import typing

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method.objectives import OBJECTIVES, hidden_cosine, hidden_mse, kl, reverse_kl

TEACHED = [kl, reverse_kl, hidden_mse, hidden_cosine]


def pair(dtype: torch.dtype = torch.float64, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(2, 3, 4, 11, generator=generator, dtype=torch.float64)).to(dtype)
    return student.requires_grad_(), teacher


def gradient_of(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x)[0]


def log_probabilities(logits: list[float]) -> list[float]:
    log_sum = math.log(sum(math.exp(x) for x in logits))
    return [x - log_sum for x in logits]


def divergence(p: list[float], q: list[float]) -> float:
    """KL(p ‖ q) of two log-probability vectors."""
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def by_vector(function: typing.Callable[[list[float], list[float]], float], a: Tensor, b: Tensor) -> Tensor:
    rows = [[function(x, y) for x, y in zip(*rows, strict=True)] for rows in zip(a.tolist(), b.tolist(), strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_table_is_that_of_the_config():
    hints = typing.get_type_hints(MemoryConfig)
    assert set(OBJECTIVES) == set(typing.get_args(hints["objective"]))
    kinds = {name: (o.loss, o.on_logits) for name, o in OBJECTIVES.items() if o is not None}
    assert kinds == {
        "kl": (kl, True),
        "reverse_kl": (reverse_kl, True),
        "hidden_mse": (hidden_mse, False),
        "hidden_cosine": (hidden_cosine, False),
    }


def test_kl():
    student, teacher = pair()
    loss = kl(student, teacher)
    log_target = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
    close(loss, log_target.sum(-1))
    close(loss, by_vector(lambda s, t: divergence(log_probabilities(t), log_probabilities(s)), student, teacher))
    close(gradient_of(loss, student), student.softmax(-1) - teacher.softmax(-1))


def test_reverse_kl():
    student, teacher = pair()
    loss = reverse_kl(student, teacher)
    log_target = F.kl_div(teacher.log_softmax(-1), student.log_softmax(-1), reduction="none", log_target=True)
    close(loss, log_target.sum(-1))
    close(loss, by_vector(lambda s, t: divergence(log_probabilities(s), log_probabilities(t)), student, teacher))
    gap = student.log_softmax(-1) - teacher.log_softmax(-1)
    close(gradient_of(loss, student), student.softmax(-1) * (gap - loss[..., None]))
    assert (loss - kl(student, teacher)).abs().min() > 1e-3


def test_hidden_mse():
    student, teacher = pair()
    loss = hidden_mse(student, teacher)
    close(loss, F.mse_loss(student, teacher, reduction="none").mean(-1))
    close(loss, by_vector(lambda s, t: sum((x - y) ** 2 for x, y in zip(s, t, strict=True)) / 11, student, teacher))
    close(gradient_of(loss, student), 2 * (student - teacher) / 11)


def test_hidden_cosine():
    student, teacher = pair()
    loss = hidden_cosine(student, teacher)

    def one_minus_cosine(s: list[float], t: list[float]) -> float:
        return 1 - sum(x * y for x, y in zip(s, t, strict=True)) / (math.hypot(*s) * math.hypot(*t))

    close(loss, by_vector(one_minus_cosine, student, teacher))
    gradient = gradient_of(loss, student)
    close((gradient * student).sum(-1), torch.zeros(3, 4, dtype=torch.float64))  # the length does not matter
    close(loss, hidden_cosine(3 * student, 0.5 * teacher))
    close(hidden_cosine(student, -student), torch.full((3, 4), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("loss", TEACHED, ids=lambda f: f.__name__)
def test_zero_and_stationary_where_both_agree(loss):
    student, _ = pair()
    value = loss(student, student.detach().clone())
    close(value, torch.zeros(3, 4, dtype=torch.float64))
    close(gradient_of(value, student), torch.zeros(3, 4, 11, dtype=torch.float64))


@pytest.mark.parametrize("loss", [kl, reverse_kl], ids=lambda f: f.__name__)
def test_divergences_ignore_what_softmax_ignores(loss):
    student, teacher = pair()
    close(loss(student + 5, teacher - 3), loss(student, teacher))
    assert (loss(student, teacher) > 0).all()


@pytest.mark.parametrize("loss", TEACHED, ids=lambda f: f.__name__)
def test_gradient_moves_the_student_towards_a_fixed_teacher(loss):
    student, teacher = pair()
    value = loss(student, teacher)
    moved = student - 0.05 * gradient_of(value, student)
    assert (loss(moved, teacher) < value).all()
    assert teacher.grad is None and not teacher.requires_grad


@pytest.mark.parametrize("loss", TEACHED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    student, teacher = pair(dtype)
    value = loss(student, teacher)
    assert value.dtype == torch.float32 and value.shape == (3, 4)
    exact = loss(student.detach().double(), teacher.double())
    assert (value - exact).abs().max() < 1e-5
    assert gradient_of(value, student).dtype == dtype


def test_extreme_logits_stay_finite():
    student = torch.tensor([[[100.0, -100.0, 0.0]]], requires_grad=True)
    teacher = torch.tensor([[[-100.0, 100.0, 0.0]]])
    for loss in (kl, reverse_kl):
        value = loss(student, teacher)
        assert value.item() == pytest.approx(200, rel=1e-5)
        assert torch.isfinite(gradient_of(value, student)).all()
