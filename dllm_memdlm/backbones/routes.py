"""Which rows an expert computes: each token once for every expert it is sent to, sorted by expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .grouped import ends

#: Multiplications that take a CPU no longer than to begin with the product of another group.
START = 2**18
#: With no more rows than these, a CPU takes as long to read an expert's weights as to use them.
CHEAP_ROWS = 16
#: Otherwise padding makes at most so many times as many rows.
MOST_PADDING = 4


class Routes(NamedTuple):
    """T rows, one for each of its k experts of each of N tokens, sorted by expert, and within an expert by sample.

    Padded ones have as many rows for every (expert, sample), some of which are fillers: what they give nobody reads.
    """

    order: Tensor  #: which of the N·k (token, choice) pairs stands in each row that is no filler
    places: Tensor | None  #: where those rows are; None if all of T are such
    tokens: Tensor  #: which token stands in each row [T]
    back: Tensor  #: the rows of each token [N, k]
    offsets: Tensor | None  #: where each expert's rows end [E] int32; None if padded
    fast_offsets: Tensor | None  #: where each (expert, sample)'s rows end [E·S] int32; None if padded

    @classmethod
    def of(cls, chosen: Tensor, experts: int, samples: int) -> Routes:
        """Of the experts chosen for each token [B, M, k], 0 to `experts` - 1; `samples` is 1, or B of them."""
        group = chosen
        if samples > 1:
            group = group * samples + torch.arange(samples, device=chosen.device)[:, None, None]
        groups, order = group.flatten().sort(stable=True)
        numbers, top_k = torch.arange(max(len(order), experts * samples), device=order.device), chosen.shape[-1]
        fast_offsets = torch.searchsorted(groups, numbers[: experts * samples], right=True, out_int32=True)
        back = torch.empty_like(order).scatter_(0, order, numbers[: len(order)])
        tokens = order.div(top_k, rounding_mode="floor")
        offsets = fast_offsets[samples - 1 :: samples].contiguous()  # CUDA's kernel takes no notice of strides
        return cls(order, None, tokens, back.view(-1, top_k), offsets, fast_offsets)

    def ends(self, per_sample: bool) -> Tensor | None:
        """Where the rows of each expert end, or of each expert and sample; none if padded."""
        return self.fast_offsets if per_sample else self.offsets

    def weights(self, weights: Tensor) -> Tensor:
        """Those of the rows [T, 1], of fillers 0: nothing goes through them. weights of the pairs [N, k]."""
        weights = weights.flatten().index_select(0, self.order)
        if self.places is not None:
            weights = weights.new_zeros(len(self.tokens)).index_copy(0, self.places, weights)
        return weights[:, None]

    def padded(self, numel: int) -> Routes:
        """With fillers, where that costs little; as they are otherwise. Waits for the device.

        A batched product also reads the matrices of groups without rows. At least half of the groups have to have some,
        unless the matrices, of `numel` weights, are small.
        """
        if self.fast_offsets is None:
            return self
        last, rows = ends(self.fast_offsets, len(self.order)), len(self.order)
        sizes = [end - start for start, end in zip([0, *last], last, strict=False)]
        size = max(sizes)
        few = 2 * sizes.count(0) <= len(sizes) and size <= max(CHEAP_ROWS, MOST_PADDING * rows / len(sizes))
        if not few and size * numel > START:
            return self
        fillers = torch.tensor([size - own for own in sizes], device=self.order.device)
        before = (fillers.cumsum(0) - fillers).repeat_interleave(size - fillers, output_size=rows)
        places = torch.arange(rows, device=self.order.device) + before
        tokens = self.tokens.new_zeros(size * len(sizes)).index_copy_(0, places, self.tokens)
        return Routes(self.order, places, tokens, places[self.back], None, None)
