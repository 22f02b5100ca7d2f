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
    ("count", "fraction", "expected"),
    [
        (16, 0.1, [14, 15]),  # LLaDA-MoE
        (20, 0.1, [18, 19]),  # LLaDA2.1
        (20, 0.05, [19]),
        (16, 0.05, [15]),
        (16, 0.25, [12, 13, 14, 15]),
        (20, 0.5, list(range(10, 20))),
        (4, 0.1, [3]),
        (4, 1.0, [0, 1, 2, 3]),
        (1, 0.1, [0]),
    ],
)
def test_the_share_is_counted_from_the_end(count, fraction, expected):
    assert list(adapted_layers(count, MemoryConfig(layer_fraction=fraction))) == expected


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_there_is_always_a_layer(fraction):
    for count in range(1, 41):
        layers = adapted_layers(count, MemoryConfig(layer_fraction=fraction))
        assert layers.start == int(count * (1 - fraction)) and layers.stop == count and len(layers) >= 1


def test_experts_share_a_site_and_shared_experts_have_their_own():
    names = [site.shape.name for site in find_sites(tiny("llada_moe"), MemoryConfig())]
    assert sorted(names) == sorted(
        [f"layers.2.mlp.experts.{name}" for name in FFN] + [f"layers.2.shared_expert.{name}" for name in FFN]
    )
    names = [site.shape.name for site in find_sites(tiny("llada2"), MemoryConfig())]
    assert sorted(names) == sorted(
        [f"layers.2.mlp.experts.{name}" for name in FFN] + [f"layers.2.mlp.shared_experts.{name}" for name in FFN]
    )
    sites = find_sites(tiny("llama"), MemoryConfig(layer_fraction=0.4))
    assert [site.shape.name for site in sites] == [f"layers.{i}.mlp.{name}" for i in (1, 2) for name in FFN]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_first_layer_has_plain_sites(kind):
    sites = [s for s in find_sites(tiny(kind), MemoryConfig(layer_fraction=1.0)) if "layers.0." in s.shape.name]
    assert [(site.shape.name, site.shape.experts) for site in sites] == [(f"layers.0.mlp.{n}", None) for n in FFN]
    assert [(s.shape.in_features, s.shape.out_features) for s in sites] == [(32, 48), (32, 48), (48, 32)]


@pytest.mark.parametrize("kind", KINDS)
def test_sites_are_the_same_under_lora(kind):
    memory = MemoryConfig(layer_fraction=0.7)
    plain = find_sites(tiny(kind), memory)
    model = tiny(kind, lora=True)
    wrapped = find_sites(staged_backbone(model), memory)
    assert [site.shape for site in wrapped] == [site.shape for site in plain]
    for site in wrapped:  # the outermost layer: fast weights stand beside the LoRA, not under it
        assert isinstance(site.module, RoutedExperts) or hasattr(site.module, "lora_A")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["lora", "full"])
def test_fast_parameters_are_counted(kind, form):
    model = tiny(kind)
    config = MemoryConfig(kind=form, rank=4, layer_fraction=0.4, target_modules=("up_proj", "down_proj"))
    expected = 0
    for layer in model.layers[1:]:
        for name, module in layer.named_modules():
            if isinstance(module, (nn.Linear, ExpertLinear)) and name.endswith(("up_proj", "down_proj")):
                *experts, rows, columns = module.weight.shape
                expected += math.prod(experts) * (rows * columns if form == "full" else 4 * (rows + columns))
    memory = ParametricMemory(model, config, mask_token_id=2)
    assert memory.fast_parameters == expected


def test_llada_moe_in_its_own_size():
    """The fast weights of the published dimensions: 2 layers, 64 experts of width 1024, rank 32."""
    with torch.device("meta"):
        model = LLaDAMoEModelLM(LLaDAMoEConfig())
    memory = ParametricMemory(model, MemoryConfig(), mask_token_id=2)
    assert memory.boundary == 14
    assert memory.fast_parameters == 2 * 64 * 3 * 32 * (2048 + 1024)


@pytest.mark.parametrize(
    ("kind", "linear"),
    [
        ("llada_moe", "down_proj, gate, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        ("llada2", "dense, down_proj, gate_proj, query_key_value, up_proj"),
        ("llama", "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
    ],
)
@pytest.mark.parametrize("lora", [False, True])
def test_a_target_that_matches_nothing_is_refused(kind, linear, lora):
    model = staged_backbone(tiny(kind, lora=lora))
    with pytest.raises(ConfigError) as error:
        find_sites(model, MemoryConfig(target_modules=("gate_proj", "c_fc"), layer_fraction=0.4))
    assert str(error.value) == (
        f"memory.target_modules: 'c_fc' matches nothing in layers 1-2 of {type(model).__name__}; "
        f"linear layers there: {linear}"
    )
