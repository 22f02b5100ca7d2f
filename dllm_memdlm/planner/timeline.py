"""One training step put together from its parts: bytes alive over time, and FLOPs.

The order is that of `MemDLMTrainer.compute_loss` and `ParametricMemory.write`; a test compares it with what they do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..backbones import staged_backbone
from ..memory import ParametricMemory
from ..trajectory import ENDS_ON_ANCHOR
from .live import Span
from .part import Life, Sizes
from .trace import Tracer

Named = list[tuple[str, Life]]

#: What a step's own bytes are for.
ACTIVATIONS, LOGITS, FAST, GRADIENTS = "activations", "logits", "fast weights", "gradients"


@dataclass
class Timeline:
    """Bytes alive by what they are for, and their highest point so far."""

    now: dict[str, int] = field(default_factory=lambda: dict.fromkeys((ACTIVATIONS, LOGITS, FAST, GRADIENTS), 0))
    highest: dict[str, int] = field(default_factory=dict)  #: what was alive when all together was most
    largest: dict[str, int] = field(default_factory=dict)  #: of each by itself, at any time
    moment: str = ""  #: when that was, in words
    flops: int = 0

    def add(self, kind: str, span: Span, moment: str) -> None:
        """A span of one kind's bytes, at the end of the time so far."""
        self.flops += span.flops
        self.now[kind] += span.peak
        self.look(moment)
        self.now[kind] += span.kept - span.peak

    def hold(self, kind: str, size: int) -> None:
        """More bytes (or fewer, if negative) from now on."""
        self.now[kind] += size

    def look(self, moment: str) -> None:
        """Compare what is alive with the highest so far."""
        for kind, size in self.now.items():
            self.largest[kind] = max(self.largest.get(kind, 0), size)
        if sum(self.now.values()) > sum(self.highest.values()):
            self.highest, self.moment = dict(self.now), moment


class Parts:
    """The lives of all parts of a model in a step, each kind traced once."""

    def __init__(self, model: nn.Module, sizes: Sizes) -> None:
        self.tracer, self.sizes = Tracer(model, sizes), sizes
        self.layers = len(staged_backbone(model).layers)
        self._kinds = [_kind(layer) for layer in staged_backbone(model).layers]
        self._lives: dict[Any, Life] = {}

    def trunk(self, boundary: int) -> Named:
        """Embedding, layers below the boundary, conversion of their output: by name, in order."""
        embedding = self._once(("embedding",), lambda: self.tracer.embedding(True))
        parts, dtype, attached = [("embeddings", embedding)], embedding.dtype, embedding.gradients > 0
        for index in range(boundary):
            key = ("trunk", self._kinds[index], dtype, attached)
            life = self._once(key, lambda i=index, d=dtype, a=attached: self.tracer.trunk_layer(i, d, a, True))
            parts.append((f"layer {index}", life))
            dtype, attached = life.dtype, attached or life.gradients > 0
        if self.sizes.amp is not None and dtype != torch.float32:
            key = ("widening", dtype, attached)
            parts.append(("output", self._once(key, lambda: self.tracer.widening(dtype, attached, True))))
        return parts

    def head(
        self, boundary: int, memory: ParametricMemory | None, attached: bool, dtype: torch.dtype
    ) -> tuple[Named, Life]:
        """Layers from the boundary on, by name, in order; and norm, logits and loss."""
        parts = []
        for index in range(boundary, self.layers):
            first, last = index == boundary, index == self.layers - 1
            sites = None if memory is None else sum(s.name.startswith(f"layers.{index}.") for s in memory.shapes)
            key = ("head", self._kinds[index], dtype, attached, sites, first, last)
            life = self._once(
                key, lambda i=index, d=dtype, a=attached, f=first: self.tracer.head_layer(i, d, a, memory, f)
            )
            parts.append((f"layer {index}", life))
            dtype, attached = life.dtype, attached or life.gradients > 0
        key = ("tail", dtype, memory is None)
        return parts, self._once(key, lambda: self.tracer.tail(dtype, memory))

    def _once(self, key: Any, trace: Any) -> Life:
        if key not in self._lives:
            self._lives[key] = trace()
        return self._lives[key]


