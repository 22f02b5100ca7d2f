"""The linear layers of all experts of a layer as one tensor each; files have a matrix an expert.

checkpoint (a matrix an expert) ─► nn.ModuleList of gated MLPs ─► `moe.stack_experts` ─► ExpertLinear [E, out, in]
adapter (two matrices an expert) ─► `stack_names`, on loading ─► ExpertLora [E, r, in], [E, out, r]
`split_names` ─► what is saved, a matrix an expert again
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class ExpertLinear(nn.Module):
    """A linear layer without bias for every expert. It is computed by `RoutedExperts`, for all of them at once."""

    computes_in: torch.dtype | None = None  #: the product, if not in the dtype of its input or autocast's

    def __init__(self, experts: int, in_features: int, out_features: int, weight: Tensor | None = None) -> None:
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features) if weight is None else weight)
        if weight is None:
            nn.init.uniform_(self.weight, -(in_features**-0.5), in_features**-0.5)  # as nn.Linear

    @property
    def matrices(self) -> Tensor | Callable[[], Tensor]:
        """[E, out, in], or what makes them."""
        return self.weight


class PackedExpertLinear(ExpertLinear):
    """The same in 4 bit: bitsandbytes' bytes of every expert, one after the other, which one call unpacks.

    All its tensors are bytes, the float32 statistics too, so that no cast of a model rounds them.

    Args:
        packed: what bitsandbytes' `quantize_4bit` gives for each expert's matrix.
        compute_dtype: of the product.
    """

    def __init__(self, packed: Sequence[tuple[Tensor, Any]], compute_dtype: torch.dtype | None) -> None:
        nn.Module.__init__(self)
        weights, states = zip(*packed, strict=True)
        first = self._like = states[0]
        self.experts, (self.out_features, self.in_features) = len(packed), first.shape
        self.computes_in, self._blocks = compute_dtype, first.absmax.numel()
        # Where a matrix ends within a block, the next one begins with a block of its own all the same.
        self.weight = _frozen(_joined(weights, first.blocksize // 2))
        tables = [torch.cat([state.absmax for state in states])]
        if first.nested:
            self.scales = _frozen(_joined([state.absmax for state in states], first.state2.blocksize))
            absmax = torch.cat([state.state2.absmax for state in states])
            tables = [torch.stack([state.offset for state in states]), first.state2.code, absmax]
        self._table_sizes = [len(table) for table in tables]
        self.tables = _frozen(torch.cat(tables).view(torch.uint8))

    @property
    def matrices(self) -> Tensor | Callable[[], Tensor]:
        return self.unpack

    @torch.no_grad()
    def unpack(self) -> Tensor:
        """[E, out, in], in the dtype that they were packed from. The same bits as one by one."""
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        like = self._like
        scales, *rest = self.tables.view(torch.float32).split(self._table_sizes)
        if rest:
            offset, (code, absmax) = scales, rest
            scales = dequantize_blockwise(self.scales, absmax=absmax, code=code, blocksize=like.state2.blocksize)
            scales = (scales.view(self.experts, -1)[:, : self._blocks] + offset[:, None]).flatten()
        size = torch.Size((self.experts, self._blocks * like.blocksize))
        state = QuantState(scales, size, blocksize=like.blocksize, quant_type=like.quant_type, dtype=like.dtype)
        weights = dequantize_4bit(self.weight, state)[:, : self.out_features * self.in_features]
        return weights.reshape(self.experts, self.out_features, self.in_features)


def without_adapters(linear: nn.Module) -> Any:
    """The layer inside PEFT's, or the layer itself."""
    return linear.get_base_layer() if isinstance(linear, BaseTunerLayer) else linear


def outermost(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All modules by path, but for what PEFT's layers have inside."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path.startswith(inside):
            yield path, module
            inside = (f"{path}.",) if isinstance(module, BaseTunerLayer) else inside


def _joined(parts: Sequence[Tensor], block: int) -> Tensor:
    """One after the other, each filled up to whole blocks [E·n]."""
    return torch.cat([F.pad(part.flatten(), (0, -part.numel() % block)) for part in parts])


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
