"""Where fast weights go: which layers, which linear layers in them, and how many."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import KINDS, tiny
from torch import nn

from dllm_memdlm.backbones import LLaDAMoEConfig, LLaDAMoEModelLM, adapted_layers, find_sites, staged_backbone
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


@pytest.mark.parametrize(("kind", "shared"), [("llada_moe", "shared_expert"), ("llada2", "mlp.shared_experts")])
def test_experts_share_a_site_and_shared_experts_have_their_own(kind, shared):
    names = [site.shape.name for site in find_sites(tiny(kind), MemoryConfig())]
    assert sorted(names) == sorted(f"layers.2.{part}.{name}" for part in ("mlp.experts", shared) for name in FFN)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_first_layer_has_plain_sites(kind):
    sites = [s for s in find_sites(tiny(kind), MemoryConfig(layer_fraction=1.0)) if "layers.0." in s.shape.name]
    assert [(site.shape.name, site.shape.experts) for site in sites] == [(f"layers.0.mlp.{n}", None) for n in FFN]
    assert [(s.shape.in_features, s.shape.out_features) for s in sites] == [(32, 48), (32, 48), (48, 32)]


@pytest.mark.parametrize("kind", KINDS)
def test_sites_are_the_same_under_lora(kind):
    memory = MemoryConfig(layer_fraction=0.7)
    wrapped = find_sites(staged_backbone(tiny(kind, lora=True)), memory)
    assert [site.shape for site in wrapped] == [site.shape for site in find_sites(tiny(kind), memory)]
    for site in wrapped:  # the outermost layer: fast weights stand beside the LoRA, not under it
        assert isinstance(site.module, RoutedExperts) or hasattr(site.module, "lora_A")


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


def test_llada_moe_in_its_own_size():
    """The fast weights of the published dimensions: 2 layers, 64 experts of width 1024, rank 32."""
    with torch.device("meta"):
        model = LLaDAMoEModelLM(LLaDAMoEConfig())
    memory = ParametricMemory(model, MemoryConfig(), mask_token_id=2)
    assert (memory.boundary, memory.fast_parameters) == (14, 2 * 64 * 3 * 32 * (2048 + 1024))


LINEAR = {
    "llada_moe": "down_proj, gate, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    "llada2": "dense, down_proj, gate_proj, query_key_value, up_proj",
    "llama": "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
}


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("lora", [False, True])
def test_a_target_that_matches_nothing_is_refused(kind, lora):
    with pytest.raises(ConfigError, match=r"^memory\.target_modules: 'c_fc' matches nothing in layers 1-2 of") as error:
        memory = MemoryConfig(target_modules=("gate_proj", "c_fc"), layer_fraction=0.4)
        find_sites(staged_backbone(tiny(kind, lora=lora)), memory)
    assert str(error.value).endswith(f": {LINEAR[kind]}")
