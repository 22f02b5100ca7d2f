"""One MemDLM step up to its loss (section 3.1), or plain MDLM's: what a trainer runs, and what `--dry-run` counts.

anchor x_t ─► prefix ─┬─ with gradient ─► suffix with φ_K in place ─► Σ w(t) · NLL, the outer loss
                      └─ detached ─► inner loop over the trajectory ─► φ_K
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..backbones import staged_backbone
from .fast_weights import FastWeights
from .inner_loop import ParametricMemory, Written
from .losses import masked_diffusion_loss
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
    attention_mask: Tensor | None = None
    loss_weight: str = "scheduler"  #: w(t) of the schedule, or `uniform`
    loss_norm: str = "token"  #: a key of `losses.NORMS`
    right_shift_logits: bool = False
    prefix: Tensor = field(init=False)  #: the prefix's output on the anchor [B, L, D], with gradient

    def __post_init__(self) -> None:
        # Without memory the suffix is the last layer, which then computes its output at the loss positions only.
        last = len(staged_backbone(self.model).layers) - 1
        self._where = {
            "boundary": last if self.memory is None else self.memory.boundary,
            "attention_mask": self.attention_mask,
        }
        anchor = self.trajectory.state(self.trajectory.anchor_mask, self.mask_token_id)
        self.prefix = self.model(stage="prefix", input_ids=anchor, **self._where).hidden

    def write(self) -> Written:
        """Run the inner loop, from the prefix's output on."""
        return self.memory.write(self.trajectory, anchor_prefix=self.prefix, attention_mask=self.attention_mask)

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
        with nullcontext() if fast is None else self.memory.holding(fast):
            nll = model(
                stage="suffix",
                hidden=self.prefix,
                positions=positions.logit_index(self.right_shift_logits),
                tokens=positions.gather(trajectory.input_ids),
                **self._where,
            ).nll
        weight, maskable = trajectory.noise_weight, trajectory.maskable.sum(-1)
        if self.loss_weight == "uniform":
            weight = torch.ones_like(weight)
        return masked_diffusion_loss(nll, positions.valid, weight, maskable, self.loss_norm, count)
