"""Where fast weights go: which layers, which linear layers in them, and how many."""

from __future__ import annotations

import math

import pytest
from conftest import KINDS, tiny
from torch import nn

from dllm_memdlm.backbones import adapted_layers, find_sites, staged_backbone
from dllm_memdlm.backbones.experts import ExpertLinear
from dllm_memdlm.backbones.moe import RoutedExperts
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.method.inner_loop import ParametricMemory

FFN = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("count", "fraction", "first"),
    [(16, 0.1, 14), (20, 0.1, 18), (20, 0.05, 19), (16, 0.25, 12), (4, 0.1, 3), (4, 1.0, 0), (1, 0.1, 0)],
)
def test_the_share_is_counted_from_the_end(count, fraction, first):
    assert adapted_layers(count, MemoryConfig(layer_fraction=fraction)) == range(first, count)


SPARSE = {"llada_moe": ("mlp.experts", "shared_expert"), "llada2": ("mlp.experts", "mlp.shared_experts")}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_share_a_site_and_lora_changes_none(kind):
    """A dense first layer has plain sites, shared experts their own. Fast weights stand beside a LoRA, not under it."""
    memory = MemoryConfig(layer_fraction=1.0)
    sites = {site.shape.name: site.shape for site in find_sites(tiny(kind), memory)}
    dense = [sites[f"layers.0.mlp.{name}"] for name in FFN]
    assert [(s.in_features, s.out_features, s.experts) for s in dense] == [(32, 48, None)] * 2 + [(48, 32, None)]
    last = {f"layers.2.{part}.{name}" for part in SPARSE.get(kind, ("mlp",)) for name in FFN}
    assert {name for name in sites if name.startswith("layers.2.")} == last
    assert {name for name, shape in sites.items() if shape.experts} == {name for name in sites if ".experts." in name}
    wrapped = find_sites(staged_backbone(tiny(kind, lora=True)), memory)
    assert [site.shape for site in wrapped] == list(sites.values())
    assert all(isinstance(site.module, RoutedExperts) or hasattr(site.module, "lora_A") for site in wrapped)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["lora", "full"])
def test_fast_parameters_are_counted(kind, form):
    model = tiny(kind)
    config = MemoryConfig(kind=form, rank=4, layer_fraction=0.4, target_modules=("up_proj", "down_proj"))
    expected = 0
    for name, module in nn.ModuleList(model.layers[1:]).named_modules():
        if isinstance(module, (nn.Linear, ExpertLinear)) and name.endswith(("up_proj", "down_proj")):
            *experts, rows, columns = module.weight.shape
            expected += math.prod(experts) * (rows * columns if form == "full" else 4 * (rows + columns))
    assert ParametricMemory(model, config, mask_token_id=2).fast_parameters == expected


@pytest.mark.parametrize("lora", [False, True])
def test_a_target_that_matches_nothing_is_refused(lora):
    memory = MemoryConfig(target_modules=("gate_proj", "c_fc"), layer_fraction=0.4)
    with pytest.raises(ConfigError, match=r"^memory\.target_modules: 'c_fc' matches nothing in layers 1-2 of") as error:
        find_sites(staged_backbone(tiny("llada2", lora=lora)), memory)
    assert str(error.value).endswith(": dense, down_proj, gate_proj, query_key_value, up_proj")
