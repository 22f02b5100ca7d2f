"""Parametric Memory (section 3): the inner loop that writes fast weights, and the model with them in place.

memory = ParametricMemory(model, config, mask_token_id=...)
written = memory.write(trajectory)
with memory.holding(written.fast_weights):
    logits = model(input_ids=x).logits
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbones import StageOutput, adapted_layers, find_sites, staged_backbone
from ..backbones.moe import RoutedExperts, frozen
from ..backbones.site_weights import SiteWeights
from ..config import ConfigError, MemoryConfig
from . import global_batch
from .fast_weights import FastWeights, InnerStep, sgd_step
from .objectives import OBJECTIVES
from .trajectory import ENDS_ON_ANCHOR, Trajectory


class Written(NamedTuple):
    """The result of an inner loop."""

    fast_weights: FastWeights
    steps: list[InnerStep]  #: in order; epochs · K of them
    finite: Tensor  #: sets of fast weights whose every step was finite [S] bool; the others have no effect


class ParametricMemory:
    """Writes and holds the fast weights of one model.

    Args:
        model: a backbone, or PEFT's wrapper around one; stages are called on it.
        config: settings of the inner loop.
        mask_token_id: the token that stands for a masked position.
        right_shift_logits: whether logits at position i predict token i + 1, as those of some architectures always do.

    Raises:
        ConfigError: `config.target_modules` names a layer that is not there.
        TypeError: the model has no staged forward.
    """

    def __init__(
        self, model: nn.Module, config: MemoryConfig, mask_token_id: int, right_shift_logits: bool = False
    ) -> None:
        self.model = model
        self.config = config
        self.mask_token_id = mask_token_id
        backbone = staged_backbone(model)
        self.right_shift_logits = right_shift_logits or backbone.right_shift_logits
        self.objective = OBJECTIVES[config.objective]
        self.sites = find_sites(backbone, config)
        self.shapes = [site.shape for site in self.sites]
        adapted = adapted_layers(len(backbone.layers), config)
        #: The first layer that carries fast weights; those below are the prefix.
        self.boundary = adapted.start
        suffix = [part for index in adapted for part in backbone.layers[index].modules()]
        self._experts = [part for part in suffix if isinstance(part, RoutedExperts)]
        self._held = False

    @property
    def fast_parameters(self) -> int:
        """The number of fast weights of one sample."""
        return sum(shape.numel(self.config) for shape in self.shapes)

    # === the inner loop ===

    def write(
        self,
        trajectory: Trajectory,
        *,
        anchor_prefix: Tensor | None = None,
        initial: FastWeights | None = None,
    ) -> Written:
        """Run the inner loop along a trajectory: φ0 → … → φK, for every epoch.

        The loop is first order: the result is detached, and no gradient reaches the model. It leaves the model's mode
        alone, so dropout is active while adapting only where the caller has it on.

        Args:
            trajectory: the states, on the model's device.
            anchor_prefix: the prefix's output on the anchor [B, L, D], if the caller has it; it is not computed again.
            initial: φ0; drawn from the trajectory's noise keys by default.
        """
        device = trajectory.input_ids.device
        fast = initial or FastWeights.initial(self.shapes, self.config, self.keys_of(trajectory), device)
        finite, steps = torch.ones(fast.samples, dtype=torch.bool, device=device), []
        prefixes: dict[int, Tensor] = {}  # the prefix has no fast weights: each state passes it once, for all epochs
        if anchor_prefix is not None and self.config.strategy in ENDS_ON_ANCHOR:
            prefixes[trajectory.steps - 1] = anchor_prefix.detach()

        def prefix_of(k: int) -> Tensor:
            if k not in prefixes:
                state = trajectory.state(trajectory.inner_masks[:, k], self.mask_token_id)
                with torch.no_grad():
                    prefixes[k] = self.prefix(state, trajectory.attention_mask)
            return prefixes[k]

        for _ in range(self.config.epochs):
            for k in range(trajectory.steps):
                next_prefix = None if self.objective is None else prefix_of(k + 1)
                fast, step = self._inner_step(fast, trajectory, k, prefix_of(k), next_prefix)
                steps.append(step)
                finite = finite & step.finite
        return Written(fast.keep(finite), steps, finite)

    def write_all(self, trajectories: Iterable[Trajectory]) -> Written:
        """Run the inner loop along one trajectory after another: the windows of a prompt, into one φ (ours)."""
        remaining = iter(trajectories)
        written = self.write(next(remaining))
        for trajectory in remaining:
            part = self.write(trajectory, initial=written.fast_weights)
            finite = written.finite & part.finite
            written = Written(part.fast_weights.keep(finite), written.steps + part.steps, finite)
        return written

    def _inner_step(
        self,
        fast: FastWeights,
        trajectory: Trajectory,
        k: int,
        prefix: Tensor,
        next_prefix: Tensor | None,
    ) -> tuple[FastWeights, InnerStep]:
        """Take one SGD step on state k: pre-anchor alignment for the first, anchor-to-target for the last."""
        objective, config, attention_mask = self.objective, self.config, trajectory.attention_mask
        positions = trajectory.loss_positions(k, config.targets)
        index = positions.logit_index(self.right_shift_logits)

        def view(hidden: Tensor, on_logits: bool) -> Tensor:
            out = self.suffix(hidden, index, attention_mask, project=on_logits)
            seen: Tensor = out["logits" if on_logits else "hidden"]
            return seen

        # 1. A teacher sees the next state, with the same φ.
        if objective is not None:
            assert next_prefix is not None
            with torch.no_grad(), self.holding(fast):
                teacher = view(next_prefix, objective.on_logits)
        leaves = fast.leaves()
        with torch.enable_grad(), self.holding(leaves), frozen(self._experts):
            # 2. The loss of each token [B, M].
            if objective is not None:
                losses = objective.loss(view(prefix, objective.on_logits), teacher)
            else:
                tokens = positions.gather(trajectory.input_ids)
                losses = self.suffix(prefix, index, attention_mask, tokens=tokens)["nll"]
            # 3. The mean of a sample's tokens, weighted; of all the batch's where its samples share one φ.
            total, count = (losses * positions.valid).sum(-1), positions.valid.sum(-1)  # [B]
            if config.weighting == "scheduler" and config.source == "response":
                total = total * trajectory.inner_weights[:, k]
            if fast.samples == 1:
                total, count = total.sum(0, keepdim=True), count.sum(0, keepdim=True)
            if config.sync:
                (count,) = global_batch.total([count])
            loss = total / count.clamp_min(1)  # [S]
            # 4. Its gradient, for φ alone.
            wanted = list(leaves.tensors.values())
            gradients: Sequence[Tensor] = torch.autograd.grad(loss.sum(), wanted, materialize_grads=True)
        if config.sync:
            loss, *gradients = global_batch.total([loss.detach(), *gradients])
        fast, step = sgd_step(fast, dict(zip(leaves.tensors, gradients, strict=True)), loss, config)
        return fast, step._replace(tokens=count)

    def keys_of(self, trajectory: Trajectory) -> Tensor:
        """Return the noise key of each set of fast weights [S]: every sample's, or the first one's if they share."""
        if self.config.scope == "sample":
            return trajectory.noise_keys
        first = trajectory.noise_keys[:1]
        return global_batch.first(first) if self.config.sync else first

    # === the model's two stages ===

    def prefix(self, input_ids: Tensor, attention_mask: Tensor | int | None = None) -> Tensor:
        """Run the layers without fast weights. input_ids [B, L] → [B, L, D]."""
        out = self.model(stage="prefix", input_ids=input_ids, attention_mask=attention_mask, boundary=self.boundary)
        hidden: Tensor = out.hidden
        return hidden

    def suffix(
        self, hidden: Tensor, positions: Tensor, attention_mask: Tensor | int | None = None, **wanted: Any
    ) -> StageOutput:
        """Run the layers from the boundary on, at chosen positions. hidden [B, L, D], positions [B, M].

        `wanted` says what of `StagedForward.forward`: `tokens` for their NLL, `project` for logits or hidden states.
        """
        own = {"boundary": self.boundary, "attention_mask": attention_mask}
        out: StageOutput = self.model(stage="suffix", hidden=hidden, positions=positions, **own, **wanted)
        return out

    # === fast weights in place ===

    @contextmanager
    def holding(self, fast_weights: FastWeights | None) -> Iterator[None]:
        """Compute with `fast_weights` in place until the block ends, however it ends.

        Raises:
            ConfigError: as `check`.
            RuntimeError: the model holds fast weights already.
        """
        if fast_weights is None:
            yield
            return
        self.check(fast_weights)
        if self._held:
            raise RuntimeError("the model already holds fast weights; leave that block first")
        with ExitStack() as stack:
            self._held = True
            stack.callback(setattr, self, "_held", False)
            for site in self.sites:
                weights = fast_weights.site(site.shape.name)
                if isinstance(site.module, RoutedExperts):
                    site.module.fast[site.projection] = weights
                    stack.callback(site.module.fast.pop, site.projection)
                else:
                    stack.callback(site.module.register_forward_hook(_adding(weights)).remove)
            yield

    @torch.no_grad()
    def merge(self, fast_weights: FastWeights) -> None:
        """Add the fast weights of one sample to the model's own, for good; layers under adapters cannot be added to.

        Raises:
            ConfigError: as `check`.
        """
        self.check(fast_weights)
        for site in self.sites:
            experts = isinstance(site.module, RoutedExperts)
            linear: Any = getattr(site.module, site.projection) if experts else site.module
            (difference,) = fast_weights.site(site.shape.name).difference().unbind(-3)
            linear.weight += difference

    def check(self, fast_weights: FastWeights) -> None:
        """Raise ConfigError unless they were written for these sites, and for layers of this size."""
        expected = {
            f"{shape.name}.{name}": (() if shape.experts is None else (shape.experts,)) + size
            for shape in self.shapes
            for name, size in shape.tensors(self.config).items()
        }
        found = {name: (*value.shape[:-3], *value.shape[-2:]) for name, value in fast_weights.tensors.items()}
        for name in sorted(expected.keys() | found.keys()):
            size, wanted = found.get(name, "absent"), expected.get(name, "absent")
            if size != wanted:
                raise ConfigError(f"fast weights that do not fit this model: {name} is {size}, expected {wanted}")


def _adding(weights: SiteWeights) -> Any:
    """Make a forward hook that adds the fast weights' output to that of their linear layer."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + weights.dense(inputs[0].to(output.dtype)).to(output.dtype)

    return hook
