"""Fast weights: their shapes and beginnings, their products, and their files."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from small_fast_weights import DENSE, EXPERTS, HERE, KEYS, config_of, initial, randn, written
from torch import Tensor

from dllm_memdlm.backbones.site_weights import SiteShape, SiteWeights
from dllm_memdlm.config import ConfigError
from dllm_memdlm.method import noise
from dllm_memdlm.method.fast_weights import FastWeights

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
    fast = FastWeights.initial([site], config, torch.arange(8), HERE)
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


def test_every_site_has_a_stream_of_its_own():
    """Drawn together, each is what it is alone: u in [0, 1) → (2u - 1) / √in."""
    sites = [SiteShape(name, 6, 5) for name in "abc"]
    tensors = FastWeights.initial(sites, config_of(rank=2), KEYS, HERE).tensors
    for number, site in enumerate(sites):
        draws = noise.uniform(KEYS.to(HERE), noise.INITIAL + number, 2 * 6).view(len(KEYS), 2, 6)
        assert torch.equal(tensors[f"{site.name}.A"], (2 * draws - 1) * 6**-0.5)


def test_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), initial()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(initial().tensors[f"{DENSE.name}.A"], first.tensors[f"{DENSE.name}.A"])


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
        assert torch.equal(again.tensors[name], value.cpu()) and again.tensors[name].dtype == torch.float32


def test_files_of_strided_tensors_without_header(tmp_path):
    fast = FastWeights({"a.A": randn(4, 6, 2).transpose(1, 2), "a.B": randn(3, 4, 5)[:, ::2].transpose(0, 1)}, 0.1)
    fast.save(tmp_path / "memory.safetensors")
    again, header = FastWeights.load(str(tmp_path / "memory.safetensors"))
    assert header == {} and again.scaling == 0.1
    assert all(torch.equal(again.tensors[k], v.cpu()) for k, v in fast.tensors.items())


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