def step(parts: Parts, memory: ParametricMemory | None, stays: float = 1.0) -> Timeline:
    """The forward and backward passes of one micro-batch.

    `stays`: which part of a weight's gradient is still there when the backward pass is over; the rest is with the
    other GPUs.
    """
    boundary = parts.layers - 1 if memory is None else memory.boundary
    trunk = parts.trunk(boundary)
    attached = any(life.gradients for _, life in trunk)
    layers, tail = parts.head(boundary, memory, attached, trunk[-1][1].dtype)
    everything = [life for _, life in [*trunk, *layers]] + [tail]
    time = Timeline()
    if parts.sizes.accumulates:
        time.hold(GRADIENTS, int(stays * sum(life.gradients for life in everything)))
    time.hold(ACTIVATIONS, sum(life.cached for life in everything))

    _forward(time, trunk, "forward", "outer forward")
    if memory is not None:
        _inner_loop(time, parts.tracer, memory, trunk, layers, tail)
    _forward(time, layers, "forward", "outer forward")
    time.add(LOGITS, tail.forward, "outer forward, loss")
    time.hold(ACTIVATIONS, -sum(life.released for life in everything))

    fresh = not parts.sizes.accumulates
    _backward(time, LOGITS, tail, "loss", fresh, stays)
    for name, life in reversed(layers):
        _backward(time, ACTIVATIONS, life, name, fresh, stays)
    time.hold(FAST, -time.now[FAST])
    for name, life in reversed(trunk):
        _backward(time, ACTIVATIONS, life, name, fresh, stays)
    time.look("optimizer step")
    return time


def _inner_loop(time: Timeline, tracer: Tracer, memory: ParametricMemory, trunk: Named, layers: Named, tail: Life):
    config, teacher = memory.config, memory.objective is not None
    size, update = tracer.update(memory)
    time.hold(FAST, size)
    steps = config.steps if config.strategy in ("anchor_consistent", "inconsistent") else 1
    ready = {steps - 1} if config.strategy in ENDS_ON_ANCHOR else set()
    trunks = 0
    for _ in range(config.epochs):
        for k in range(steps):
            for state in (k + 1, k) if teacher else (k,):
                if state not in ready:
                    before = time.now[ACTIVATIONS]
                    _forward(time, trunk, "plain", "trunk of an inner state")
                    trunks += time.now[ACTIVATIONS] - before
                    ready.add(state)
            start = dict(time.now)
            if teacher:
                _forward(time, layers, "plain", "inner teacher")
                time.add(LOGITS, tail.plain, "inner teacher, logits")
            given = dict(time.now)
            _forward(time, layers, "inner", "inner forward")
            time.add(LOGITS, tail.inner, "inner forward, loss")
            time.add(LOGITS, tail.inner_backward, "inner backward, loss")
            for name, life in reversed(layers):
                time.add(ACTIVATIONS, life.inner_backward, f"inner backward, {name}")
            time.now = {**given, FAST: given[FAST] + size}  # the graph is gone, the gradients of φ are there
            time.add(FAST, update, "inner update")
            time.now = start
    time.hold(ACTIVATIONS, -trunks)


def _forward(time: Timeline, parts: Named, which: str, moment: str) -> None:
    """One stage. What autocast caches in it goes at its end."""
    cached = 0
    for name, life in parts:
        span = vars(life)[which]
        time.add(ACTIVATIONS, span, f"{moment}, {name}")
        time.hold(ACTIVATIONS, span.cached)
        cached += span.cached
    time.hold(ACTIVATIONS, -cached)


def _backward(time: Timeline, kind: str, life: Life, name: str, fresh: bool, stays: float) -> None:
    """The outer backward pass of a part. `fresh`: it makes the gradients, and does not add to those there are."""
    time.add(kind, life.backward, f"outer backward, {name}")
    made = life.gradients if fresh else 0
    time.hold(kind, -made)
    time.hold(GRADIENTS, int(made * stays))


def _kind(layer: nn.Module) -> int:
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return hash(tuple((name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors))
