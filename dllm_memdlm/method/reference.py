"""The method in plain lines: one MemDLM step as the paper has it, for a reader, and for the tests to compare with.

Full forwards of the plain model, logits everywhere, one expert after the other, one fast-weight tensor after the other.
It shares no code with what the package computes with. Only the random draws (the masks, and A of φ0) are given to it.
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

#: φ of one sample, or of one batch: for every single linear layer its A and B, or its delta.
Phi = dict[str, dict[str, Tensor]]


class NaiveStep(NamedTuple):
    """What a step gives."""

    loss: Tensor  #: outer loss, with its graph
    phi: list[Phi]  #: after the inner loop, one a sample, or one for the batch
    inner_losses: list[list[float]]  #: of each of them, in order


# === the plain model ===


def backbone_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def linear_names(model: nn.Module, targets: tuple[str, ...], fraction: float) -> list[str]:
    """Every linear layer with fast weights, experts one by one; the first layer is int(n · (1 - fraction))."""
    count = len(backbone_of(model).model.layers)
    first = int(count * (1 - fraction))
    chosen = range(first, count)
    names = []
    for index in chosen:
        for path, _ in backbone_of(model).model.layers[index].named_modules():
            if path.rpartition(".")[2] in targets:
                names.append(f"layers.{index}.{path}")
    return names


@contextmanager
def adapted(model: nn.Module, phi: Phi | None, scaling: float) -> Iterator[None]:
    """Every linear layer named in φ computes y + scaling · B·A·x, or y + delta·x."""

    def adding(tensors: dict[str, Tensor]) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0].to(output.dtype)
            if "delta" in tensors:
                return output + F.linear(x, tensors["delta"].to(x.dtype))
            return output + scaling * F.linear(F.linear(x, tensors["A"].to(x.dtype)), tensors["B"].to(x.dtype))

        return hook

    with ExitStack() as stack:
        for name, tensors in (phi or {}).items():
            linear = backbone_of(model).model.get_submodule(name)
            stack.callback(linear.register_forward_hook(adding(tensors)).remove)
        yield


def full_forward(model: nn.Module, tokens: Tensor, attention_mask: Tensor | None, shift: bool) -> tuple[Tensor, Tensor]:
    """Logits [B, L, V] and the hidden states they are made from [B, L, D], moved by one where logits are shifted."""
    seen = []
    handle = backbone_of(model).model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = model(input_ids=tokens, attention_mask=attention_mask).logits
    handle.remove()
    views = (logits, seen[0])
    return tuple(torch.cat([v[:, :1], v[:, :-1]], dim=1) for v in views) if shift else views


# === the method ===


def weight_of(level: float) -> float:
    """w(r) = -α'(r) / (1 - α(r)) of the linear schedule in float32; dllm adds 1e-6 to the denominator."""
    return (1.0 / (1 - (1 - torch.tensor(level)) + 1e-6)).item()


def state_counts(strategy: str, anchor: int, maskable: int, scale: float, steps: int) -> list[int]:
    """Masked tokens of each inner state of one sample, for the strategies in which the paper fixes them."""
    if strategy == "anchor_only":
        return [anchor]
    r = Fraction(anchor, max(maskable, 1))
    start = math.floor(maskable * min(Fraction(1), max(Fraction(scale) * r, r)))
    if strategy == "pre_anchor_only":
        return [start]
    if steps == 1:
        return [anchor]
    counts, left = [start], start - anchor
    for remaining in range(steps - 1, 0, -1):
        left -= math.ceil(left / remaining)
        counts.append(anchor + left)
    return counts


def state_level(memory: Any, k: int, mask: Tensor, maskable: Tensor, t: float) -> float:
    """The level that weights state k of one sample."""
    if memory.strategy == "anchor_only":
        return t
    if memory.strategy == "inconsistent":
        first = memory.start_ratio if memory.steps > 1 else memory.anchor_ratio
        return first + (memory.anchor_ratio - first) * k / max(memory.steps - 1, 1)
    return mask.sum().item() / max(maskable.sum().item(), 1)


def objective_at(name: str, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor] | None, tokens: Tensor):
    """The inner loss at every position [B, L]; student and teacher are (logits, hidden)."""
    logits, hidden = student
    if name == "cross_entropy":
        return F.cross_entropy(logits.transpose(1, 2).to(wide(logits)), tokens, reduction="none")
    if name in ("kl", "reverse_kl"):
        p, q = (view.to(wide(view)).softmax(-1) for view in (teacher[0], logits))
        p, q = (p, q) if name == "kl" else (q, p)
        return (p * (p.log() - q.log())).sum(-1)
    a, b = hidden.to(wide(hidden)), teacher[1].to(wide(hidden))
    if name == "hidden_mse":
        return ((a - b) ** 2).mean(-1)
    return 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def inner_sgd(phi: Phi, gradients: dict[tuple[str, str], Tensor], memory: Any) -> Phi:
    """Clip, then φ ← φ - lr · g, a tensor at a time."""
    limit = memory.grad_clip
    total = math.sqrt(sum(g.double().norm().item() ** 2 for g in gradients.values()))
    moved: Phi = {}
    for (site, name), gradient in gradients.items():
        if memory.clip != "none" and limit > 0:
            norm = gradient.double().norm().item() if memory.clip == "local" else total
            if norm > limit:
                gradient = gradient * (limit / norm)
        moved.setdefault(site, {})[name] = phi[site][name] - memory.inner_lr * gradient
    return moved


