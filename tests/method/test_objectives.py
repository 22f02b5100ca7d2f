"""Inner objectives and the loss at masked positions: what the naive step does not show."""

from __future__ import annotations

import typing

import pytest
import torch
from torch import Tensor

from dllm_memdlm.backbones.output import token_nll, widened
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method.losses import NORMS, masked_diffusion_loss, positions_of
from dllm_memdlm.method.objectives import OBJECTIVES, kl, reverse_kl
from dllm_memdlm.method.reference import inner_loss

TAUGHT = {name: objective for name, objective in OBJECTIVES.items() if objective is not None}
B, L, V = 5, 12, 17
in_half_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


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
@in_half_precision
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


def make_batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """logits, tokens, maskable."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(B, L, V, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    tokens = torch.randint(0, V, (B, L), generator=generator)
    return logits, tokens, torch.arange(L) >= torch.tensor([0, 3, 5, 2, L])[:, None]


def gathered_loss(logits: Tensor, tokens: Tensor, mask: Tensor, maskable: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    positions = positions_of(mask)
    at = logits.gather(1, positions.index[:, :, None].expand(-1, -1, logits.shape[-1]))
    nll = token_nll(at, positions.gather(tokens))
    return masked_diffusion_loss(nll, positions.valid, torch.ones(B), maskable.sum(-1), norm)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_positions_against_nonzero(p):
    mask = torch.rand(8, 20, generator=torch.Generator().manual_seed(1)) < p
    positions, x = positions_of(mask), torch.arange(8 * 20).view(8, 20)
    expected = [row.nonzero().flatten().tolist() for row in mask]
    assert positions.index.shape == positions.valid.shape == (8, max(1, max(map(len, expected))))
    for i in range(8):
        assert positions.index[i][positions.valid[i]].tolist() == expected[i]
        assert positions.valid[i].tolist() == sorted(positions.valid[i].tolist(), reverse=True)  # to the left
    assert positions.gather(x)[positions.valid].tolist() == x[mask].tolist()
    # Position 0 has none before: its own, as dllm does.
    assert positions.logit_index(True).tolist() == [[max(0, i - 1) for i in row] for row in positions.index.tolist()]


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_masked(norm):
    logits, tokens, maskable = make_batch()
    nothing = torch.zeros_like(maskable)
    for maskable_too in (maskable, nothing):
        loss, total = gathered_loss(logits, tokens, nothing, maskable_too, norm)
        assert loss.item() == 0 and not total.any()
        (gradient,) = torch.autograd.grad(loss, logits)  # a graph exists, so that every rank has a backward
        assert not gradient.any()


@pytest.mark.parametrize("norm", NORMS)
def test_a_part_of_a_larger_batch(norm):
    nll, valid, ones = torch.ones(B, 2, requires_grad=True), torch.ones(B, 2, dtype=torch.bool), torch.ones(B)
    losses = [masked_diffusion_loss(nll, valid, ones, 2 * ones, norm, n) for n in (None, torch.tensor(4.0 * B))]
    (loss, total), (larger, _) = losses
    assert loss / larger == (2 if norm == "token" else 1) and not total.requires_grad


@in_half_precision
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits, tokens, maskable = make_batch(dtype)
    nll = token_nll(logits, tokens)
    exact, rounded = (-x.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] for x in (logits.double(), logits))
    assert nll.dtype == torch.float32 and (nll - exact).abs().max() < 1e-5 < 1e-4 < (rounded - exact).abs().max()
    loss, _ = gathered_loss(logits, tokens, maskable, maskable, "token")
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, logits)[0].dtype == dtype
    assert widened(exact) is exact  # float64 stays
