"""Fast weights: where they go, how they begin, what is kept of them, and the inner SGD against the reference's."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny
from steps import flat
from torch import Tensor

from dllm_memdlm.backbones import adapted_layers, find_sites, staged_backbone
from dllm_memdlm.backbones.site_weights import SiteShape
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.method import noise
from dllm_memdlm.method.fast_weights import FastWeights, sgd_step
from dllm_memdlm.method.inner_loop import ParametricMemory
from dllm_memdlm.method.reference import naive_sgd

DENSE = SiteShape("layers.3.mlp.up_proj", in_features=24, out_features=16)
EXPERTS = SiteShape("layers.3.mlp.experts.down_proj", in_features=16, out_features=24, experts=5)
KEYS = noise.example_keys(42, 0, torch.arange(5))
both_kinds = pytest.mark.parametrize("kind", ["lora", "full"])


@pytest.mark.parametrize(
    ("count", "fraction", "first"),
    [(16, 0.1, 14), (20, 0.1, 18), (20, 0.05, 19), (16, 0.25, 12), (4, 0.1, 3), (4, 1.0, 0), (1, 0.1, 0)],
)
def test_the_share_is_counted_from_the_end(count, fraction, first):
    assert adapted_layers(count, MemoryConfig(layer_fraction=fraction)) == range(first, count)


def test_fast_weights_stand_beside_a_lora_and_not_under_it():
    sites = find_sites(staged_backbone(tiny("llama", lora=True)), config_of(layer_fraction=1.0))
    assert sites and all(hasattr(site.module, "lora_A") for site in sites)


@both_kinds
def test_fast_parameters_are_those_of_one_sample(kind):
    memory = ParametricMemory(tiny("llada2"), config_of(kind=kind, layer_fraction=1.0), mask_token_id=2)
    fast = FastWeights.initial(memory.shapes, memory.config, KEYS[:1], torch.get_default_device())
    assert memory.fast_parameters == sum(value.numel() for value in fast.tensors.values())


@pytest.mark.parametrize("lora", [False, True])
def test_a_target_that_matches_nothing_is_refused(lora):
    memory = MemoryConfig(target_modules=("gate_proj", "c_fc"), layer_fraction=0.4)
    says = r"^memory\.target_modules: 'c_fc' matches nothing in layers 1-2 of .*: dense, down_proj, gate_proj, query"
    with pytest.raises(ConfigError, match=says):
        find_sites(staged_backbone(tiny("llada2", lora=lora)), memory)


def config_of(**values) -> MemoryConfig:
    return MemoryConfig(**({"rank": 4, "alpha": 8.0} | values))


def initial(config: MemoryConfig | None = None, keys: Tensor = KEYS) -> FastWeights:
    return FastWeights.initial([DENSE, EXPERTS], config or config_of(), keys, torch.get_default_device())


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def written(config: MemoryConfig | None = None) -> FastWeights:
    """Fast weights of five samples, none of whose tensors is zero."""
    fast = initial(config)
    return FastWeights({k: randn(*v.shape, seed=i) for i, (k, v) in enumerate(fast.tensors.items())}, fast.scaling)


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


@both_kinds
def test_what_is_not_kept_has_no_effect(kind):
    fast, samples = written(config_of(kind=kind)), torch.tensor([True, False, True, True, False])
    kept = fast.keep(samples)
    assert kept.scaling == fast.scaling
    for name, value in fast.tensors.items():
        ours, before = (tensor.movedim(-3, 0) for tensor in (kept.tensors[name], value))
        assert torch.equal(ours[samples], before[samples]) and (name.endswith(".A") or not ours[~samples].any())
    poisoned = {k: v if k.endswith(".A") else torch.full_like(v, math.nan) for k, v in fast.tensors.items()}
    none = FastWeights(poisoned, 1.0).keep(torch.zeros(5, dtype=torch.bool))
    assert not none.site(DENSE.name).dense(randn(5, 3, 24)).any()


def gradients_of(fast: FastWeights) -> dict[str, Tensor]:
    """Matrices of norms on both sides of 1."""
    found = {}
    for i, (name, value) in enumerate(fast.tensors.items()):
        norm = 1.5 * randn(*value.shape[:-2], 1, 1, seed=50 + i).abs()
        found[name] = norm * randn(*value.shape, seed=100 + i) / (value.shape[-2] * value.shape[-1]) ** 0.5
    return found


@pytest.mark.parametrize("clip", ["local", "global", "none"])
@pytest.mark.parametrize("grad_clip", [0, 0.5, 2.0])
def test_sgd_tensor_by_tensor(clip, grad_clip):
    config = config_of(clip=clip, grad_clip=grad_clip, inner_lr=3.0)
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


@pytest.mark.parametrize("clip", ["local", "global", "none"])
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


@both_kinds
def test_the_size_is_that_of_what_is_added_to_the_layers(kind):
    config = MemoryConfig(kind=kind, rank=4, alpha=12)
    fast = FastWeights.initial([DENSE, EXPERTS], config, KEYS[:3], torch.device("cpu"))
    assert torch.equal(fast.norm(), torch.zeros(3)), "φ0 adds nothing"
    written = FastWeights({name: torch.randn_like(value) for name, value in fast.tensors.items()}, fast.scaling)
    added = [written.site(shape.name).difference() for shape in (DENSE, EXPERTS)]  # [S, out, in], [E, S, out, in]
    expected = torch.stack([torch.cat([d[..., i, :, :].flatten() for d in added]).norm() for i in range(3)])
    torch.testing.assert_close(written.norm(), expected)
