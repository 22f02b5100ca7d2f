"""The inner SGD against one that goes tensor by tensor."""

from __future__ import annotations

import math

import pytest
import torch
from small_fast_weights import DENSE, EXPERTS, config_of, randn, written
from torch import Tensor

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method.fast_weights import FastWeights, sgd_step

CLIPS = ("local", "global", "none")


def gradients_of(fast: FastWeights) -> dict[str, Tensor]:
    """Matrices of norms on both sides of 1."""
    found = {}
    for i, (name, value) in enumerate(fast.tensors.items()):
        norm = 1.5 * randn(*value.shape[:-2], 1, 1, seed=50 + i).abs()
        found[name] = norm * randn(*value.shape, seed=100 + i) / (value.shape[-2] * value.shape[-1]) ** 0.5
    return found


def naive_sgd(
    fast: FastWeights, gradients: dict[str, Tensor], config: MemoryConfig
) -> tuple[dict[str, Tensor], list[float]]:
    """One tensor of one sample (and one expert) at a time."""
    result, totals = {name: value.double().clone() for name, value in fast.tensors.items()}, []
    for s in range(fast.samples):
        places = []
        for name, value in fast.tensors.items():
            places += [(name, (s,))] if value.dim() == 3 else [(name, (e, s)) for e in range(value.shape[0])]
        norms = {(name, place): gradients[name][place].double().norm().item() for name, place in places}
        totals.append(math.hypot(*norms.values()))
        for name, place in places:
            norm = norms[name, place] if config.clip == "local" else totals[-1]
            clipped = config.clip != "none" and norm > config.grad_clip > 0
            factor = config.grad_clip / norm if clipped else 1.0
            result[name][place] -= config.inner_lr * factor * gradients[name][place].double()
    return result, totals


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(
    "settings",
    [
        {"clip": "local"},
        {"clip": "local", "grad_clip": 0.5, "inner_lr": 3.0},
        {"clip": "global"},
        {"clip": "global", "grad_clip": 2.0},
        {"clip": "none"},
        {"clip": "local", "grad_clip": 0},
        {"clip": "global", "grad_clip": 0},
        {"inner_lr": 0},
    ],
    ids=str,
)
def test_sgd_tensor_by_tensor(settings, kind):
    config = config_of(kind=kind, **settings)
    fast = written(config).leaves()
    gradients, before = gradients_of(fast), {name: v.detach().clone() for name, v in fast.tensors.items()}
    moved, step = sgd_step(fast, gradients, torch.arange(5.0, requires_grad=True) * 1, config)
    expected, totals = naive_sgd(fast, gradients, config)
    assert moved.scaling == fast.scaling and list(moved.tensors) == list(fast.tensors)
    for name, value in moved.tensors.items():
        assert value.dtype == torch.float32 and not value.requires_grad
        torch.testing.assert_close(value.double(), expected[name].detach(), atol=1e-6, rtol=1e-6)
        assert torch.equal(fast.tensors[name], before[name])
    assert step.grad_norm.tolist() == pytest.approx(totals, rel=1e-5)
    assert step.loss.tolist() == [0, 1, 2, 3, 4] and step.finite.all() and not step.loss.requires_grad


def test_the_cases_above_discriminate():
    """Some matrices are clipped and some are not, and every way of clipping ends elsewhere."""
    fast = written()
    gradients = gradients_of(fast)
    norms = torch.cat([g.norm(dim=(-2, -1)).flatten() for g in gradients.values()])
    assert (norms > 1.05).sum() > 5 and (norms < 0.95).sum() > 5
    moved = [sgd_step(fast, gradients, torch.zeros(5), config_of(clip=clip))[0] for clip in CLIPS]
    ends = [torch.cat([v.flatten() for v in each.tensors.values()]) for each in moved]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(ends) for b in ends[i + 1 :])


@pytest.mark.parametrize("clip", CLIPS)
def test_zero_gradients_move_nothing(clip):
    fast = written()
    zeros = {k: torch.zeros_like(v) for k, v in fast.tensors.items()}
    moved, step = sgd_step(fast, zeros, torch.zeros(5), config_of(clip=clip))
    assert all(torch.equal(moved.tensors[k], v) for k, v in fast.tensors.items())
    assert not step.grad_norm.any() and step.finite.all()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "dense", "expert"])
def test_a_sample_that_is_not_finite_stays_where_it_is(clip, bad, where):
    fast, config = written(), config_of(clip=clip)
    gradients, loss = gradients_of(fast), torch.zeros(5)
    expected, _ = sgd_step(fast, gradients, loss, config)
    if where == "loss":
        loss[2] = bad
    elif where == "dense":
        gradients[f"{DENSE.name}.B"][2, 3, 1] = bad
    else:
        gradients[f"{EXPERTS.name}.A"][4, 2, 0, 0] = bad
    moved, step = sgd_step(fast, gradients, loss, config)
    assert step.finite.tolist() == [True, True, False, True, True]
    for s in range(5):
        ours, theirs = moved.select([s]), (fast if s == 2 else expected).select([s])
        assert all(torch.equal(value, theirs.tensors[name]) for name, value in ours.tensors.items())
