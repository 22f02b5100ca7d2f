"""The loss at masked positions: what the naive step, with every norm and shifted logits, does not show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dllm_memdlm.backbones.output import token_nll, widened
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
    return logits, tokens, maskable, mask, 1 / (torch.rand(B, generator=generator) * 0.9 + 0.05)


def gathered_loss(batch: tuple[Tensor, ...], norm: str, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
    logits, tokens, maskable, mask, weights = batch
    positions = positions_of(mask)
    at = logits.gather(1, positions.index[:, :, None].expand(-1, -1, logits.shape[-1]))
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
    # Position 0 has none before: its own, as dllm does.
    assert positions.logit_index(True).tolist() == [[max(0, i - 1) for i in row] for row in positions.index.tolist()]


@pytest.mark.parametrize("norm", NORMS)
def test_equals_the_full_formula(norm):
    logits, tokens, maskable, mask, weights = batch = make_batch()
    nll = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    sums = (nll * mask).sum(-1) * weights
    expected = {
        "token": sums.sum() / maskable.sum(),
        "sequence": sum(each / max(1, int(own)) for each, own in zip(sums, maskable.sum(-1), strict=True)) / B,
        "batch": sums.sum() / B,
    }[norm]
    loss, total = gathered_loss(batch, norm)
    gradients = [torch.autograd.grad(each, logits)[0] for each in (loss, expected)]
    assert loss.shape == () and loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)
    assert total.tolist() == pytest.approx(sums.tolist(), rel=1e-12) and not total.requires_grad
    larger, _ = gathered_loss(batch, norm, torch.tensor(2.0 * int(maskable.sum())))
    assert larger.item() == pytest.approx(loss.item() / (2 if norm == "token" else 1))


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_masked(norm):
    logits, tokens, maskable, mask, weights = make_batch()
    for maskable_too in (maskable, torch.zeros_like(maskable)):
        loss, total = gathered_loss((logits, tokens, maskable_too, torch.zeros_like(mask), weights), norm)
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
    loss, _ = gathered_loss(batch, "token")
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, logits)[0].dtype == dtype
    assert widened(exact) is exact  # float64 stays
