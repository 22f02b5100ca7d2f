"""Adapters on tensors of all experts: two matrices an expert in files, and PEFT's own settings."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file
from test_experts import apart
from torch import Tensor, nn

from dllm_memdlm.backbones import with_lora
from dllm_memdlm.backbones.adapters import load_adapter
from dllm_memdlm.backbones.expert_names import split_names
from dllm_memdlm.backbones.lora import ExpertLora
from dllm_memdlm.config import ConfigError, LoraConfig

KINDS = ("llada_moe", "llada2")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_stock_in_files(kind, tmp_path):
    """Ours on a model with a module an expert, in PEFT's own classes; and one of theirs here, to train or to decode."""
    model = tiny(kind, lora=True)
    model.save_pretrained(tmp_path / "ours")
    base = tiny(kind)
    stock = peft.PeftModel.from_pretrained(apart(kind, base), tmp_path / "ours", is_trainable=True)
    state = split_names(model.state_dict())
    assert stock.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in stock.state_dict().items() if "lora_" in name)

    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    stock.save_pretrained(tmp_path / "theirs")
    theirs = stock.state_dict()
    to_train = LoraConfig(r=4, alpha=8, dropout=0.0, path=str(tmp_path / "theirs"))
    for loaded in (with_lora(tiny(kind), to_train), load_adapter(tiny(kind), str(tmp_path / "theirs"))):
        assert all(torch.equal(v, theirs[n]) for n, v in split_names(loaded.state_dict()).items() if "lora_" in n)
        experts = [module for module in loaded.modules() if isinstance(module, ExpertLora)]
        assert len(experts) == 6 and {p.requires_grad for m in experts for p in m.lora_A.parameters()} == {
            loaded.peft_config["default"].inference_mode is False
        }


@pytest.mark.parametrize(
    "targets",
    [
        r".*\.experts\.\d+\.(up|down)_proj",
        r".*\.layers\.1\..*(up|down)_proj|.*layers\.2\.mlp\.experts\.\d\.(up|down)_proj",
        [f"experts.{number}.{name}" for number in range(5) for name in ("up_proj", "down_proj")],
        ["up_proj", "down_proj"],
    ],
)
def test_targets_are_those_of_a_module_an_expert(targets, tmp_path):
    """The same layers as in stock PEFT, and the same words in the adapter's config."""
    stock = peft.get_peft_model(apart("llada_moe", tiny("llada_moe")), peft.LoraConfig(r=2, target_modules=targets))
    stock.save_pretrained(tmp_path / "theirs")
    theirs = load_adapter(tiny("llada_moe"), str(tmp_path / "theirs"))
    ours = with_lora(tiny("llada_moe"), LoraConfig(r=2, alpha=8, target_modules=targets))
    for model, name in ((theirs, "again"), (ours, "ours")):
        assert split_names(model.state_dict()).keys() == stock.state_dict().keys()
        model.save_pretrained(tmp_path / name)
        words = json.loads((tmp_path / name / "adapter_config.json").read_text())["target_modules"]
        assert words == targets if isinstance(targets, str) else sorted(words) == sorted(targets)


