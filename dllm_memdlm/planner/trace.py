"""What each part of the model does in one step: the real modules, run on fake tensors of the recipe's shapes.

A step is too long to run whole for a model of fifty thousand small modules, but its layers repeat: each kind of part
is run once, through everything that happens to it in a step, and `timeline` puts the parts together.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ..backbones import staged_backbone
from ..backbones.layers import take
from ..backbones.moe import RoutedExperts, inner_pass
from ..backbones.output import CHUNK, OutputLinear
from ..fast_weights import FastWeights, sgd_step
from ..losses import masked_diffusion_loss
from ..memory import ParametricMemory
from .live import LiveBytes, Span
from .part import Life, Sink, Sizes, Source
from .shapes import held_bytes, materialise


class Tracer:
    """Runs the parts of one model. Their weights leave the meta device for fake tensors, in place."""

    def __init__(self, model: nn.Module, sizes: Sizes) -> None:
        self.backbone, self.sizes = staged_backbone(model.train()), sizes
        self._live, self._fake, self._on = LiveBytes(), FakeTensorMode(), False
        self._materialised: set[nn.Module] = set()
        # A fake random number has no state to restore.
        self._recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        self._real(self.backbone.model.rotary_emb)
        with self._modes():
            self._link = torch.zeros((), requires_grad=True)

    # === parts ===

    def embedding(self, plain: bool) -> Life:
        """Token embeddings [B, L, D], the first part of the trunk."""
        module, tokens = self._real(self.backbone.get_input_embeddings()), self._tokens(self.sizes.length)
        return self._trunk(lambda: module(tokens), module, plain)

    def trunk_layer(self, index: int, dtype: torch.dtype, attached: bool, plain: bool) -> Life:
        """A layer below the fast weights. `attached`: its input requires a gradient; `plain`: as in `Life`."""
        layer = self._real(self.backbone.layers[index])
        if self.sizes.checkpointing:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, self._recompute
        return self._trunk(lambda x: layer(x, **self._context(x)), layer, plain, (dtype, attached))

    def widening(self, dtype: torch.dtype, attached: bool, plain: bool) -> Life:
        """accelerate's conversion of the trunk's output to float32, under autocast."""
        return self._trunk(lambda x: x.float(), nn.Identity(), plain, (dtype, attached))

    def head_layer(
        self, index: int, dtype: torch.dtype, attached: bool, memory: ParametricMemory | None, first: bool
    ) -> Life:
        """A layer with fast weights, or plain MDLM's last one. Never checkpointed; the last has fewer outputs."""
        layer, last = self._real(self.backbone.layers[index]), index == len(self.backbone.layers) - 1
        positions = self._tokens(self.sizes.masked) if last else None
        call = functools.partial(nn.Module.__call__, layer)

        def run(x: Tensor) -> Tensor:
            if positions is None:
                return call(x, **self._context(x))
            if self.backbone.layers_take_queries:
                return call(x, queries=positions, **self._context(x))
            return take(call(x, **self._context(x)), positions)

        length = self.sizes.length
        with self._life(layer) as life:
            self._warm(life, lambda: run(self._input(length, dtype, False)))
            holding: Any = contextlib.nullcontext
            if memory is not None:
                part = copy.copy(memory)
                part.sites = [site for site in memory.sites if site.shape.name.startswith(f"layers.{index}.")]
                part.shapes = [site.shape for site in part.sites]
                fast = self.fast_weights(part)
                holding = functools.partial(part.holding, fast)
                # The first layer's input stays for the steps to come.
                stays = [self._input(length, dtype, False)] if first else []
                leaves = fast.leaves()
                with part.holding(leaves), inner_pass(m for m in layer.modules() if isinstance(m, RoutedExperts)):
                    life.inner, out = self._forward(run, stays or [self._input(length, dtype, True)], keep=first)
                    targets = [*leaves.tensors.values(), *([] if first else [self._link])]
                    life.inner_backward = self._backward(_gradients_of(targets), out)
                del leaves, targets
                if memory.objective is not None:
                    with torch.no_grad(), holding():
                        life.plain, out = self._forward(run, stays or [self._input(length, dtype, False)], keep=first)
                stays.clear()
            with holding():
                life.forward, out = self._forward(run, [self._input(length, dtype, attached)])
            life.dtype = out[0].dtype
        life.backward = self._backward(lambda end: end.backward(), out, layer)
        return life

    def tail(self, dtype: torch.dtype, memory: ParametricMemory | None) -> Life:
        """Final norm, logits at the loss positions and the losses."""
        sizes, masked = self.sizes, self.sizes.masked
        norm, head = self._real(self.backbone.model.norm), self._real(self.backbone.get_output_embeddings())
        head.chunk = CHUNK[sizes.device]
        with self._modes():
            tokens, valid = torch.empty(sizes.batch, masked).long(), torch.ones(sizes.batch, masked).bool()
            ones = torch.ones(sizes.batch)

        def view(hidden: Tensor, project: bool) -> Tensor:
            hidden = norm(hidden)
            out = head(hidden) if project else hidden
            return out if sizes.amp is None else out.float()  # accelerate's wrapper widens all outputs

        def nll(hidden: Tensor) -> Tensor:
            return head(norm(hidden), tokens)

        def outer(hidden: Tensor) -> Tensor:
            return masked_diffusion_loss(nll(hidden), valid, ones, ones.long(), sizes.norm)[0]

        with self._life(nn.ModuleList([norm, head])) as life:
            self._warm(life, lambda: nll(self._input(masked, dtype, False)))
            if memory is not None:
                objective, target = memory.objective, None
                if objective is not None:
                    given = [self._input(masked, dtype, False)]
                    with torch.no_grad():
                        life.plain, (target,) = self._forward(lambda x: view(x, objective.on_logits), given)

                def inner(hidden: Tensor) -> Tensor:
                    at = nll(hidden) if objective is None else objective.loss(view(hidden, objective.on_logits), target)
                    return ((at * valid).sum(-1) * ones / valid.sum(-1).clamp_min(1)).sum()

                with inner_pass(part for part in [head] if isinstance(part, OutputLinear)):
                    life.inner, out = self._forward(inner, [self._input(masked, dtype, True)])
                    life.inner_backward = self._backward(_gradients_of([self._link]), out, loss=True)
                del target
            life.forward, out = self._forward(outer, [self._input(masked, dtype, True)])
        life.backward = self._backward(lambda end: end.backward(), out, nn.ModuleList([norm, head]), loss=True)
        return life

    def update(self, memory: ParametricMemory) -> tuple[int, Span]:
        """Bytes of one φ, and the SGD step from a φ and its gradients to the next φ."""
        with self._modes():
            with self._live.span() as size:
                fast = self.fast_weights(memory)
            gradients = {name: torch.empty_like(value) for name, value in fast.tensors.items()}
            loss = torch.empty(fast.samples)
            with self._live.span() as span:
                fast, _ = sgd_step(fast, gradients, loss, memory.config)
                del gradients
        return size.kept, span

    def fast_weights(self, memory: ParametricMemory) -> FastWeights:
        """φ of a batch, of the shapes that `FastWeights.initial` gives it."""
        samples = 1 if memory.config.scope == "batch" else self.sizes.batch
        tensors = {
            f"{shape.name}.{name}": torch.empty(*([] if shape.experts is None else [shape.experts]), samples, *size)
            for shape in memory.shapes
            for name, size in shape.tensors(memory.config).items()
        }
        return FastWeights(tensors, memory.config.scaling)

    # === how a part is run ===

    def _trunk(
        self,
        run: Callable[..., Tensor],
        module: nn.Module,
        plain: bool,
        given: tuple[torch.dtype, bool] | None = None,
    ) -> Life:
        def inputs(attached: bool) -> list[Tensor]:
            return [] if given is None else [self._input(self.sizes.length, given[0], attached)]

        with self._life(module) as life:
            self._warm(life, lambda: run(*inputs(False)))
            life.forward, out = self._forward(run, inputs(given is not None and given[1]))
            if plain:
                with torch.no_grad():
                    life.plain, _ = self._forward(run, inputs(False))
            life.dtype = out[0].dtype
        life.backward = self._backward(lambda end: end.backward(), out, module)
        return life

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        if self._on:  # twice on, it would count everything twice
            yield
            return
        self._on = True
        try:
            with self._fake, self._live:
                yield
        finally:
            self._on = False

    @contextlib.contextmanager
    def _life(self, module: nn.Module) -> Iterator[Life]:
        """The time of compute_loss. On a CPU all of it is under autocast, on a GPU each stage by itself."""
        life = Life(held_bytes(module, trainable=True))
        with self._modes():
            with self._autocast(self.sizes.device == "cpu"):
                yield life
                before = self._live.now
            life.released = before - self._live.now

    def _autocast(self, wanted: bool = True) -> Any:
        amp = self.sizes.amp if wanted else None
        return contextlib.nullcontext() if amp is None else torch.autocast("cpu", amp)

    def _warm(self, life: Life, run: Callable[[], Tensor]) -> None:
        """Fill autocast's cache where it lives on."""
        if self.sizes.amp is None or self.sizes.device != "cpu":
            return
        before = self._live.now
        with self._autocast():
            output = run()
            del output
        life.cached = self._live.now - before

    def _forward(
        self, run: Callable[..., Tensor], inputs: list[Tensor], keep: bool = False
    ) -> tuple[Span, list[Tensor]]:
        """Run forward under autocast. What the graph does not need of the inputs is freed, unless `keep`. → [output]"""
        held = list(inputs) if keep else []
        with self._live.span() as span:
            with self._autocast():
                out = [run(inputs.pop())] if inputs else [run()]
                before = self._live.now
            span.cached = before - self._live.now
        inputs.extend(held)
        return span, out

    def _backward(
        self, run: Callable[[Tensor], Any], out: list[Tensor], module: nn.Module | None = None, loss: bool = False
    ) -> Span:
        """Run backward from an output: a loss, or one whose gradient comes from a later part."""
        with self._modes():
            for parameter in module.parameters() if module is not None and self.sizes.accumulates else ():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            end = out[0] if loss or not out[0].requires_grad else Sink.apply(out[0])
            out.clear()  # it belongs to the later part, which frees it
            with self._live.span() as span:
                results = run(end) if end.requires_grad else None
                del end
                for parameter in [] if module is None else module.parameters():
                    if parameter.requires_grad and parameter.grad is None:  # of an expert that others stood for
                        parameter.grad = torch.empty_like(parameter)
            del results
        if module is not None:
            module.zero_grad()
        return span

    def _real(self, module: nn.Module) -> nn.Module:
        if module not in self._materialised:
            with self._modes():
                materialise(module, self.sizes.cast)
            self._materialised.add(module)
        return module

    def _tokens(self, count: int) -> Tensor:
        with self._modes():
            return torch.empty(self.sizes.batch, count, dtype=torch.int64)

    def _input(self, count: int, dtype: torch.dtype, attached: bool) -> Tensor:
        shape = (self.sizes.batch, count, self.backbone.config.hidden_size)
        return Source.apply(self._link, shape, dtype) if attached else torch.empty(shape, dtype=dtype)

    def _context(self, x: Tensor) -> dict[str, Any]:
        positions = torch.arange(x.shape[1])[None]
        embeddings = self.backbone.model.rotary_emb(x, positions)
        return {"attention_mask": None, "position_ids": positions, "position_embeddings": embeddings}


def _gradients_of(targets: list[Tensor]) -> Callable[[Tensor], Any]:
    return lambda end: torch.autograd.grad(end, targets, allow_unused=True)
