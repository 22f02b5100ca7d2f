"""The method in plain lines: one MemDLM step as the paper has it, for a reader, and for the tests to compare with.

Read it from the top: the step, its trajectory, its inner loop, the losses, the plain model. Forwards are full, logits
are everywhere, and samples, experts and fast-weight tensors take turns. It shares no code with what the package
computes with. Random draws (the masks, and A of φ0) are given to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: φ of one sample, or of one batch: `{layer}.A` and `{layer}.B`, or `{layer}.delta`, for every single linear layer.
Phi = dict[str, Tensor]


class NaiveStep(NamedTuple):
    """The result of a step."""

    loss: Tensor  #: outer loss, with its graph
    phi: list[Phi]  #: after the inner loop, one a sample, or one for the batch
    inner_losses: list[list[float]]  #: of each of them, in order


# === one training step (section 3.1) ===


def naive_step(
    model: nn.Module,
    batch: dict[str, Any],
    phi0: list[Phi],
    memory: Any,
    mask_id: int,
    shift: bool = False,
    norm: str = "token",
) -> NaiveStep:
    """Take a step up to its loss: φ for every sample (or for the batch), then the loss of the anchor with φ in place.

    `batch` has the fields of a `Trajectory`, `phi0` one φ for each sample or one for the batch. The model has a module
    for each expert.
    """
    tokens, anchor, count = batch["input_ids"], batch["anchor_mask"], len(batch["input_ids"])
    groups = [slice(0, count)] if memory.scope == "batch" else [slice(i, i + 1) for i in range(count)]
    phis, inner_losses, logits = [], [], []
    for rows, phi in zip(groups, phi0, strict=True):
        part = {key: value[rows] for key, value in batch.items() if isinstance(value, Tensor)}
        phi, losses = write_naively(model, part, phi, memory, mask_id, shift)
        with adapted(model, phi, memory.alpha / memory.rank):
            state = torch.where(part["anchor_mask"], mask_id, part["input_ids"])
            logits.append(full_forward(model, state, part.get("attention_mask"), shift)[0])
        phis.append(phi)
        inner_losses.append(losses)
    loss = mdlm_loss(torch.cat(logits), tokens, anchor, batch["maskable"], batch["noise_level"], norm)
    return NaiveStep(loss, phis, inner_losses)


# === the trajectory (section 3.2) ===


def naive_states(maskable: set[int], anchor: set[int], order: list[float], scale: float, steps: int) -> list[set[int]]:
    """Return the masked positions of x_pre → … → x_t in one sample, as sets. A step finds them in its batch as masks.

    Of the tokens beyond the anchor those of the smallest `order` are hidden longest.
    """
    r = Fraction(len(anchor), max(len(maskable), 1))
    extra = math.floor(len(maskable) * min(Fraction(1), max(Fraction(scale) * r, r))) - len(anchor)
    others = sorted(maskable - anchor, key=lambda i: (order[i], i))
    states = []
    for left in range(steps - 1, 0, -1):
        states.append(anchor | set(others[:extra]))
        extra -= math.ceil(extra / left)
    return [*states, anchor]


# === the inner loop (section 3.3) ===


def write_naively(
    model: nn.Module, batch: dict[str, Any], phi: Phi, memory: Any, mask_id: int, shift: bool
) -> tuple[Phi, list[float]]:
    """Write the φ that the rows of a batch share. Returns φ_K and the inner losses."""
    assert {name.rpartition(".")[0] for name in phi} == linear_names(model, memory)
    tokens, maskable, masks = batch["input_ids"], batch["maskable"], batch["inner_masks"]

    def view(mask: Tensor, phi: Phi) -> tuple[Tensor, Tensor]:
        with adapted(model, phi, memory.alpha / memory.rank):
            return full_forward(model, torch.where(mask, mask_id, tokens), batch.get("attention_mask"), shift)

    losses = []
    for _ in range(memory.epochs):
        for k in range(masks.shape[1] - 1):
            mask, following = masks[:, k], masks[:, k + 1]
            supervised = mask & ~following if memory.targets == "newly_revealed" else mask
            weights = [
                weight_of(state_level(memory, k, *rows)) if memory.weighting == "scheduler" else 1.0
                for rows in zip(mask, maskable, batch["noise_level"].tolist(), strict=True)
            ]
            with torch.no_grad():
                teacher = None if memory.objective == "cross_entropy" else view(following, phi)
            leaves = {name: value.clone().requires_grad_() for name, value in phi.items()}
            with torch.enable_grad():
                at = inner_loss(memory.objective, view(mask, leaves), teacher, tokens) * torch.tensor(weights)[:, None]
                # Only the supervised positions count, whatever stands at the others.
                loss = at.masked_fill(~supervised, 0.0).sum() / max(int(supervised.sum()), 1)
                gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            phi = naive_sgd(phi, dict(zip(leaves, gradients, strict=True)), memory)
            losses.append(loss.item())
    return phi, losses


def state_level(memory: Any, k: int, mask: Tensor, maskable: Tensor, t: float) -> float:
    """Return the level that weights state k of one sample: r = |M_k| / |maskable|, except in two ablations."""
    if memory.strategy == "anchor_only":
        return t
    if memory.strategy == "inconsistent":
        first = memory.start_ratio if memory.steps > 1 else memory.anchor_ratio
        return float(first + (memory.anchor_ratio - first) * k / max(memory.steps - 1, 1))
    return mask.sum().item() / max(maskable.sum().item(), 1)


def naive_sgd(phi: Phi, gradients: Phi, memory: Any) -> Phi:
    """Clip, then φ ← φ - lr · g, a tensor at a time."""
    total, moved = math.hypot(*(g.double().norm().item() for g in gradients.values())), {}
    for name, gradient in gradients.items():
        norm = gradient.double().norm().item() if memory.clip == "local" else total
        if memory.clip != "none" and norm > memory.grad_clip > 0:
            gradient = gradient * (memory.grad_clip / norm)
        moved[name] = phi[name] - memory.inner_lr * gradient
    return moved


# === the losses ===


def inner_loss(name: str, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor] | None, x0: Tensor) -> Tensor:
    """Return the inner loss at every position [B, L]. Student and teacher are (logits, hidden states)."""
    logits, hidden = (wide(view) for view in student)
    if name == "cross_entropy":
        return F.cross_entropy(logits.transpose(1, 2), x0, reduction="none")
    assert teacher is not None  # which all other objectives have
    p, q, towards = wide(teacher[0]).softmax(-1), logits.softmax(-1), wide(teacher[1])
    if name == "kl":
        return (p * (p.log() - q.log())).sum(-1)
    if name == "reverse_kl":
        return (q * (q.log() - p.log())).sum(-1)
    if name == "hidden_mse":
        return ((hidden - towards) ** 2).mean(-1)
    cosine: Tensor = (hidden * towards).sum(-1) / (hidden.norm(dim=-1) * towards.norm(dim=-1))
    return 1 - cosine


def mdlm_loss(
    logits: Tensor, tokens: Tensor, anchor: Tensor, maskable: Tensor, t: Tensor, norm: str = "token"
) -> Tensor:
    """Compute plain MDLM's loss on full logits [B, L, V]: Σ over M_t of w(t) · NLL, over the maskable tokens."""
    nll = F.cross_entropy(wide(logits).transpose(1, 2), tokens, reduction="none")
    nll = nll * torch.tensor([weight_of(level) for level in t.tolist()])[:, None] * anchor
    if norm == "token":
        return nll.sum() / maskable.sum().clamp_min(1)
    if norm == "sequence":
        return (nll.sum(-1) / maskable.sum(-1).clamp_min(1)).mean()
    return nll.sum() / len(tokens)


