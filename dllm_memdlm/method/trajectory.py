"""Anchor-consistent local trajectories (section 3.2): the denoising states that the inner loop visits.

A state is a clean sequence x0 with a mask over it; `where(mask, [MASK], x0)` is what the model sees. Everything here
is a pure function on [B, L] tensors, and every random choice reads noise that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..compat.dllm_api import BaseAlphaScheduler, LinearAlphaScheduler
from ..config import MemoryConfig
from . import noise
from .losses import Positions, positions_of


@dataclass
class Trajectory:
    """A batch with its noise. All tensors are batch-first, so that it can be split and moved as it is."""

    input_ids: Tensor  #: x0, the clean tokens [B, L] int64
    maskable: Tensor  #: tokens that may be masked: the response in training, all of a prompt [B, L] bool
    noise_level: Tensor  #: t, one for each sample [B] float32
    noise_weight: Tensor  #: w(t) of the schedule [B] float32
    anchor_mask: Tensor  #: M_t, the state that the outer loss is computed on [B, L] bool
    inner_masks: Tensor  #: the K inner states in order, and the state that the last one's teacher sees [B, K+1, L] bool
    inner_ratios: Tensor  #: r, the level that weights each inner state's loss [B, K] float32
    inner_weights: Tensor  #: w(r) of the schedule [B, K] float32
    noise_keys: Tensor  #: one key a sample, from which its fast weights are initialised [B] int64
    #: Where each inner state has its loss, then where the anchor has [B, M of that state] int64. The host finds these
    #: with the noise: a training step would have to wait for the device to learn how many there are.
    loss_index: tuple[Tensor, ...] = ()
    #: As in `StagedForward.forward`. None: all tokens see each other.
    attention_mask: Tensor | int | None = None

    @property
    def steps(self) -> int:
        """K, inner states."""
        return self.inner_masks.shape[1] - 1

    def state(self, mask: Tensor, mask_token_id: int) -> Tensor:
        """Return the tokens that the model sees under `mask` [B, L] → [B, L] int64."""
        return torch.where(mask, mask_token_id, self.input_ids)

    def loss_mask(self, state: int, targets: str = "masked") -> Tensor:
        """Mark where inner state `state` has its loss, or the anchor (state K, or -1). → [B, L] bool."""
        if state in (self.steps, -1):
            return self.anchor_mask
        mask = self.inner_masks[:, state]
        return mask & ~self.inner_masks[:, state + 1] if targets == "newly_revealed" else mask

    def loss_positions(self, state: int, targets: str = "masked") -> Positions:
        """Return the positions that `loss_mask` marks."""
        mask = self.loss_mask(state, targets)
        if not self.loss_index:  # of a trajectory that `build_trajectory` has not made
            return positions_of(mask)
        index = self.loss_index[state]
        return Positions(index, mask.gather(1, index))

    def without_loss(self) -> Trajectory:
        """Return it with nothing masked and one token long: an inner loop along it leaves φ as it is."""
        rows = len(self.input_ids)
        mask = torch.zeros_like(self.anchor_mask[:, :1])
        index = (torch.zeros_like(self.noise_keys[:, None]),) * (self.steps + 1)
        masks = mask[:, None].expand(rows, self.steps + 1, 1)
        return replace(
            self,
            input_ids=self.input_ids[:, :1],
            maskable=mask,
            anchor_mask=mask,
            inner_masks=masks,
            loss_index=index,
            attention_mask=None,
        )

    def to(self, device: torch.device | str) -> Trajectory:
        """Return it on another device."""
        mask = self.attention_mask
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        moved["attention_mask"] = mask.to(device) if isinstance(mask, Tensor) else mask
        return replace(self, **moved, loss_index=tuple(index.to(device) for index in self.loss_index))

    def to_batch(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the fields as a flat dict, which collators, data loaders and accelerate carry; `prefix` names them."""
        batch = {name: getattr(self, name) for name in _TENSORS}
        batch |= {f"loss_index_{state}": index for state, index in enumerate(self.loss_index)}
        if self.attention_mask is not None:
            batch["attention_mask"] = self.attention_mask
        return {prefix + name: value for name, value in batch.items()}

    @classmethod
    def from_batch(cls, batch: dict[str, Any], prefix: str = "") -> Trajectory:
        """Read what `to_batch` returned, and the batch's attention mask; other keys are ignored.

        Raises:
            KeyError: a field is missing.
            ValueError: the tokens are not as many as the masks.
        """
        found = {name: batch[prefix + name] for name in _TENSORS}
        tokens, masks = found["input_ids"].shape, found["anchor_mask"].shape
        if tokens != masks:
            raise ValueError(
                f"tokens of shape {tuple(tokens)} with masks of shape {tuple(masks)}: a collator that changes the "
                "length belongs inside AnchorTrajectoryCollator"
            )
        states = range(found["inner_masks"].shape[1])
        index = tuple(batch[f"{prefix}loss_index_{state}"] for state in states)
        return cls(**found, loss_index=index, attention_mask=batch.get(f"{prefix}attention_mask"))


