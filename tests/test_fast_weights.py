"""Fast weights: how they begin, what they do to activations, the inner SGD by hand, and files."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dllm_memdlm import noise
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.fast_weights import FastWeights, SiteShape, SiteWeights, sgd_step

CPU = torch.device("cpu")
DENSE = SiteShape("layers.3.mlp.up_proj", in_features=24, out_features=16)
EXPERTS = SiteShape("layers.3.mlp.experts.down_proj", in_features=16, out_features=24, experts=5)
KEYS = noise.example_keys(42, 0, torch.arange(5))


def config_of(**values) -> MemoryConfig:
    return MemoryConfig(**({"rank": 4, "alpha": 8.0} | values))


def initial(config: MemoryConfig | None = None, keys: Tensor = KEYS) -> FastWeights:
    return FastWeights.initial([DENSE, EXPERTS], config or config_of(), keys, CPU)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def written(config: MemoryConfig | None = None, keys: Tensor = KEYS) -> FastWeights:
    """Fast weights none of whose tensors is zero."""
    fast = initial(config, keys)
    return FastWeights({k: randn(*v.shape, seed=i) for i, (k, v) in enumerate(fast.tensors.items())}, fast.scaling)


# --- shapes and beginnings ---


def test_shapes():
    low, full = config_of(), config_of(kind="full")
    assert DENSE.tensors(low) == {"A": (4, 24), "B": (16, 4)}
    assert DENSE.tensors(full) == {"delta": (16, 24)}
    assert (DENSE.numel(low), DENSE.numel(full)) == (4 * (24 + 16), 24 * 16)
    assert (EXPERTS.numel(low), EXPERTS.numel(full)) == (5 * 4 * (24 + 16), 5 * 24 * 16)
    up, down = "layers.3.mlp.up_proj", "layers.3.mlp.experts.down_proj"
    assert {k: tuple(v.shape) for k, v in initial(low).tensors.items()} == {
        f"{up}.A": (5, 4, 24),
        f"{up}.B": (5, 16, 4),
        f"{down}.A": (5, 5, 4, 16),
        f"{down}.B": (5, 5, 24, 4),
    }
    assert {k: tuple(v.shape) for k, v in initial(full, KEYS[:2]).tensors.items()} == {
        f"{up}.delta": (2, 16, 24),
        f"{down}.delta": (5, 2, 24, 16),
    }
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in initial(low).tensors.values())
    assert initial(low).samples == 5 and initial(full, KEYS[:2]).samples == 2


@pytest.mark.parametrize("site", [SiteShape("a", 50, 8), SiteShape("b", 200, 8, experts=3)], ids=["dense", "experts"])
def test_a_is_kaiming_uniform(site):
    config = config_of(rank=64)
    fast = FastWeights.initial([site], config, torch.arange(8), CPU)
    a = fast.tensors[f"{site.name}.A"].flatten().double()
    bound = math.sqrt(6 / ((1 + 5) * site.in_features))  # a = √5: 1/√in
    assert a.abs().max() <= bound
    u = ((a / bound + 1) / 2).sort().values
    grid = torch.arange(len(u) + 1, dtype=torch.float64) / len(u)
    distance = torch.maximum((grid[1:] - u).max(), (u - grid[:-1]).max()).item()
    assert distance < 1.95 / math.sqrt(len(u))


def test_fast_weights_begin_without_effect():
    for config in (config_of(), config_of(kind="full")):
        fast = initial(config)
        for name, value in fast.tensors.items():
            assert value.any() == name.endswith(".A")
        assert not fast.site(DENSE.name).dense(randn(5, 3, 24)).any()


def test_a_depends_on_the_samples_key_alone():
    whole = initial()
    for i in range(5):
        alone = initial(keys=KEYS[i : i + 1])
        for name, value in alone.tensors.items():
            assert torch.equal(value.squeeze(-3), whole.tensors[name].select(-3, i)), name
    shuffled = initial(keys=KEYS[[3, 0, 3]])
    for name, value in shuffled.tensors.items():
        assert torch.equal(value, whole.tensors[name].index_select(-3, torch.tensor([3, 0, 3])))


def test_every_matrix_is_drawn_by_itself():
    fast = initial()
    draws = [*fast.tensors[f"{DENSE.name}.A"][:, :, :16], *fast.tensors[f"{EXPERTS.name}.A"].flatten(0, 1)]
    assert len(draws) == 5 + 5 * 5
    for i, a in enumerate(draws):
        for b in draws[i + 1 :]:
            correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
            assert abs(correlation) < 0.6  # of 64 pairs of numbers


def test_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), initial()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(initial().tensors[f"{DENSE.name}.A"], first.tensors[f"{DENSE.name}.A"])


def test_scope_batch_shares_one_set():
    shared = initial(config_of(scope="batch"))
    alone = initial(keys=KEYS[:1])
    assert shared.samples == 1
    assert shared.tensors.keys() == alone.tensors.keys()
    assert all(torch.equal(shared.tensors[k], alone.tensors[k]) for k in alone.tensors)


def test_scaling_is_that_of_the_config():
    assert initial().scaling == 2.0
    assert initial(config_of(kind="full")).scaling == 1.0


def test_sites():
    fast = written()
    site = fast.site(EXPERTS.name)
    assert site.down is fast.tensors[f"{EXPERTS.name}.A"] and site.up is fast.tensors[f"{EXPERTS.name}.B"]
    assert site.scaling == 2.0 and site.samples == 5
    full = written(config_of(kind="full")).site(DENSE.name)
    assert full.down is None and full.up.shape == (5, 16, 24)
    with pytest.raises(KeyError, match="no_such_layer"):
        fast.site("no_such_layer")


def test_leaves_begin_a_new_graph():
    parent = FastWeights({k: (v * 2).requires_grad_() * 1 for k, v in written().tensors.items()}, 2.0)
    leaves = parent.leaves()
    assert leaves.scaling == 2.0
    for name, leaf in leaves.tensors.items():
        assert leaf.is_leaf and leaf.requires_grad
        assert torch.equal(leaf, parent.tensors[name])


# --- products ---


def full_matrix(site: SiteWeights, sample: int, expert: int | None = None) -> Tensor:
    """(α/r)·B·A of one sample, or of one sample and expert, in float64."""
    matrices = [m if expert is None else m[expert] for m in (site.down, site.up) if m is not None]
    product = matrices[-1][sample].double()
    if len(matrices) == 2:
        product = product @ matrices[0][sample].double()
    return site.scaling * product


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("samples", [1, 5])
def test_dense_sample_by_sample(kind, samples):
    site = written(config_of(kind=kind), KEYS[:samples]).site(DENSE.name)
    x = randn(5, 7, 24, seed=9)
    y = site.dense(x)
    assert y.shape == (5, 7, 16) and y.dtype == torch.float32
    for b in range(5):
        matrix = full_matrix(site, b if samples > 1 else 0)
        for i in range(7):
            torch.testing.assert_close(y[b, i].double(), matrix @ x[b, i].double(), atol=1e-4, rtol=1e-5)


def test_dense_computes_in_the_dtype_of_the_activations():
    x = randn(5, 7, 24)
    for site in (written().site(DENSE.name), written(keys=KEYS[:1]).site(DENSE.name)):
        y = site.dense(x.bfloat16())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), site.dense(x), atol=1.0, rtol=5e-2)


def test_shared_fast_weights_take_activations_of_any_shape():
    site = written(keys=KEYS[:1]).site(DENSE.name)
    x = randn(6, 24)
    torch.testing.assert_close(site.dense(x), site.dense(x.view(2, 3, 24)).view(6, 16))


@pytest.mark.parametrize("shape", [(4, 7, 24), (35, 24), (5, 24)], ids=str)
def test_activations_of_another_batch(shape):
    site = written().site(DENSE.name)
    with pytest.raises(ValueError) as error:
        site.dense(torch.zeros(*shape))
    assert str(error.value) == f"fast weights of 5 samples on activations of shape {shape}"


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("samples", [1, 3])
def test_grouped_by_expert_and_sample(kind, samples):
    site = written(config_of(kind=kind), KEYS[:samples]).site(EXPERTS.name)
    counts = torch.randint(0, 4, (5, samples), generator=torch.Generator().manual_seed(1))
    counts[2] = 0  # an expert without tokens
    x = randn(int(counts.sum()), 16, seed=9)
    y = site.grouped(x, counts.flatten().cumsum(0).to(torch.int32))
    assert y.shape == (len(x), 24)
    row = 0
    for expert in range(5):
        for sample in range(samples):
            for _ in range(int(counts[expert, sample])):
                expected = full_matrix(site, sample, expert) @ x[row].double()
                torch.testing.assert_close(y[row].double(), expected, atol=1e-4, rtol=1e-5)
                row += 1
    assert row == len(x)


def test_products_pass_gradients_to_the_fast_weights():
    fast = written().leaves()
    x, upstream = randn(5, 7, 24, seed=3), randn(5, 7, 16, seed=4)
    site = fast.site(DENSE.name)
    grad_a, grad_b = torch.autograd.grad(site.dense(x), (site.down, site.up), upstream)
    for s in range(5):
        a, b, up, rows = site.down[s].double(), site.up[s].double(), upstream[s].double(), x[s].double()
        torch.testing.assert_close(grad_b[s].double(), 2 * up.T @ (rows @ a.T), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(grad_a[s].double(), 2 * (up @ b).T @ rows, atol=1e-4, rtol=1e-4)


# --- the inner SGD ---


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
    result = {name: value.double().clone() for name, value in fast.tensors.items()}
    totals = []
    for s in range(fast.samples):
        places = []
        for name, value in fast.tensors.items():
            places += [(name, (s,))] if value.dim() == 3 else [(name, (e, s)) for e in range(value.shape[0])]
        norms = {
            (name, place): math.sqrt(sum(x * x for x in gradients[name][place].flatten().tolist()))
            for name, place in places
        }
        total = math.sqrt(sum(norm * norm for norm in norms.values()))
        totals.append(total)
        for name, place in places:
            norm = norms[name, place] if config.clip == "local" else total
            factor = 1.0
            if config.clip != "none" and config.grad_clip > 0 and norm > config.grad_clip:
                factor = config.grad_clip / norm
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
    fast = written(config)
    gradients = gradients_of(fast)
    moved, step = sgd_step(fast, gradients, torch.arange(5.0), config)
    expected, totals = naive_sgd(fast, gradients, config)
    assert moved.scaling == fast.scaling and list(moved.tensors) == list(fast.tensors)
    for name, value in moved.tensors.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-6)
    assert step.grad_norm.tolist() == pytest.approx(totals, rel=1e-5)
    assert step.loss.tolist() == [0, 1, 2, 3, 4] and step.finite.all()


def test_the_cases_above_discriminate():
    """Some matrices are clipped and some are not, and every way of clipping ends elsewhere."""
    fast = written()
    gradients = gradients_of(fast)
    norms = torch.cat([g.norm(dim=(-2, -1)).flatten() for g in gradients.values()])
    assert (norms > 1.05).sum() > 5 and (norms < 0.95).sum() > 5
    ends = [
        torch.cat([v.flatten() for v in sgd_step(fast, gradients, torch.zeros(5), config)[0].tensors.values()])
        for config in (config_of(clip="local"), config_of(clip="global"), config_of(clip="none"))
    ]
    for i, a in enumerate(ends):
        for b in ends[i + 1 :]:
            assert (a - b).abs().max() > 1e-3


def test_sgd_starts_no_graph_and_changes_nothing_in_place():
    fast = written().leaves()
    before = {k: v.detach().clone() for k, v in fast.tensors.items()}
    moved, step = sgd_step(fast, gradients_of(fast), torch.zeros(5, requires_grad=True) * 1, config_of())
    assert not any(v.requires_grad for v in moved.tensors.values()) and not step.loss.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in fast.tensors.items())


def test_zero_gradients_move_nothing():
    fast = written()
    for clip in ("local", "global", "none"):
        zeros = {k: torch.zeros_like(v) for k, v in fast.tensors.items()}
        moved, step = sgd_step(fast, zeros, torch.zeros(5), config_of(clip=clip))
        assert all(torch.equal(moved.tensors[k], v) for k, v in fast.tensors.items())
        assert not step.grad_norm.any() and step.finite.all()


@pytest.mark.parametrize("clip", ["local", "global", "none"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "dense", "expert"])
def test_a_sample_that_is_not_finite_stays_where_it_is(clip, bad, where):
    fast, config = written(), config_of(clip=clip)
    good = gradients_of(fast)
    expected, _ = sgd_step(fast, good, torch.zeros(5), config)
    gradients, loss = {k: v.clone() for k, v in good.items()}, torch.zeros(5)
    if where == "loss":
        loss[2] = bad
    elif where == "dense":
        gradients[f"{DENSE.name}.B"][2, 3, 1] = bad
    else:
        gradients[f"{EXPERTS.name}.A"][4, 2, 0, 0] = bad
    moved, step = sgd_step(fast, gradients, loss, config)
    assert step.finite.tolist() == [True, True, False, True, True]
    for name, value in moved.tensors.items():
        for s in range(5):
            source = fast if s == 2 else expected
            assert torch.equal(value.select(-3, s), source.tensors[name].select(-3, s)), (name, s)


def test_samples_do_not_affect_each_other():
    fast = written()
    gradients = gradients_of(fast)
    for clip in ("local", "global", "none"):
        config = config_of(clip=clip)
        whole, _ = sgd_step(fast, gradients, torch.zeros(5), config)
        for s in range(5):
            row = torch.tensor([s])
            alone = FastWeights({k: v.index_select(-3, row) for k, v in fast.tensors.items()}, fast.scaling)
            part = {k: v.index_select(-3, row) for k, v in gradients.items()}
            moved, _ = sgd_step(alone, part, torch.zeros(1), config)
            for name, value in moved.tensors.items():
                torch.testing.assert_close(value, whole.tensors[name].index_select(-3, row), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_keep(kind):
    fast = written(config_of(kind=kind))
    samples = torch.tensor([True, False, True, True, False])
    kept = fast.keep(samples)
    assert kept.scaling == fast.scaling
    x, rows = randn(5, 3, 24), randn(25, 16, seed=1)
    offsets = torch.arange(1, 26, dtype=torch.int32)  # one row for each expert and sample
    dense, before = kept.site(DENSE.name).dense(x), fast.site(DENSE.name).dense(x)
    routed = kept.site(EXPERTS.name).grouped(rows, offsets).view(5, 5, 24)
    routed_before = fast.site(EXPERTS.name).grouped(rows, offsets).view(5, 5, 24)
    for s in range(5):
        if samples[s]:
            assert torch.equal(dense[s], before[s]) and torch.equal(routed[:, s], routed_before[:, s])
        else:
            assert not dense[s].any() and not routed[:, s].any()
    poisoned = {k: v if k.endswith(".A") else torch.full_like(v, math.nan) for k, v in fast.tensors.items()}
    bad = FastWeights(poisoned, fast.scaling)
    assert not bad.keep(torch.zeros(5, dtype=torch.bool)).site(DENSE.name).dense(x).any()


# --- files ---


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_files_are_exact(tmp_path, kind):
    config = config_of(kind=kind, rank=3, alpha=1.0)
    fast = written(config)
    header = {"model": "some/model", "config": {"steps": 2}, "prompt": "5f2a", "note": "ü"}
    path = tmp_path / "memory.safetensors"
    fast.leaves().save(path, header)
    again, read = FastWeights.load(path)
    assert read == header
    assert again.scaling == fast.scaling == config.scaling  # 1/3 has no short decimal form
    assert again.tensors.keys() == fast.tensors.keys()
    for name, value in fast.tensors.items():
        assert torch.equal(again.tensors[name], value) and again.tensors[name].dtype == torch.float32


def test_files_of_strided_tensors_without_header(tmp_path):
    fast = FastWeights({"a.A": randn(4, 6, 2).transpose(1, 2), "a.B": randn(3, 4, 5)[:, ::2].transpose(0, 1)}, 0.1)
    fast.save(tmp_path / "memory.safetensors")
    again, header = FastWeights.load(str(tmp_path / "memory.safetensors"))
    assert header == {} and again.scaling == 0.1
    assert all(torch.equal(again.tensors[k], v) for k, v in fast.tensors.items())


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "memory.safetensors"
    written().save(path)
    content = path.read_bytes()
    for part in (content[: len(content) // 2], content[:5], b"", b"not safetensors at all, but long enough to read"):
        path.write_bytes(part)
        with pytest.raises(ConfigError) as error:
            FastWeights.load(path)
        assert str(error.value).startswith(f"{path}: not a fast-weight snapshot (")
    with pytest.raises(ConfigError) as error:
        FastWeights.load(tmp_path / "nothing.safetensors")
    assert "nothing.safetensors: not a fast-weight snapshot (No such file" in str(error.value)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_safetensors_are_refused(tmp_path, metadata):
    path = tmp_path / "adapter.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata)
    with pytest.raises(ConfigError) as error:
        FastWeights.load(path)
    assert str(error.value) == (
        f"{path}: a safetensors file, but not a fast-weight snapshot; write one with --save-memory"
    )
