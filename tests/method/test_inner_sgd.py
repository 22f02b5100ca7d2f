"""The inner SGD against the reference's, which goes tensor by tensor."""

from __future__ import annotations

import math

import pytest
import torch
from small_fast_weights import DENSE, EXPERTS, config_of, randn, written
from steps import flat
from torch import Tensor

from dllm_memdlm.method.fast_weights import FastWeights, sgd_step
from dllm_memdlm.method.reference import naive_sgd

CLIPS = ("local", "global", "none")


def gradients_of(fast: FastWeights) -> dict[str, Tensor]:
    """Matrices of norms on both sides of 1."""
    found = {}
    for i, (name, value) in enumerate(fast.tensors.items()):
        norm = 1.5 * randn(*value.shape[:-2], 1, 1, seed=50 + i).abs()
        found[name] = norm * randn(*value.shape, seed=100 + i) / (value.shape[-2] * value.shape[-1]) ** 0.5
    return found


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
    gradients, before = gradients_of(fast), flat(written(config))
    moved, step = sgd_step(fast, gradients, torch.arange(5.0, requires_grad=True) * 1, config)
    assert moved.scaling == fast.scaling and list(moved.tensors) == list(fast.tensors)
    assert not any(value.requires_grad for value in moved.tensors.values()) and not step.loss.requires_grad
    of_samples = flat(FastWeights(gradients, 1.0))
    for ours, phi, unchanged, g in zip(flat(moved), flat(fast), before, of_samples, strict=True):
        for name, expected in naive_sgd(unchanged, g, config).items():
            torch.testing.assert_close(ours[name], expected, atol=1e-6, rtol=1e-6)
            assert torch.equal(phi[name], unchanged[name])
    totals = [math.hypot(*(v.norm().item() for v in g.values())) for g in of_samples]
    assert step.grad_norm.tolist() == pytest.approx(totals, rel=1e-5)
    assert step.loss.tolist() == [0, 1, 2, 3, 4] and step.finite.all()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "dense", "expert"])
def test_a_sample_that_is_not_finite_stays_where_it_is(clip, bad, where):
    fast, config = written(), config_of(clip=clip)
    gradients, loss = gradients_of(fast), torch.zeros(5)
    if not bad:  # nor does one without a gradient move, and its norm of zero divides nothing
        gradients = {name: g.index_fill(-3, torch.tensor([2]), 0.0) for name, g in gradients.items()}
    expected, _ = sgd_step(fast, gradients, loss, config)
    if where == "loss":
        loss[2] = bad
    elif where == "dense":
        gradients[f"{DENSE.name}.B"][2, 3, 1] = bad
    else:
        gradients[f"{EXPERTS.name}.A"][4, 2, 0, 0] = bad
    moved, step = sgd_step(fast, gradients, loss, config)
    assert step.finite.tolist() == [True, True, not bad, True, True]
    for s in range(5):
        ours, theirs = moved.select([s]), (fast if s == 2 else expected).select([s])
        assert all(torch.equal(value, theirs.tensors[name]) for name, value in ours.tensors.items())
