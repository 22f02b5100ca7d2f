"""The five inner objectives (section 3.3 and figure 5): cross-entropy on the clean tokens, and four with a teacher.

Those four are functions of two views of the same positions. A student sees an inner state x_k. Its teacher sees the
next state (the last one's teacher the clean text), with the same fast weights and without gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..backbones.output import widened


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute KL(teacher ‖ student). Logits [B, M, V] → [B, M]."""
    student, teacher = (F.log_softmax(widened(logits), dim=-1) for logits in (student, teacher))
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute KL(student ‖ teacher). Logits [B, M, V] → [B, M]."""
    return kl(teacher, student)


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference of the final hidden states. [B, M, D] → [B, M]."""
    return (widened(student) - widened(teacher)).square().mean(-1)


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1 - cosine of the final hidden states. [B, M, D] → [B, M]."""
    return 1 - F.cosine_similarity(widened(student), widened(teacher), dim=-1)


@dataclass(frozen=True)
class Objective:
    """An inner loss between a student and a teacher, and what of them it compares."""

    loss: Callable[[Tensor, Tensor], Tensor]
    on_logits: bool = True  #: logits, or the hidden states after the final norm


#: Cross-entropy, -log p_student(x0), has no teacher: the model gives it as the NLL of the clean tokens.
OBJECTIVES: dict[str, Objective | None] = {
    "cross_entropy": None,
    "kl": Objective(kl),
    "reverse_kl": Objective(reverse_kl),
    "hidden_mse": Objective(hidden_mse, on_logits=False),
    "hidden_cosine": Objective(hidden_cosine, on_logits=False),
}
