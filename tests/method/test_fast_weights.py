"""Fast weights: their shapes and beginnings, and what they add to a layer."""

from __future__ import annotations

import math

import pytest
import torch
from small_fast_weights import DENSE, EXPERTS, KEYS, config_of, initial, randn, written

from dllm_memdlm.method import noise
from dllm_memdlm.method.fast_weights import FastWeights

LORA, FULL = config_of(), config_of(kind="full")


def test_shapes_and_scaling():
    up, down = DENSE.name, EXPERTS.name
    assert {k: tuple(v.shape) for k, v in initial(LORA).tensors.items()} == {
        f"{up}.A": (5, 4, 24),
        f"{up}.B": (5, 16, 4),
        f"{down}.A": (5, 5, 4, 16),
        f"{down}.B": (5, 5, 24, 4),
    }
    full = initial(FULL, KEYS[:2])
    assert {k: tuple(v.shape) for k, v in full.tensors.items()} == {
        f"{up}.delta": (2, 16, 24),
        f"{down}.delta": (5, 2, 24, 16),
    }
    assert (DENSE.numel(LORA), EXPERTS.numel(LORA), DENSE.numel(FULL)) == (4 * 40, 5 * 4 * 40, 24 * 16)
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in initial(LORA).tensors.values())
    assert (initial(LORA).samples, initial(LORA).scaling) == (5, 2.0) and (full.samples, full.scaling) == (2, 1.0)


@pytest.mark.parametrize("config", [LORA, FULL], ids=["lora", "full"])
def test_fast_weights_begin_without_effect(config):
    fast = initial(config)
    assert all(value.any() == name.endswith(".A") for name, value in fast.tensors.items())
    assert not fast.site(DENSE.name).dense(randn(5, 3, 24)).any()


def test_a_is_a_function_of_its_samples_key_its_site_and_its_expert():
    """Drawn together, each is what it is alone: u in [0, 1) → (2u - 1) / √in."""
    torch.manual_seed(0)
    before, fast = torch.get_rng_state(), initial()
    assert torch.equal(torch.get_rng_state(), before)
    draws = noise.uniform(KEYS, noise.INITIAL, 4 * 24).view(5, 4, 24)
    assert torch.equal(fast.tensors[f"{DENSE.name}.A"], (2 * draws - 1) * 24**-0.5)
    draws = noise.uniform(KEYS, noise.INITIAL + 1, 5 * 4 * 16).view(5, 5, 4, 16).transpose(0, 1)
    assert torch.equal(fast.tensors[f"{EXPERTS.name}.A"], (2 * draws - 1) * 16**-0.5)
    shuffled = initial(keys=KEYS[[3, 0, 3]])
    assert all(torch.equal(value, fast.select([3, 0, 3]).tensors[name]) for name, value in shuffled.tensors.items())


def test_sites_leaves_and_stacks():
    fast = written()
    site = fast.site(EXPERTS.name)
    assert site.down is fast.tensors[f"{EXPERTS.name}.A"] and site.up is fast.tensors[f"{EXPERTS.name}.B"]
    assert site.scaling == 2.0 and site.samples == 5
    assert written(FULL).site(DENSE.name).down is None
    with pytest.raises(KeyError, match="no_such_layer"):
        fast.site("no_such_layer")
    parent = FastWeights({k: (v * 2).requires_grad_() * 1 for k, v in fast.tensors.items()}, 2.0)
    again = FastWeights.stack([parent.select([0, 1]), parent.select([2, 3, 4])]).leaves()
    assert again.scaling == 2.0
    for name, leaf in again.tensors.items():
        assert leaf.is_leaf and leaf.requires_grad and torch.equal(leaf, parent.tensors[name])


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("samples", [1, 5])
def test_dense_sample_by_sample(kind, samples):
    fast, x, upstream = written(config_of(kind=kind), KEYS[:samples]).leaves(), randn(5, 7, 24), randn(5, 7, 16, seed=4)
    site = fast.site(DENSE.name)
    y = site.dense(x)
    up = site.up.double() if site.down is None else site.up.double() @ site.down.double()
    expected = site.scaling * x.double() @ up.expand(5, -1, -1).mT
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=1e-5)
    leaves = [m for m in (site.down, site.up) if m is not None]
    gradients = (torch.autograd.grad(z, leaves, upstream.to(z.dtype)) for z in (y, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    half = site.dense(x.bfloat16())
    assert half.dtype == torch.bfloat16  # that of the activations
    torch.testing.assert_close(half.float(), y, atol=1.0, rtol=5e-2)
    if samples == 1:  # which take activations of any shape
        torch.testing.assert_close(site.dense(x.flatten(0, 1)), y.flatten(0, 1))
        return
    for shape in ((4, 7, 24), (35, 24), (5, 24)):
        with pytest.raises(ValueError) as error:
            site.dense(torch.zeros(*shape))
        assert str(error.value) == f"fast weights of 5 samples on activations of shape {shape}"


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_keep(kind):
    fast, samples = written(config_of(kind=kind)), torch.tensor([True, False, True, True, False])
    kept = fast.keep(samples)
    assert kept.scaling == fast.scaling
    for name, value in fast.tensors.items():
        ours, before = (tensor.movedim(-3, 0) for tensor in (kept.tensors[name], value))
        assert torch.equal(ours[samples], before[samples]) and (name.endswith(".A") or not ours[~samples].any())
    poisoned = {k: v if k.endswith(".A") else torch.full_like(v, math.nan) for k, v in fast.tensors.items()}
    none = FastWeights(poisoned, 1.0).keep(torch.zeros(5, dtype=torch.bool))
    assert not none.site(DENSE.name).dense(randn(5, 3, 24)).any()
