"""The loss at masked positions against the full-logits formula, written token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dllm_memdlm.backbones.output import token_nll, widened
from dllm_memdlm.compat.bundled import CosineAlphaScheduler, LinearAlphaScheduler
from dllm_memdlm.method.losses import NORMS, masked_diffusion_loss, positions_of

B, L, V = 5, 12, 17


def make_batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """logits, tokens, maskable, mask, weights. One sample has all masked, one nothing, one nothing maskable."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(B, L, V, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    tokens = torch.randint(0, V, (B, L), generator=generator)
    maskable = torch.arange(L) >= torch.tensor([0, 3, 5, 2, L])[:, None]
    mask = (torch.rand(B, L, generator=generator) < 0.5) & maskable
    mask[0], mask[3] = True, False
    weights = 1 / (torch.rand(B, generator=generator, dtype=torch.float64) * 0.9 + 0.05)
    return logits, tokens, maskable, mask, weights


def naive_loss(
    logits: Tensor, tokens: Tensor, maskable: Tensor, mask: Tensor, weights: Tensor, norm: str, right_shift: bool
) -> tuple[Tensor, list[float]]:
    """MDLM's loss with logits at every position."""
    if right_shift:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    loss, sums = logits.sum() * 0, []
    for b in range(len(tokens)):
        of_sample = logits.sum() * 0
        for i in range(tokens.shape[1]):
            if mask[b, i]:
                of_sample = of_sample - weights[b] * torch.log_softmax(logits[b, i], dim=0)[tokens[b, i]]
        sums.append(of_sample.item())
        own = max(1, int(maskable[b].sum()))
        loss = loss + of_sample / {"token": int(maskable.sum()), "sequence": own * B, "batch": B}[norm]
    return loss, sums


def gathered_loss(
    logits: Tensor,
    tokens: Tensor,
    maskable: Tensor,
    mask: Tensor,
    weights: Tensor,
    norm: str,
    right_shift: bool = False,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    positions = positions_of(mask)
    index = positions.logit_index(right_shift)
    at = logits.gather(1, index[:, :, None].expand(-1, -1, logits.shape[-1]))
    nll = token_nll(at, positions.gather(tokens))
    return masked_diffusion_loss(nll, positions.valid, weights, maskable.sum(-1), norm, count)


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


def test_right_shift_index():
    positions = positions_of(torch.tensor([[1, 0, 1, 0, 1]]).bool())
    assert positions.logit_index(False).tolist() == [[0, 2, 4]]
    assert positions.logit_index(True).tolist() == [[0, 1, 3]]  # position 0 has none before: its own, as dllm does


@pytest.mark.parametrize("right_shift", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_equals_the_full_formula(norm, right_shift):
    batch = make_batch()
    expected, sums = naive_loss(*batch, norm, right_shift)
    loss, total = gathered_loss(*batch, norm, right_shift)
    gradients = [torch.autograd.grad(each, batch[0])[0] for each in (loss, expected)]
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12, rel=1e-12)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)
    assert total.tolist() == pytest.approx(sums, abs=1e-12, rel=1e-12) and not total.requires_grad
    larger, _ = gathered_loss(*batch, norm, right_shift, torch.tensor(2.0 * int(batch[2].sum())))
    assert larger.item() == pytest.approx(loss.item() / (2 if norm == "token" else 1))


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_masked(norm):
    logits, tokens, maskable, mask, weights = make_batch()
    for maskable_too in (maskable, torch.zeros_like(maskable)):
        loss, total = gathered_loss(logits, tokens, maskable_too, torch.zeros_like(mask), weights, norm)
        assert loss.item() == 0 and not total.any()
        (gradient,) = torch.autograd.grad(loss, logits)  # a graph exists, so that every rank has a backward
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    batch = make_batch(dtype)
    logits, tokens = batch[:2]
    nll = token_nll(logits, tokens)
    exact, rounded = (-x.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] for x in (logits.double(), logits))
    assert nll.dtype == torch.float32 and (nll - exact).abs().max() < 1e-5 < 1e-4 < (rounded - exact).abs().max()
    loss, _ = gathered_loss(*batch[:4], batch[4].float(), "token")
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, logits)[0].dtype == dtype
    assert widened(exact) is exact  # float64 stays


def test_weights_of_the_schedules():
    level = torch.tensor([[0.001, 0.25], [0.5, 1.0]])
    weights = LinearAlphaScheduler().weight(level)
    torch.testing.assert_close(weights, 1 / level, rtol=2e-3, atol=0)  # dllm adds 1e-6 to the denominator
    torch.testing.assert_close(weights[1], 1 / level[1], rtol=3e-6, atol=0)
    cosine = CosineAlphaScheduler().weight(torch.tensor([0.5]))
    assert cosine.item() == pytest.approx(math.pi / 2, rel=1e-5)  # π/2 · sin(π/4) / cos(π/4)
    assert torch.isfinite(LinearAlphaScheduler().weight(torch.zeros(3))).all()  # where nothing is masked
