"""Routed experts as modules, which run one after the other: what the naive step, and the tests, compare with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_memdlm.backbones.expert_names import PROJECTIONS
from dllm_memdlm.backbones.experts import without_adapters
from dllm_memdlm.backbones.moe import RoutedExperts


class OneLinear(nn.Module):
    """A linear layer of one expert under its LoRA, as PEFT computes it."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.matrices: tuple[Tensor, list[tuple]] | None = None  #: of this pass

    def forward(self, x: Tensor) -> Tensor:
        weight, adapters = self.matrices
        output = F.linear(x, weight.to(x.dtype))
        for down, up, dropout, scaling in adapters:
            output = output + F.linear(F.linear(dropout(x.to(down.dtype)), down), up) * scaling
        return output.to(x.dtype)


class OneExpert(nn.Module):
    """One of the experts of a layer."""

    def __init__(self, experts: RoutedExperts) -> None:
        super().__init__()
        for name in PROJECTIONS:
            setattr(self, name, OneLinear(getattr(experts, name)))
        self.act_fn = experts.act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LoopOverExperts(nn.ModuleList):
    """A module an expert, on the tensors of all; they run one after the other."""

    def __init__(self, experts: RoutedExperts) -> None:
        super().__init__(OneExpert(experts) for _ in range(len(experts)))
        self._all = (experts,)  # in a tuple it is no child

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Σ over the chosen experts of weight · expert(x)."""
        for name in PROJECTIONS:
            self._take_apart(name)
        rows, chosen, weights = x.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1)
        output = torch.zeros_like(rows, dtype=torch.promote_types(weights.dtype, rows.dtype))
        for number, expert in enumerate(self):
            token, choice = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                part = expert(rows[token]) * weights[token, choice, None]
                output.index_add_(0, token, part.to(output.dtype))
        return output.to(x.dtype).view_as(x)

    def _take_apart(self, name: str) -> None:
        linear = getattr(self._all[0], name)
        base = without_adapters(linear)
        adapters = []
        if linear is not base and not (linear.disable_adapters or linear.merged):
            for adapter in linear.active_adapters:
                pairs = zip(*(side[adapter].weight.unbind() for side in (linear.lora_A, linear.lora_B)), strict=True)
                rest = (linear.lora_dropout[adapter], linear.scaling[adapter])
                adapters.append([(*pair, *rest) for pair in pairs])
        weights = base.matrices() if callable(base.matrices) else base.matrices
        for number, weight in enumerate(weights.unbind()):
            getattr(self[number], name).matrices = weight, [of[number] for of in adapters]


@contextmanager
def plain_experts(model: nn.Module) -> Iterator[None]:
    """All routed experts of a model are modules, which run one by one."""
    held = [(m, m.experts) for m in model.modules() if isinstance(getattr(m, "experts", None), RoutedExperts)]
    for parent, experts in held:
        parent.experts = LoopOverExperts(experts).train(experts.training)
    try:
        yield
    finally:
        for parent, experts in held:
            parent.experts = experts