_TENSORS = [f.name for f in fields(Trajectory) if f.name not in ("loss_index", "attention_mask")]


def build_trajectory(
    input_ids: Tensor,
    maskable: Tensor,
    noise_level: Tensor,
    mask_probability: Tensor,
    keys: Tensor,
    config: MemoryConfig,
    scheduler: BaseAlphaScheduler | None = None,
) -> Trajectory:
    """Noise a batch: the anchor at t, and the inner states of the configured strategy.

    Args:
        input_ids: clean tokens [B, L] int64.
        maskable: tokens that may be masked [B, L] bool.
        noise_level: t of each sample [B] float32; `mask_probability` is 1 - α(t) [B].
        keys: one noise key a sample [B] int64 (`noise.example_keys`).
        config: strategy, steps and pre_anchor_scale; with memory off there are no inner states.
        scheduler: the schedule that weights come from; linear by default.
    """
    scheduler = scheduler or LinearAlphaScheduler()
    anchor = sample_anchor(maskable, mask_probability, keys)
    if config.enabled:
        masks, ratios = STRATEGIES[config.strategy](config, maskable, anchor, noise_level, keys)
    else:
        masks, ratios = torch.zeros_like(anchor[:, None]), noise_level.new_zeros(len(anchor), 0)
    weight, weights = scheduler.weight(noise_level), scheduler.weight(ratios)
    built = Trajectory(input_ids, maskable, noise_level, weight, anchor, masks, ratios, weights, keys)
    built.loss_index = tuple(positions_of(built.loss_mask(k, config.targets)).index for k in range(built.steps + 1))
    return built


def sample_anchor(maskable: Tensor, mask_probability: Tensor, keys: Tensor) -> Tensor:
    """Draw M_t: each maskable token on its own. maskable [B, L], mask_probability [B], keys [B] → [B, L] bool."""
    u = noise.uniform(keys, noise.ANCHOR, maskable.shape[1])
    return (u < mask_probability[:, None]) & maskable


def masked_ratio(mask: Tensor, maskable: Tensor) -> Tensor:
    """Compute r = |M| / |maskable|, 0 where no token is maskable. mask [..., L], maskable [..., L] → [...]."""
    return mask.sum(-1) / maskable.sum(-1).clamp_min(1)


def pre_anchor_count(anchor_mask: Tensor, maskable: Tensor, scale: float) -> Tensor:
    """Count |M_pre| = floor(|maskable| · min(1, max(scale·r, r))), in exact arithmetic. → [B] int64.

    |maskable|·scale·r is scale·|M_t|, so the ratio itself, and its rounding, never appears.
    """
    masked, total = anchor_mask.sum(-1), maskable.sum(-1)
    return (masked.double() * scale).floor().long().clamp(min=masked, max=total)


def reveal_counts(start: Tensor, steps: int) -> Tensor:
    """Count the tokens hidden beyond the last state's: each step reveals ceil of what is left over the steps left.

    start [B] int64 → [B, steps] int64; the first column is `start` and the last is 0 (steps = 1: 0).
    """
    counts = []
    for remaining in range(steps - 1, 0, -1):
        counts.append(start)
        start = start - (start + remaining - 1) // remaining
    return torch.stack([*counts, torch.zeros_like(start)], dim=1)


