"""Routed experts over sorted tokens: the experts of a sparse layer, and what it computes of them all at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .expert_ffn import Term, expert_ffn
from .expert_names import PROJECTIONS, stack_on_loading
from .experts import ExpertLinear, without_adapters
from .grouped import MAX_GROUPS
from .layers import GatedMLP, autocast_dtype, frozen_weights
from .lora import terms_of
from .routes import Routes
from .site_weights import SiteWeights
from .stacking import are_apart, check_alike, stacked

#: An expert has few rows if it has no more on average. On a CPU they are padded.
FEW_ROWS = 32


def routed_experts(config: Any, width: int) -> nn.Module:
    """The experts of a layer, each with `width` features within; a module an expert inside `experts_apart`.

    Raises:
        ValueError: a token cannot have as many experts as the config says.
    """
    if not 1 <= config.num_experts_per_tok <= config.num_experts:
        raise ValueError(f"num_experts_per_tok {config.num_experts_per_tok} of num_experts {config.num_experts}")
    if are_apart.get():
        experts = (GatedMLP(config.hidden_size, width, config.hidden_act) for _ in range(config.num_experts))
        return nn.ModuleList(experts)
    return RoutedExperts(config.num_experts, config.hidden_size, width, config.hidden_act)


class RoutedExperts(nn.Module):
    """The experts of a sparse layer, called with the router's choice.

    Fast weights of their projections are put into `fast` for the time of a forward pass.
    """

    def __init__(self, experts: int, hidden_size: int, width: int, activation: str) -> None:
        super().__init__()
        gate, up = (ExpertLinear(experts, hidden_size, width) for _ in range(2))
        self._set_up(ACT2FN[activation], gate, up, ExpertLinear(experts, width, hidden_size))

    def _set_up(self, act_fn: Any, gate: Any, up: Any, down: Any) -> None:
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate, up, down, act_fn
        self.fast: dict[str, SiteWeights] = {}
        self.register_load_state_dict_pre_hook(stack_on_loading)

    @classmethod
    def of(cls, experts: nn.ModuleList) -> RoutedExperts:
        """From modules that are alike, which lose their weights one projection after the other."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._set_up(experts[0].act_fn, *(stacked(linears) for linears in _by_projection(experts)))
        return self.train(experts.training)

    def __len__(self) -> int:
        return without_adapters(self.gate_proj).experts

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Σ over the chosen experts of weight · expert(x). x [B, M, D]; chosen, weights [B, M, k] → [B, M, D]."""
        samples = max((site.samples for site in self.fast.values()), default=1)
        if samples > 1 and len(chosen) != samples:
            raise ValueError(f"fast weights of {samples} samples on a batch of {len(chosen)}")
        at_once = max(1, MAX_GROUPS // len(self))
        if samples <= at_once:
            return self._of(x, chosen, weights, self.fast, samples)
        parts = []
        for first in range(0, samples, at_once):
            part = slice(first, first + at_once)
            fast = {name: site.part(part) for name, site in self.fast.items()}
            parts.append(self._of(x[part], chosen[part], weights[part], fast, len(x[part])))
        return torch.cat(parts)

    def _of(self, x: Tensor, chosen: Tensor, weights: Tensor, fast: dict[str, SiteWeights], samples: int) -> Tensor:
        dtype = autocast_dtype(x) or x.dtype
        projections = [terms_of(getattr(self, name), dtype) for name in PROJECTIONS]
        for name, terms in zip(PROJECTIONS, projections, strict=True):
            if name in fast:
                terms.append(_fast_term(fast[name], dtype))
        routes = Routes.of(chosen, len(self), samples)
        if x.device.type == "cpu" and chosen.numel() <= FEW_ROWS * len(self):  # whose threads share a batched product
            routes = routes.padded(self.gate_proj.in_features * self.gate_proj.out_features)
        output = expert_ffn(x.flatten(0, 1).to(dtype), weights.flatten(0, 1), routes, projections, self.act_fn)
        return output.to(x.dtype).view_as(x)


def stack_experts(model: nn.Module) -> None:
    """Make experts that were built apart tensors of all, a layer after the other.

    Raises:
        ValueError: as `check_alike`, of any layer's; nothing is changed then.
    """
    found: list[tuple[nn.Module, Any]] = [(module, getattr(module, "experts", None)) for module in model.modules()]
    found = [(module, experts) for module, experts in found if isinstance(experts, nn.ModuleList)]
    for _, experts in found:
        for linears in _by_projection(experts):
            check_alike(linears)
    for module, experts in found:
        module.experts = RoutedExperts.of(experts)


@contextmanager
def frozen(experts: Iterable[RoutedExperts]) -> Iterator[None]:
    """Forward passes whose backward pass ends at the fast weights.

    The backward hooks of these experts are left out: ZeRO-3 takes the first backward pass through such a module for the
    one that brings its parameters' gradients. This one brings none.
    """
    held = [(module, module._backward_hooks) for module in experts]
    try:
        for module, _ in held:
            module._backward_hooks = OrderedDict()
        with frozen_weights():
            yield
    finally:
        for module, hooks in held:
            module._backward_hooks = hooks


def _by_projection(experts: nn.ModuleList) -> Iterator[list[nn.Module]]:
    return ([getattr(expert, name) for expert in experts] for name in PROJECTIONS)


def _fast_term(site: SiteWeights, dtype: torch.dtype) -> Term:
    down, up = (m if m is None else m.flatten(0, 1).to(dtype) for m in (site.down, site.up))
    return Term(dtype, up, down, site.scaling, per_sample=True)