@pytest.mark.parametrize("targets", [r".*\.experts\.[0-3]\.up_proj", ("experts.4.up_proj",)])
def test_targets_among_the_experts_of_a_layer_are_refused(targets):
    with pytest.raises(ConfigError) as error:
        with_lora(tiny("llada_moe"), LoraConfig(r=2, alpha=4, target_modules=targets))
    assert str(error.value).startswith(f"lora.target_modules={targets!r}: ")
    assert "means some experts of model.layers.1.mlp.experts.up_proj and not others" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora=True: expected false for routed experts"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora': expected true, false or 'gaussian'"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(settings, words, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], **settings)
    peft.get_peft_model(apart("llada_moe", tiny("llada_moe")), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^adapter=.*: no adapter for this model \(" + words):
        load_adapter(tiny("llada_moe"), str(tmp_path))


def test_a_new_lora_is_drawn_as_pefts():
    """A uniform within 1/√in, for each expert its own; B zero."""
    model = with_lora(tiny("llada2", hidden_size=64), LoraConfig(r=8, alpha=8))
    up = next(m for m in model.modules() if isinstance(m, ExpertLora))
    down, zeros = up.lora_A["default"].weight, up.lora_B["default"].weight
    assert down.shape == (6, 8, 64) and not zeros.any()
    assert 0.95 / 8 < down.abs().max() <= 1 / 8 and down.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
    assert not any(torch.equal(down[0], down[number]) for number in range(1, 6))


@pytest.mark.parametrize("pattern", [r"experts\.\d+\.up_proj", "up_proj", "mlp.experts.{}.up_proj"])
def test_ranks_and_alphas_of_their_own(pattern, tmp_path):
    """By patterns of a module an expert: the scaling is PEFT's."""
    keys = [pattern.format(number) for number in range(5)] if "{}" in pattern else [pattern]
    patterns = {"rank_pattern": dict.fromkeys(keys, 3), "alpha_pattern": dict.fromkeys(keys, 30)}
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["up_proj", "down_proj"], **patterns)
    stock = peft.get_peft_model(apart("llada_moe", tiny("llada_moe")), config)
    stock.save_pretrained(tmp_path)
    ours = load_adapter(tiny("llada_moe"), str(tmp_path))
    theirs = stock.get_submodule("base_model.model.model.layers.1.mlp.experts.3")
    found = ours.get_submodule("base_model.model.model.layers.1.mlp.experts")
    for name, scaling in (("up_proj", 10.0), ("down_proj", 2.0)):
        assert getattr(found, name).scaling == getattr(theirs, name).scaling == {"default": scaling}
    ours.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert {name: saved[name] for name in patterns} == patterns


def test_alphas_that_differ_between_experts_are_refused(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], alpha_pattern={"experts.3.up_proj": 30})
    peft.get_peft_model(apart("llada_moe", tiny("llada_moe")), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"differs between experts of model\.layers\.1\.mlp\.experts\.up_proj"):
        load_adapter(tiny("llada_moe"), str(tmp_path))


def test_a_second_adapter(tmp_path):
    """Its targets are a pattern of a module an expert. Both are saved, each by itself."""
    config = peft.LoraConfig(r=3, target_modules=r".*\.experts\.\d+\.up_proj", init_lora_weights=False)
    stock = peft.get_peft_model(apart("llada_moe", tiny("llada_moe")), config)
    stock.save_pretrained(tmp_path / "theirs")
    model = tiny("llada_moe", lora=True)
    found = model.load_adapter(str(tmp_path / "theirs"), "second")
    assert not found.unexpected_keys and not found.missing_keys
    model.save_pretrained(tmp_path / "both")
    for folder in ("theirs", "both/second"):
        saved = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert len(saved) == 2 * 5 * 2
        assert all(torch.equal(saved[name], value) for name, value in adapter_of(stock).items())
    first = load_file(tmp_path / "both" / "adapter_model.safetensors")
    assert first.keys() == adapter_of(tiny("llada_moe", lora=True)).keys()
    with pytest.raises(ValueError, match="safe_serialization"):
        model.save_pretrained(tmp_path / "bin", safe_serialization=False)


def adapter_of(model: peft.PeftModel) -> dict[str, Tensor]:
    return split_names(peft.get_peft_model_state_dict(model, model.state_dict(), save_embedding_layers=False))


def test_pefts_own_way_of_loading_says_which_to_take(tmp_path):
    """It finds no layer where targets are patterns of a module an expert."""
    config = peft.LoraConfig(r=3, target_modules=r".*\.experts\.\d+\.up_proj|.*q_proj")
    peft.get_peft_model(apart("llada_moe", tiny("llada_moe")), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"use backbones\.load_adapter"):
        peft.PeftModel.from_pretrained(tiny("llada_moe"), tmp_path)