def write_naively(model: nn.Module, batch: dict[str, Any], phi: Phi, memory: Any, mask_id: int, shift: bool):
    """The inner loop for rows that share one φ → φ_K and the inner losses."""
    tokens, maskable = batch["input_ids"], batch["maskable"]
    attention_mask = batch.get("attention_mask")
    masks = batch["inner_masks"]
    scaling = memory.alpha / memory.rank
    losses = []
    for _ in range(memory.epochs):
        for k in range(masks.shape[1] - 1):
            mask, following = masks[:, k], masks[:, k + 1]
            supervised = mask & ~following if memory.targets == "newly_revealed" else mask
            levels = [
                state_level(memory, k, mask[i], maskable[i], batch["noise_level"][i].item()) for i in range(len(tokens))
            ]
            weights = torch.tensor([weight_of(r) if memory.weighting == "scheduler" else 1.0 for r in levels])
            teacher = None
            if memory.objective != "cross_entropy":
                with torch.no_grad(), adapted(model, phi, scaling):
                    teacher = full_forward(model, torch.where(following, mask_id, tokens), attention_mask, shift)
            leaves = {site: {n: v.clone().requires_grad_() for n, v in ts.items()} for site, ts in phi.items()}
            with torch.enable_grad(), adapted(model, leaves, scaling):
                student = full_forward(model, torch.where(mask, mask_id, tokens), attention_mask, shift)
                at = objective_at(memory.objective, student, teacher, tokens)
                # only the supervised positions count, whatever stands at the others
                loss = (at * weights[:, None]).masked_fill(~supervised, 0.0).sum() / max(int(supervised.sum()), 1)
                names = [(site, name) for site, tensors in leaves.items() for name in tensors]
                flat = [leaves[site][name] for site, name in names]
                gradients = torch.autograd.grad(loss, flat, allow_unused=True)
            gradients = [torch.zeros_like(v) if g is None else g for v, g in zip(flat, gradients, strict=True)]
            phi = inner_sgd(phi, dict(zip(names, gradients, strict=True)), memory)
            losses.append(loss.item())
    return phi, losses


def naive_step(
    model: nn.Module,
    batch: dict[str, Any],
    phi0: list[Phi],
    memory: Any,
    mask_id: int,
    shift: bool = False,
    norm: str = "token",
) -> NaiveStep:
    """One step: φ for every sample (or for the batch), then the loss of the anchor with φ in place.

    The model has a module an expert.
    """
    tokens, maskable, anchor = batch["input_ids"], batch["maskable"], batch["anchor_mask"]
    groups = [slice(0, len(tokens))] if memory.scope == "batch" else [slice(i, i + 1) for i in range(len(tokens))]
    phis, inner_losses, logits = [], [], []
    names = linear_names(model, memory.target_modules, memory.layer_fraction)
    for rows, phi in zip(groups, phi0, strict=True):
        assert set(phi) == set(names)
        part = {key: value[rows] for key, value in batch.items() if isinstance(value, Tensor)}
        phi, losses = write_naively(model, part, phi, memory, mask_id, shift)
        with adapted(model, phi, memory.alpha / memory.rank):
            state = torch.where(part["anchor_mask"], mask_id, part["input_ids"])
            logits.append(full_forward(model, state, part.get("attention_mask"), shift)[0])
        phis.append(phi)
        inner_losses.append(losses)
    loss = mdlm_loss(torch.cat(logits), tokens, anchor, maskable, batch["noise_level"], norm)
    return NaiveStep(loss, phis, inner_losses)


def mdlm_loss(logits: Tensor, tokens: Tensor, anchor: Tensor, maskable: Tensor, t: Tensor, norm: str = "token"):
    """Plain MDLM on full logits [B, L, V]: Σ over M_t of w(t) · NLL, over the maskable tokens."""
    nll = F.cross_entropy(logits.to(wide(logits)).transpose(1, 2), tokens, reduction="none")
    nll = nll * torch.tensor([weight_of(level) for level in t.tolist()])[:, None] * anchor
    if norm == "token":
        return nll.sum() / maskable.sum().clamp_min(1)
    if norm == "sequence":
        return (nll.sum(-1) / maskable.sum(-1).clamp_min(1)).mean()
    return nll.sum() / len(tokens)


def one_by_one(tensors: dict[str, Tensor], sample: int) -> Phi:
    """φ of one sample out of the package's stacked tensors ([(E,) S, rows, columns] under `{site}.{name}`)."""
    phi: Phi = {}
    for key, value in tensors.items():
        site, _, name = key.rpartition(".")
        if value.dim() == 3:
            phi.setdefault(site, {})[name] = value[sample]
        else:
            layer, _, projection = site.rpartition(".")
            for expert in range(len(value)):
                phi.setdefault(f"{layer}.{expert}.{projection}", {})[name] = value[expert, sample]
    return phi
