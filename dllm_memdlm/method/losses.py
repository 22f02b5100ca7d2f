"""The masked diffusion loss, at masked positions only."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Positions(NamedTuple):
    """The positions where a batch has a loss, gathered to the left and padded to the longest sample."""

    index: Tensor  # type: ignore[assignment]  #: [B, M] int64, in place of tuple.index
    valid: Tensor  #: [B, M] bool, false on padding

    def logit_index(self, right_shift: bool) -> Tensor:
        """Return the positions whose logits predict these tokens: their own, or with shifted logits the ones before."""
        return (self.index - 1).clamp_min(0) if right_shift else self.index

    def gather(self, x: Tensor) -> Tensor:
        """Take x there. x [B, L] → [B, M]."""
        return x.gather(1, self.index)


def positions_of(mask: Tensor) -> Positions:
    """Find the true positions of each row, in order. mask [B, L] bool → M at least 1, so that a graph always exists.

    It waits for the device, to learn M.
    """
    counts = mask.sum(-1)
    longest = max(1, int(counts.max()))
    index = mask.int().argsort(dim=-1, descending=True, stable=True)[:, :longest]
    return Positions(index, torch.arange(longest, device=mask.device) < counts[:, None])


#: `loss_weight_type`: w(t) of the schedule, 1, or by the visible neighbours (`cart_weights`), with p = 0.3 by default.
LOSS_WEIGHT = r"scheduler|uniform|cart(\[geo_p:(?P<p>0\.\d*[1-9]\d*)\])?"


def cart_share(loss_weight: str) -> float | None:
    """Return p of a `cart[geo_p:p]`; none for other weights."""
    if not loss_weight.startswith("cart"):
        return None
    found = re.fullmatch(LOSS_WEIGHT, loss_weight)
    assert found is not None, loss_weight
    return float(found["p"] or 0.3)


def cart_weights(visible: Tensor, p: float) -> Tensor:
    """Sum up p/2 · (1-p)^(d-1) over the visible tokens at distances d ≥ 1 (CART, Dream). visible [B, L] bool → [B, L].

    By Fourier transforms, since a matrix of all distances would take L² numbers.
    """
    length = visible.shape[1]
    distance = torch.arange(length, device=visible.device)
    share = p / 2 * (1 - p) ** (distance - 1.0)
    share[0] = 0
    kernel = torch.cat([share, share.new_zeros(1), share[1:].flip(0)])  # of a circle that is twice as long
    spectra = torch.fft.rfft(visible.to(share.dtype), 2 * length) * torch.fft.rfft(kernel)
    weights: Tensor = torch.fft.irfft(spectra, 2 * length)
    return weights[:, :length]


#: Ways to normalise the outer loss: (weighted NLL of each sample [B], its maskable tokens [B]) → scalar.
NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": lambda total, maskable: total.sum() / maskable.sum().clamp_min(1),
    "sequence": lambda total, maskable: (total / maskable.clamp_min(1)).mean(),
    "batch": lambda total, maskable: total.mean(),
}


def masked_diffusion_loss(
    nll: Tensor, valid: Tensor, weights: Tensor, maskable: Tensor, norm: str, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum up Σ_{i in M_t} w(t) · (-log p(x0_i | x_t)), normalised (section 2, and the outer loss in 3.1).

    Args:
        nll: -log p of the clean tokens at the masked positions [B, M].
        valid: false on padding [B, M].
        weights: w(t) of each sample [B].
        maskable: maskable tokens of each sample [B].
        norm: a key of `NORMS`.
        count: the maskable tokens of a larger batch that this one is a part of, by which `token` then divides.

    Returns:
        The loss, and each sample's weighted sum [B], without normalisation and gradient.
    """
    total = (nll * valid).sum(-1) * weights
    divided_by = maskable if norm != "token" or count is None else count
    return NORMS[norm](total, divided_by), total.detach()
