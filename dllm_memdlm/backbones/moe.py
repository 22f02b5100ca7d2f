"""Routed experts over sorted tokens: the experts of a sparse layer, and what it computes of them all at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from .expert_ffn import Experts, expert_ffn
from .expert_names import PROJECTIONS, split_names, stack_on_loading
from .experts import (
    ExpertLinear,
    PackedExpertLinear,
    are_apart,
    check_alike,
    experts_apart,
    projection,
    stacked,
    without_adapters,
)
from .grouped import MAX_GROUPS
from .layers import GatedMLP, autocast_dtype
from .projection import Adapter
from .routes import Routes
from .site_weights import SiteWeights

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
        self._set_up(
            ACT2FN[activation],
            ExpertLinear(experts, hidden_size, width),
            ExpertLinear(experts, hidden_size, width),
            ExpertLinear(experts, width, hidden_size),
        )

    def _set_up(self, act_fn: nn.Module, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate, up, down, act_fn
        self.trains = True  #: whether a backward pass goes on to the weights, rather than to the fast ones alone
        self.fast: dict[str, SiteWeights] = {}
        self.register_load_state_dict_pre_hook(stack_on_loading)

    @classmethod
    def of(cls, experts: nn.ModuleList) -> RoutedExperts:
        """From a module an expert, which lose their weights one projection after the other.

        Raises:
            ValueError: as `check`.
        """
        cls.check(experts)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        linears = (stacked([getattr(expert, name) for expert in experts]) for name in PROJECTIONS)
        self._set_up(experts[0].act_fn, *linears)
        return self.train(experts.training)

    @staticmethod
    def check(experts: nn.ModuleList) -> None:
        """Raise ValueError for modules that no tensors can stand for, as `experts.check_alike`."""
        for name in PROJECTIONS:
            check_alike([getattr(expert, name) for expert in experts])

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
        parts = []
        for name in PROJECTIONS:
            part = projection(getattr(self, name), dtype)
            part = part if self.trains else part.detached()
            parts.append(part.under(_fast(fast[name], dtype)) if name in fast else part)
        routes = Routes.of(chosen, len(self), samples)
        if x.device.type == "cpu" and chosen.numel() <= FEW_ROWS * len(self):  # whose threads share a batched product
            routes = routes.padded(self.gate_proj.in_features * self.gate_proj.out_features)
        output = expert_ffn(x.flatten(0, 1), weights.flatten(0, 1), routes, Experts(*parts, self.act_fn), dtype)
        return output.to(x.dtype).view_as(x)


class SparseModel(PreTrainedModel):
    """What models with routed experts share: tensors of all experts in memory, a matrix an expert in files."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers' method. Beside the model there is room for one projection of a layer's experts."""
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = split_names(kwargs["state_dict"])
        with experts_apart():
            loaded = super().from_pretrained(*args, **kwargs)
        stack_experts(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: dict | None = None, **kwargs: Any
    ) -> None:
        """As transformers' method. Raises ValueError for weights in 4 bit."""
        if any(isinstance(module, PackedExpertLinear) for module in self.modules()):
            raise ValueError("experts in 4 bit are not saved; load the model without load_in_4bit")
        whole = self.state_dict() if state_dict is None else state_dict
        parts = split_names(whole)  # copied to the host here: of views transformers would make copies on the device
        state_dict = {n: value if n in whole else value.to("cpu", copy=True) for n, value in parts.items()}
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ExpertLinear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


def stack_experts(model: nn.Module) -> None:
    """Make experts that were built apart tensors of all, a layer after the other."""
    for module in list(model.modules()):
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.ModuleList):
            module.experts = RoutedExperts.of(experts)


@contextmanager
def inner_pass(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Forward passes whose backward pass ends at the fast weights.

    Weights are constants in them, to `parts` (those that say whether they train), and the experts' backward hooks are
    left out: ZeRO-3 takes the first backward pass through such a module for the one that brings its parameters'
    gradients. This one brings none.
    """
    held = [(part, part._backward_hooks) for part in parts]
    for part, _ in held:
        part.trains = False
        if isinstance(part, RoutedExperts):
            part._backward_hooks = OrderedDict()
    try:
        yield
    finally:
        for part, hooks in held:
            part._backward_hooks, part.trains = hooks, True


def _fast(site: SiteWeights, dtype: torch.dtype) -> Adapter:
    down, up = (m if m is None else m.flatten(0, 1).to(dtype) for m in (site.down, site.up))
    return Adapter(down, up, site.scaling, dtype, per_sample=True)
