"""A place for fast weights in a model, and the fast weights of one: the last two dimensions are always one matrix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import MemoryConfig


@dataclass(frozen=True)
class SiteShape:
    """A place for fast weights: one linear layer, or the same projection of every expert of a layer."""

    name: str
    in_features: int
    out_features: int
    experts: int | None = None

    def tensors(self, config: MemoryConfig) -> dict[str, tuple[int, int]]:
        """The matrices of one sample (and of one expert), by name."""
        if config.kind == "full":
            return {"delta": (self.out_features, self.in_features)}
        return {"A": (config.rank, self.in_features), "B": (self.out_features, config.rank)}

    def numel(self, config: MemoryConfig) -> int:
        """Fast weights of one sample at this site."""
        return (self.experts or 1) * sum(rows * columns for rows, columns in self.tensors(config).values())


class SiteWeights(NamedTuple):
    """The tensors of one site: those of a low-rank pair, or a single full-size difference."""

    down: Tensor | None  #: A [(E,) S, r, in]; none for a full-size difference
    up: Tensor  #: B [(E,) S, out, r], or the difference [(E,) S, out, in]
    scaling: float

    @property
    def samples(self) -> int:
        return self.up.shape[-3]

    def part(self, samples: slice) -> SiteWeights:
        """Those of some of the samples."""
        down = None if self.down is None else self.down[..., samples, :, :]
        return SiteWeights(down, self.up[..., samples, :, :], self.scaling)

    def dense(self, x: Tensor) -> Tensor:
        """(α/r)·B·A·x, each sample through its own. x [B, M, in] → [B, M, out]."""
        if self.samples == 1:
            for matrix in self._matrices():
                x = F.linear(x, matrix[0].to(x.dtype))
            return x * self.scaling
        if x.dim() != 3 or len(x) != self.samples:
            raise ValueError(f"fast weights of {self.samples} samples on activations of shape {tuple(x.shape)}")
        for matrix in self._matrices():
            x = torch.bmm(x, matrix.to(x.dtype).transpose(1, 2))
        return x * self.scaling

    def difference(self) -> Tensor:
        """(α/r)·B·A, or the full-size difference: what it is to add them to the layer's weights [(E,) S, out, in]."""
        return self.up * self.scaling if self.down is None else (self.up * self.scaling) @ self.down

    def squared_norm(self) -> Tensor:
        """Return |difference|² of each matrix [(E,) S], by products of the size of the rank."""
        squares = self.up.square() if self.down is None else (self.up.mT @ self.up) * (self.down @ self.down.mT)
        return squares.sum((-2, -1)) * self.scaling**2

    def _matrices(self) -> Iterable[Tensor]:
        return (self.up,) if self.down is None else (self.down, self.up)
