"""Routed experts over sorted tokens: the list of experts of a sparse layer, and what it computes of them all at once.

Experts under adapters other than plain LoRA compute for themselves, one after the other on their rows.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..fast_weights import SiteWeights
from ..grouped import MAX_GROUPS, split
from .expert_ffn import Experts, expert_ffn
from .output import OutputLinear
from .projection import Adapter, Projection
from .routes import Routes

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
#: Where each expert has few rows, they are padded to at most so many times as many: reading its weights costs more.
MOST_PADDING = 4
#: An expert has few rows if it has no more on average.
FEW_ROWS = 32
#: Where PEFT keeps its LoRA for linear layers, and for those of bitsandbytes.
PLAIN_LORA = ("peft.tuners.lora.layer", "peft.tuners.lora.bnb")


def check_experts(config: Any) -> None:
    """Raise ValueError where a token cannot have as many experts as the config says."""
    if not 1 <= config.num_experts_per_tok <= config.num_experts:
        raise ValueError(f"num_experts_per_tok {config.num_experts_per_tok} of num_experts {config.num_experts}")


class RoutedExperts(nn.ModuleList):
    """The expert list of a sparse layer, called with the router's choice.

    The experts stay ordinary modules (names, checkpoints, PEFT and quantisation as ever). Fast weights of their
    projections are put into `fast` for the time of a forward pass.
    """

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__(experts)
        self._reset()

    def _reset(self) -> None:
        self.packs = True  #: whether frozen weights may move into one buffer; not where an engine moves them itself
        self.trains = True  #: whether a backward pass goes on to the weights, rather than to the fast ones alone
        self.fast: dict[str, SiteWeights] = {}
        self._held: dict[tuple, list[Projection] | None] | None = None  #: of `held_still`
        self._packed: dict[str, Tensor] = {}
        self._addresses: dict[str, list[int]] = {}  #: where the packed weights were when they were packed

    @classmethod
    def adopt(cls, experts: nn.ModuleList) -> None:
        """Make a plain list of experts one of these, in place."""
        experts.__class__ = cls
        experts._reset()

    @torch.compiler.disable(reason="a graph for each of thousands of matrices would gain nothing on the products")
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
        rows, device = x.flatten(0, 1), x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        parts = self._made_of(dtype, torch.is_autocast_enabled(device))
        routes = Routes.of(chosen, len(self), samples)
        # A CPU's threads share a batched product, not a grouped one. In training dropout would draw for fillers, too.
        few = device == "cpu" and chosen.numel() <= FEW_ROWS * len(self)
        if few and parts is not None and not (self.training or torch.is_grad_enabled()):
            routes = routes.padded(MOST_PADDING)
        weights = weights.flatten().index_select(0, routes.order)[:, None]
        if parts is None:
            output = self._one_by_one(rows, weights, routes, fast)
        else:
            for number, name in enumerate(PROJECTIONS):
                if name in fast:
                    parts[number] = parts[number].under(_fast(fast[name], dtype))
            output = expert_ffn(rows, weights, routes, Experts(*parts, self[0].act_fn), dtype)
        return output.to(x.dtype).view_as(x)

    # === all at once ===

    def _made_of(self, dtype: torch.dtype, autocast: bool) -> list[Projection] | None:
        """The projections, without fast weights, or none if each expert has to compute for itself.

        In the inner loop their weights and LoRA are constants.
        """
        graph = self.trains and torch.is_grad_enabled()
        held = {} if self._held is None else self._held
        keys = [(dtype, autocast, known) for known in (True, graph)]  # what has a graph serves without it, too
        key = keys[0] if keys[0] in held else keys[1]
        if key not in held:
            with torch.set_grad_enabled(graph):
                linears = {name: [getattr(expert, name) for expert in self] for name in PROJECTIONS}
                parts = [self._projection(name, of_name, dtype) for name, of_name in linears.items()]
            held[key] = None if None in parts else parts
        parts = held[key]
        return parts and [part if self.trains else part.detached() for part in parts]

    def _projection(self, name: str, linears: list[nn.Module], dtype: torch.dtype) -> Projection | None:
        """If all are linear layers without bias, or all such layers under the same single plain LoRA."""
        adapted = isinstance(linears[0], LoraLayer)
        if adapted and not _have_the_same_lora(linears):
            return None
        bases = [linear.base_layer for linear in linears] if adapted else linears
        packed = self._is_packed(bases[0])
        if not all(self._is_packed(base) if packed else type(base) is nn.Linear for base in bases):
            return None
        if any(base.bias is not None for base in bases):
            return None
        own = [base.weight for base in bases]
        weight = partial(self._unpack, bases) if packed else self._matrices(name, own, own[0].dtype)
        in_use = adapted and not linears[0].disable_adapters and not linears[0].merged
        lora = [self._lora(name, linears, dtype)] if in_use else []
        return Projection(weight, (bases[0].compute_dtype if packed else None) or dtype, lora)

    def _lora(self, name: str, linears: list[nn.Module], dtype: torch.dtype) -> Adapter:
        """The outer LoRA of one projection: in autocast's dtype; without it in its own, or in the input's if that is
        narrower, as PEFT loads every adapter in float32, in which a GPU has no grouped product."""
        first, adapter = linears[0], linears[0].active_adapters[0]
        own = first.lora_A[adapter].weight
        if not torch.is_autocast_enabled(own.device.type):
            dtype = min(own.dtype, dtype, key=lambda one: one.itemsize)
        down, up = (
            self._matrices(f"{name}.{adapter}.{side}", [layer[adapter].weight for layer in layers], dtype)
            for side, layers in (("A", [one.lora_A for one in linears]), ("B", [one.lora_B for one in linears]))
        )
        dropout = first.lora_dropout[adapter]
        probability = 0.0 if isinstance(dropout, nn.Identity) or not dropout.training else dropout.p
        return Adapter(down, up, first.scaling[adapter], dtype, dropout=probability)

    def _matrices(self, name: str, weights: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Of all experts [E, out, in]."""
        packed = self._pack(name, weights)
        return (torch.stack(weights) if packed is None else packed).to(dtype)

    def _pack(self, name: str, weights: list[Tensor]) -> Tensor | None:
        """Frozen weights become views of one buffer [E, out, in], so that stacking them costs nothing afterwards."""
        if not self.packs or any(weight.requires_grad for weight in weights):
            return None
        if self._addresses.get(name) != [weight.data_ptr() for weight in weights]:
            self._packed[name] = packed = torch.stack([weight.detach() for weight in weights])
            for weight, view in zip(weights, packed, strict=True):
                weight.data = view
            self._addresses[name] = [weight.data_ptr() for weight in weights]
        return self._packed[name]

    @staticmethod
    def _is_packed(linear: nn.Module) -> bool:
        """Whether a layer's weights are packed in 4 bit, by bitsandbytes."""
        bitsandbytes = sys.modules.get("bitsandbytes")
        return bitsandbytes is not None and isinstance(linear, bitsandbytes.nn.Linear4bit)

    @staticmethod
    def _unpack(linears: list[nn.Module]) -> Tensor:
        """The weights of all written out [E, out, in], in the dtype that they were packed from."""
        from bitsandbytes.functional import dequantize_4bit

        states = [linear.weight.quant_state for linear in linears]
        out = linears[0].weight.new_empty(len(linears), *states[0].shape, dtype=states[0].dtype)
        for linear, state, part in zip(linears, states, out, strict=True):
            part.copy_(dequantize_4bit(linear.weight.data, state))
        return out

    # === one by one ===

    def _one_by_one(self, x: Tensor, weights: Tensor, routes: Routes, fast: dict[str, SiteWeights]) -> Tensor:
        """Each expert on its rows. x [N, D], weights [T, 1] → [N, D]."""

        def project(name: str, rows: Tensor) -> Tensor:
            parts = zip(self, split(rows, routes.offsets), strict=True)
            output = torch.cat([getattr(expert, name)(part) for expert, part in parts])
            site = fast.get(name)
            return output if site is None else output + site.grouped(rows, routes.fast_offsets).to(output.dtype)

        rows = x.index_select(0, routes.tokens)
        output = project("down_proj", self[0].act_fn(project("gate_proj", rows)) * project("up_proj", rows)) * weights
        return output.new_zeros(x.shape).index_add(0, routes.tokens, output)