def smallest(values: Tensor, among: Tensor, counts: Tensor) -> Tensor:
    """Mark the `counts` smallest values among the candidates. values, among [B, L], counts [B, K] → [B, K, L] bool.

    For falling counts the sets are nested: one random order of the candidates serves a whole trajectory.
    """
    order = values.masked_fill(~among, torch.inf).argsort(dim=-1, stable=True)
    rank = order.argsort(dim=-1)
    return (rank[:, None, :] < counts[:, :, None]) & among[:, None, :]


#: `inner_masks` and `inner_ratios` of a Trajectory.
States = tuple[Tensor, Tensor]


def _then_clean(masks: Tensor) -> Tensor:
    """Append the clean sequence, nothing masked, as the state after the last one."""
    return torch.cat([masks, torch.zeros_like(masks[:, :1])], dim=1)


def _anchor_consistent(config: MemoryConfig, maskable: Tensor, anchor: Tensor, t: Tensor, keys: Tensor) -> States:
    """x_pre → … → x_t, weighted at each state's own masked ratio (section 3.2). Equal shares are revealed."""
    extra = pre_anchor_count(anchor, maskable, config.pre_anchor_scale) - anchor.sum(-1)
    order = noise.uniform(keys, noise.REVEAL, anchor.shape[1])
    masks = smallest(order, maskable & ~anchor, reveal_counts(extra, config.steps)) | anchor[:, None, :]
    return _then_clean(masks), masked_ratio(masks, maskable[:, None, :])


def _pre_anchor_only(config: MemoryConfig, maskable: Tensor, anchor: Tensor, t: Tensor, keys: Tensor) -> States:
    """x_pre alone, its successor being the anchor (figure 9)."""
    masks, ratios = _anchor_consistent(replace(config, steps=2), maskable, anchor, t, keys)
    return masks[:, :2], ratios[:, :1]


def _anchor_only(config: MemoryConfig, maskable: Tensor, anchor: Tensor, t: Tensor, keys: Tensor) -> States:
    """x_t alone (figure 9). Its loss is weighted at the sampled level t, as the outer loss is."""
    return _then_clean(anchor[:, None, :]), t[:, None]


def _inconsistent(config: MemoryConfig, maskable: Tensor, anchor: Tensor, t: Tensor, keys: Tensor) -> States:
    """A trajectory of its own, blind to the anchor: from `start_ratio` down to `anchor_ratio` (figure 8)."""
    first = config.start_ratio if config.steps > 1 else config.anchor_ratio
    levels = torch.linspace(first, config.anchor_ratio, config.steps, dtype=torch.float64, device=maskable.device)
    start = (noise.uniform(keys, noise.START, maskable.shape[1]) < first) & maskable
    aims = (maskable.sum(-1, keepdim=True) * levels + 1e-9).floor().long()  # 20 · 0.65 is 13, not 12.99…
    aims[:, 0] = start.sum(-1)  # the first state is as drawn; later ones only reveal
    masks = smallest(noise.uniform(keys, noise.REVEAL, maskable.shape[1]), start, aims.cummin(dim=1).values)
    return _then_clean(masks), levels.to(torch.float32).expand(len(maskable), config.steps)


def _cover(config: MemoryConfig, maskable: Tensor, anchor: Tensor, t: Tensor, keys: Tensor) -> States:
    """K disjoint shares of the tokens, each masked in one state (ours): nothing goes unwritten. Blind to the anchor."""
    ends = maskable.sum(-1, keepdim=True) * torch.arange(config.steps + 1, device=maskable.device) // config.steps
    masked = smallest(noise.uniform(keys, noise.COVER, maskable.shape[1]), maskable, ends)
    masks = masked[:, 1:] & ~masked[:, :-1]
    return _then_clean(masks), masked_ratio(masks, maskable[:, None, :])


#: Ways to make the states, of (config, maskable, anchor, t, keys).
STRATEGIES: dict[str, Callable[..., States]] = {
    "anchor_consistent": _anchor_consistent,
    "inconsistent": _inconsistent,
    "pre_anchor_only": _pre_anchor_only,
    "anchor_only": _anchor_only,
    "cover": _cover,
}

#: Strategies whose last inner state is the anchor itself, so that its forward pass serves the outer loss too.
ENDS_ON_ANCHOR = frozenset({"anchor_consistent", "anchor_only"})
