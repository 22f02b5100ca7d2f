"""One MemDLM step up to its loss (section 3.1), or plain MDLM's: what a trainer runs, and what `--dry-run` counts.

anchor x_t ─► trunk ─┬─ with gradient ─► head with φ_K in place ─► Σ w(t) · NLL, the outer loss
                     └─ detached ─► inner loop over the trajectory ─► φ_K
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..backbones import staged_backbone
from .fast_weights import FastWeights
from .inner_loop import ParametricMemory, Written
from .losses import Positions, masked_diffusion_loss
from .trajectory import Trajectory


@dataclass
class BilevelStep:
    """The step of one batch. The anchor passes the trunk once, when the step is made; the inner loop starts from it.

    The stages are called on `model`, without what an engine has put around it: only the last, `loss`, goes through
    that, so that DDP and its kin see one forward for one backward.
    """

    model: nn.Module
    memory: ParametricMemory | None  #: none for plain MDLM
    trajectory: Trajectory
    mask_token_id: int
    attention_mask: Tensor | None = None
    loss_weight: str = "scheduler"  #: w(t) of the schedule, or `uniform`
    loss_norm: str = "token"  #: a key of `losses.NORMS`
    right_shift_logits: bool = False
    positions: Positions = field(init=False)  #: where the anchor has its loss
    trunk: Tensor = field(init=False)  #: what the trunk gives of the anchor [B, L, D], with gradient

    def __post_init__(self) -> None:
        # Without memory the head is the last layer, which then computes its output at the loss positions only.
        layers = len(staged_backbone(self.model).layers)
        self._boundary = layers - 1 if self.memory is None else self.memory.boundary
        self.positions = self.trajectory.loss_positions(-1)
        self.trunk = self.model(
            stage="trunk",
            input_ids=self.trajectory.state(self.trajectory.anchor_mask, self.mask_token_id),
            attention_mask=self.attention_mask,
            boundary=self._boundary,
        ).hidden

    def write(self) -> Written:
        """The inner loop."""
        return self.memory.write(self.trajectory, anchor_trunk=self.trunk, attention_mask=self.attention_mask)

    def loss(
        self, model: nn.Module, fast: FastWeights | None = None, count: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The outer loss, and each sample's weighted NLL [B], with φ in place; without φ that of plain MDLM.

        Args:
            model: as the engine has it.
            fast: φ.
            count: as in `masked_diffusion_loss`.
        """
        if fast is not None:
            with self.memory.holding(fast):
                return self.loss(model, count=count)
        nll = model(
            stage="head",
            hidden=self.trunk,
            boundary=self._boundary,
            attention_mask=self.attention_mask,
            positions=self.positions.logit_index(self.right_shift_logits),
            tokens=self.positions.gather(self.trajectory.input_ids),
        ).nll
        weight = self.trajectory.noise_weight
        return masked_diffusion_loss(
            nll,
            self.positions.valid,
            weight if self.loss_weight == "scheduler" else torch.ones_like(weight),
            self.trajectory.maskable.sum(-1),
            self.loss_norm,
            count,
        )
