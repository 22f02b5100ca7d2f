"""The likelihood of a continuation, estimated from random masks (LLaDA's estimator, appendix of arXiv 2502.09992).

log p(y | x) ≥ -E_n E_M [ L/n · Σ_{i in M} -log p(y_i | x, y without M) ],  n uniform in 1 … L, |M| = n
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ..method import noise
from ..method.losses import positions_of
from ..method.trajectory import smallest


class Masked(NamedTuple):
    """One state of a continuation whose masked tokens are to be predicted."""

    request: int
    prompt: list[int]
    continuation: list[int]
    mask: Tensor  #: [L] bool
    weight: float  #: of the negative log-likelihood of its masked tokens

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.continuation)


def draw_masks(length: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw masks of `length` tokens: [U, length] bool, and what the masked tokens of each weigh: [U] float64.

    The numbers of masked tokens are spread evenly over 1 … length, as in LLaDA's estimator, but over all `count` masks,
    so that the estimate does not depend on a batch size. A mask that is drawn more than once, as those of short
    continuations are, comes once, with its weights added: U ≤ count.
    """
    keys = noise.example_keys(seed, noise.EVALUATION, torch.arange(count))
    offset = noise.uniform(keys[:1], noise.TIME, 1).double()[0]
    numbers = 1 + ((torch.arange(count) + offset) * length / count).floor().long().clamp(max=length - 1)
    everything = torch.ones(count, length, dtype=torch.bool)
    masks = smallest(noise.uniform(keys, noise.ANCHOR, length), everything, numbers[:, None])[:, 0]
    masks, times = masks.unique(dim=0, return_counts=True)
    return masks, times * length / (masks.sum(-1) * count).double()


def states(request: int, prompt: list[int], continuation: list[int], count: int, seed: int) -> Iterator[Masked]:
    """Yield the masked states from which the likelihood of one continuation is estimated; none for an empty one."""
    if continuation:
        for mask, weight in zip(*draw_masks(len(continuation), count, seed), strict=True):
            yield Masked(request, prompt, continuation, mask, float(weight))


@torch.no_grad()
def log_likelihoods(
    model: nn.Module, batch: Sequence[Masked], mask_token_id: int, right_shift_logits: bool = False
) -> list[float]:
    """Return what each state adds to the log-likelihood of its continuation, in nats.

    The continuations attend to everything, as in training; padding is hidden.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([state.length for state in batch])
    tokens = pad_sequence([torch.tensor(state.prompt + state.continuation) for state in batch], batch_first=True)
    masked = pad_sequence([pad(state.mask, (len(state.prompt), 0)) for state in batch], batch_first=True)
    visible = torch.arange(tokens.shape[1]) < lengths[:, None]
    tokens, masked, visible = tokens.to(device), masked.to(device), visible.to(device)
    positions = positions_of(masked)
    nll = model(
        input_ids=tokens.masked_fill(masked, mask_token_id),
        attention_mask=None if len(set(lengths.tolist())) == 1 else visible,
        positions=positions.logit_index(right_shift_logits),
        tokens=positions.gather(tokens),
    ).nll
    total = (nll * positions.valid).sum(-1).double().cpu()
    return (-total * torch.tensor([state.weight for state in batch], dtype=torch.float64)).tolist()
