"""One MemDLM step up to its loss (section 3.1), or plain MDLM's: what a trainer runs, and what `--dry-run` counts.

    anchor x_t ─► prefix ─┬─ with gradient ─► suffix with φ_K in place ─► Σ w(t) · NLL, the outer loss
                          └─ detached ─► inner loop over the trajectory ─► φ_K

With `memory.source: prompt` the inner loop runs over the windows of the prompt instead, as it does in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..backbones import staged_backbone
from .fast_weights import FastWeights
from .inner_loop import ParametricMemory, Written
from .losses import NORMS, cart_share, cart_weights, masked_diffusion_loss
from .trajectory import Trajectory


@dataclass
class BilevelStep:
    """The step of one batch, in three stages: its making passes the anchor through the prefix, `write`, `loss`.

    The first two call `model` without what an engine has put around it. Only `loss` goes through that, so that DDP and
    its kin see one forward for one backward.
    """

    model: nn.Module
    memory: ParametricMemory | None  #: none for plain MDLM
    trajectory: Trajectory
    mask_token_id: int
    windows: Sequence[Trajectory] = ()  #: of the prompts, which `memory.source: prompt` writes on
    prompt: Trajectory | None = None  #: one window of each prompt, whose anchor `prompt_nll` is of
    prompt_loss: float = 0.0  #: `memory.prompt_loss`
    loss_weight: str = "scheduler"  #: as `losses.LOSS_WEIGHT` says
    loss_norm: str = "token"  #: a key of `losses.NORMS`
    right_shift_logits: bool = False
    prefix: Tensor = field(init=False)  #: the prefix's output on the anchor [B, L, D], with gradient

    def __post_init__(self) -> None:
        # Without memory the suffix is the last layer, which then computes its output at the loss positions only.
        last = len(staged_backbone(self.model).layers) - 1
        self._where = {
            "boundary": last if self.memory is None else self.memory.boundary,
            "attention_mask": self.trajectory.attention_mask,
        }
        anchor = self.trajectory.state(self.trajectory.anchor_mask, self.mask_token_id)
        self.prefix = self.model(stage="prefix", input_ids=anchor, **self._where).hidden

    def write(self) -> Written:
        """Run the inner loop, from the prefix's output on, or on the windows of the prompts."""
        assert self.memory is not None  # plain MDLM writes nothing
        if self.memory.config.source == "prompt":
            return self.memory.write_all(self.windows)
        return self.memory.write(self.trajectory, anchor_prefix=self.prefix)

    def prompt_nll(self) -> tuple[Tensor, Tensor]:
        """Return the NLL of the masked tokens of each prompt [B], summed, and their number [B]; without φ (ours).

        It keeps a model able to denoise prompts, which it must be to write on them.
        """
        assert self.prompt is not None
        trajectory, positions = self.prompt, self.prompt.loss_positions(-1)
        where = {**self._where, "attention_mask": trajectory.attention_mask}
        state = trajectory.state(trajectory.anchor_mask, self.mask_token_id)
        nll = self.model(  # in two stages, of which the first can be checkpointed
            stage="suffix",
            hidden=self.model(stage="prefix", input_ids=state, **where).hidden,
            positions=positions.logit_index(self.right_shift_logits),
            tokens=positions.gather(trajectory.input_ids),
            **where,
        ).nll
        return (nll * positions.valid).sum(-1), positions.valid.sum(-1)

    def loss(
        self, model: nn.Module, fast: FastWeights | None = None, count: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the outer loss and each sample's weighted NLL [B], with φ in place; without φ those of plain MDLM.

        Args:
            model: the model as the engine has it.
            fast: φ.
            count: as in `masked_diffusion_loss`.
        """
        trajectory, positions = self.trajectory, self.trajectory.loss_positions(-1)
        with nullcontext() if self.memory is None else self.memory.holding(fast):
            nll = model(
                stage="suffix",
                hidden=self.prefix,
                positions=positions.logit_index(self.right_shift_logits),
                tokens=positions.gather(trajectory.input_ids),
                **self._where,
            ).nll
        weight, maskable = trajectory.noise_weight, trajectory.maskable.sum(-1)
        if self.loss_weight != "scheduler":
            weight = torch.ones_like(weight)
        if (share := cart_share(self.loss_weight)) is not None:
            seen = trajectory.attention_mask  # hidden padding is no neighbour, or an evaluation would depend on it
            visible = ~trajectory.anchor_mask & (seen.bool() if isinstance(seen, Tensor) and seen.dim() == 2 else True)
            nll = nll * positions.gather(cart_weights(visible, share))
        return masked_diffusion_loss(nll, positions.valid, weight, maskable, self.loss_norm, count)

    def prompt_term(self, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return what prompts add to the outer loss, and the mean NLL of their masked tokens; `count` as in `loss`.

        The mean NLL of a prompt weighs as much as that of its response.
        """
        nll, masked = self.prompt_nll()
        maskable = self.trajectory.maskable.sum(-1)
        divided_by = maskable if self.loss_norm != "token" or count is None else count
        term = NORMS[self.loss_norm](nll / masked.clamp_min(1) * maskable, divided_by)
        return self.prompt_loss * term, nll.detach().sum() / masked.sum().clamp_min(1)