def weight_of(level: float) -> float:
    """Compute w(r) = -α'(r) / (1 - α(r)) of the linear schedule in float32. dllm adds 1e-6 to the denominator."""
    return (1.0 / (1 - (1 - torch.tensor(level)) + 1e-6)).item()


def wide(x: Tensor) -> Tensor:
    """Widen to float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# === the plain model, and φ in it ===


def full_forward(model: nn.Module, tokens: Tensor, attention_mask: Tensor | None, shift: bool) -> tuple[Tensor, Tensor]:
    """Return logits [B, L, V] and the hidden states under them [B, L, D], moved by one where logits are shifted."""
    seen: list[Tensor] = []
    handle = backbone_of(model).final_norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = model(input_ids=tokens, attention_mask=attention_mask).logits
    handle.remove()
    hidden = seen[0]
    if shift:
        logits, hidden = (torch.cat([view[:, :1], view[:, :-1]], dim=1) for view in (logits, hidden))
    return logits, hidden


@contextmanager
def adapted(model: nn.Module, phi: Phi, scaling: float) -> Iterator[None]:
    """Let every linear layer named in φ compute y + scaling · B·A·x, or y + delta·x."""

    def adding(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0].to(output.dtype)
            if f"{name}.delta" in phi:
                return output + F.linear(x, phi[f"{name}.delta"].to(x.dtype))
            return output + scaling * F.linear(F.linear(x, phi[f"{name}.A"].to(x.dtype)), phi[f"{name}.B"].to(x.dtype))

        return hook

    with ExitStack() as stack:
        for name in {key.rpartition(".")[0] for key in phi}:
            linear = backbone_of(model).model.get_submodule(name)
            stack.callback(linear.register_forward_hook(adding(name)).remove)
        yield


def linear_names(model: nn.Module, memory: Any) -> set[str]:
    """Name every linear layer with fast weights, experts one by one; the first layer is int(n · (1 - fraction))."""
    backbone, layers = backbone_of(model), backbone_of(model).layers
    chosen = range(int(len(layers) * (1 - memory.layer_fraction)), len(layers))
    where, targets = backbone.layers_path, {backbone.own_names.get(name, name) for name in memory.target_modules}
    paths = (f"{where}.{index}.{path}" for index in chosen for path, _ in layers[index].named_modules())
    return {path for path in paths if path.endswith(tuple(f".{target}" for target in targets))}


def backbone_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def one_by_one(tensors: dict[str, Tensor], sample: int) -> Phi:
    """Take φ of one sample out of the package's stacked tensors ([(E,) S, rows, columns] under `{site}.{name}`)."""
    phi: Phi = {}
    for key, value in tensors.items():
        if value.dim() == 3:
            phi[key] = value[sample]
        else:
            experts, projection, name = key.rsplit(".", 2)
            phi |= {f"{experts}.{e}.{projection}.{name}": value[e, sample] for e in range(len(value))}
    return phi
