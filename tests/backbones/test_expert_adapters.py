"""Adapters on tensors of all experts: two matrices an expert in files, and PEFT's own settings."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from conftest import tiny
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from stock_models import config_of
from test_experts import apart
from torch import Tensor

from dllm_memdlm.backbones import load_adapter, with_lora
from dllm_memdlm.backbones.expert_names import split_names
from dllm_memdlm.backbones.lora import ExpertLora
from dllm_memdlm.config import ConfigError, LoraConfig


def stock(folder: Path | None = None, kind: str = "llada_moe", **settings: object) -> peft.PeftModel:
    """An adapter of PEFT's own classes on a model with a module an expert, saved if a folder is given."""
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["up_proj"], "init_lora_weights": False, **settings})
    model = peft.get_peft_model(apart(kind, tiny(kind)), config)
    if folder is not None:
        model.save_pretrained(folder)
    return model


def lora_of(model: peft.PeftModel) -> dict[str, Tensor]:
    return {name: value for name, value in split_names(model.state_dict()).items() if "lora_" in name}


@pytest.mark.parametrize("kind", ["llada_moe", "llada2"])
def test_an_adapter_is_stock_in_files(kind, tmp_path):
    """Ours on a model with a module an expert, in PEFT's own classes; and one of theirs here, to train or to decode."""
    model = tiny(kind, lora=True)
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(apart(kind, tiny(kind)), tmp_path / "ours", is_trainable=True)
    assert theirs.state_dict().keys() == split_names(model.state_dict()).keys()
    assert all(torch.equal(value, lora_of(model)[name]) for name, value in lora_of(theirs).items())
    for parameter in (p for p in theirs.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    to_train = LoraConfig(r=4, alpha=8, dropout=0.0, path=str(tmp_path / "theirs"))
    for trains, loaded in (
        (True, with_lora(tiny(kind), to_train)),
        (False, load_adapter(tiny(kind), str(tmp_path / "theirs"))),
    ):
        assert all(torch.equal(value, lora_of(theirs)[name]) for name, value in lora_of(loaded).items())
        experts = [module for module in loaded.modules() if isinstance(module, ExpertLora)]
        assert len(experts) == 6 and {p.requires_grad for m in experts for p in m.lora_A.parameters()} == {trains}


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
    expected = stock(tmp_path / "theirs", target_modules=targets).state_dict().keys()
    theirs = load_adapter(tiny("llada_moe"), str(tmp_path / "theirs"))
    ours = with_lora(tiny("llada_moe"), LoraConfig(r=2, alpha=8, target_modules=targets))
    for model, name in ((theirs, "again"), (ours, "ours")):
        assert split_names(model.state_dict()).keys() == expected
        model.save_pretrained(tmp_path / name)
        words = config_of(tmp_path / name)["target_modules"]
        assert words == targets if isinstance(targets, str) else sorted(words) == sorted(targets)


@pytest.mark.parametrize("targets", [r".*\.experts\.[0-3]\.up_proj", ("experts.4.up_proj",)])
def test_targets_among_the_experts_of_a_layer_are_refused(targets):
    with pytest.raises(ConfigError, match=r"means some experts of model\.layers\.1\.mlp\.experts\.up_proj") as error:
        with_lora(tiny("llada_moe"), LoraConfig(r=2, alpha=4, target_modules=targets))
    assert str(error.value).startswith(f"lora.target_modules={targets!r}: ")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora=True: expected false for routed experts"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora': expected true, false or 'gaussian'"),
        ({"alpha_pattern": {"experts.3.up_proj": 30}}, r".*differs between experts of model\.layers\.1\.mlp\.experts"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(settings, words, tmp_path):
    stock(tmp_path, **settings)
    with pytest.raises(ConfigError, match=r"^adapter=.*: no adapter for this model \(" + words):
        load_adapter(tiny("llada_moe"), str(tmp_path))


def test_a_new_lora_is_drawn_as_pefts():
    """A uniform within 1/√in, for each expert its own; B zero."""
    model = with_lora(tiny("llada2", hidden_size=64), LoraConfig(r=8, alpha=8))
    up = next(m for m in model.modules() if isinstance(m, ExpertLora))
    down, zeros = up.lora_A["default"].weight, up.lora_B["default"].weight
    assert down.shape == (6, 8, 64) and not zeros.any() and not torch.equal(down[0], down[1])
    assert 0.95 / 8 < down.abs().max() <= 1 / 8 and down.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("pattern", [r"experts\.\d+\.up_proj", "up_proj", "mlp.experts.{}.up_proj"])
def test_ranks_and_alphas_of_their_own(pattern, tmp_path):
    keys = [pattern.format(number) for number in range(5)] if "{}" in pattern else [pattern]
    patterns = {"rank_pattern": dict.fromkeys(keys, 3), "alpha_pattern": dict.fromkeys(keys, 30)}
    theirs = stock(tmp_path, lora_alpha=4, target_modules=["up_proj", "down_proj"], **patterns)
    ours = load_adapter(tiny("llada_moe"), str(tmp_path))
    path = "base_model.model.model.layers.1.mlp.experts"
    for name, scaling in (("up_proj", 10.0), ("down_proj", 2.0)):
        for layer in (ours.get_submodule(f"{path}.{name}"), theirs.get_submodule(f"{path}.3.{name}")):
            assert layer.scaling == {"default": scaling}
    ours.save_pretrained(tmp_path / "again")
    saved = config_of(tmp_path / "again")
    assert {name: saved[name] for name in patterns} == patterns


def test_the_first_pattern_that_fits_counts(tmp_path):
    """Also where a layer before it fits another one, as the dense ones do."""
    patterns = {r"experts\.\d+\.up_proj": 3, "up_proj": 5}
    stock(tmp_path, target_modules=["up_proj"], rank_pattern=patterns)
    ours = load_adapter(tiny("llada_moe"), str(tmp_path))
    ranks = {path: layer.r["default"] for path, layer in ours.named_modules() if isinstance(layer, LoraLayer)}
    assert set(ranks.values()) == {3, 5}
    assert all(rank == (3 if ".experts." in path else 5) for path, rank in ranks.items())


def test_a_second_adapter(tmp_path):
    stock(tmp_path / "theirs", r=3, target_modules=r".*\.experts\.\d+\.up_proj")
    model = tiny("llada_moe", lora=True)
    model.save_pretrained(tmp_path / "alone")
    found = model.load_adapter(str(tmp_path / "theirs"), "second")
    assert not found.unexpected_keys and not found.missing_keys
    model.save_pretrained(tmp_path / "both")
    for before, after in (("theirs", "both/second"), ("alone", "both")):
        expected, saved = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in (before, after))
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], value) for name, value in expected.items())
    with pytest.raises(ValueError, match="safe_serialization"):
        model.save_pretrained(tmp_path / "bin", safe_serialization=False)


def test_pefts_own_way_of_loading_says_which_to_take(tmp_path):
    """It finds no layer where targets are patterns of a module an expert."""
    stock(tmp_path, target_modules=r".*\.experts\.\d+\.up_proj|.*q_proj")
    with pytest.raises(ValueError, match=r"use backbones\.load_adapter"):
        peft.PeftModel.from_pretrained(tiny("llada_moe"), tmp_path)