@contextmanager
def held_still(experts: Iterable[RoutedExperts]) -> Iterator[None]:
    """Passes between which no weight and no adapter changes: what one of them has stacked serves the others too.

    Not for experts whose weights an engine gathers for each pass: they would all stay.
    """
    free = [part for part in experts if part.packs and part._held is None]
    for part in free:
        part._held = {}
    try:
        yield
    finally:
        for part in free:
            part._held = None


@contextmanager
def inner_pass(parts: Iterable[RoutedExperts | OutputLinear]) -> Iterator[None]:
    """Forward passes whose backward pass ends at the fast weights.

    Weights are constants in them, and the experts' backward hooks are left out: ZeRO-3 takes the first backward pass
    through such a module for the one that brings its parameters' gradients. This one brings none.
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


def _have_the_same_lora(linears: list[LoraLayer]) -> bool:
    """Whether one plain LoRA, the same for all, is all that is there."""
    first = linears[0]
    state, active = _state(first), first.active_adapters
    if type(first).__module__ not in PLAIN_LORA or len(active) != 1:
        return False
    adapter = active[0]
    return all(
        type(linear) is type(first)
        and _state(linear) == state
        and adapter in linear.lora_A
        and adapter not in linear.lora_variant
        and not linear.lora_bias[adapter]
        for linear in linears
    )


def _state(linear: LoraLayer) -> tuple:
    return linear.active_adapters, linear.disable_adapters, linear.merged_adapters, linear.scaling
