"""Adapters between libraries: ours in stock PEFT, and those of others in ours."""

from __future__ import annotations

import itertools
import shutil
import sys
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import transformers
from conftest import make_tokenizer, tiny
from data_files import message_of
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from saved_models import BYTES, byte_tokenizer, save_adapter, save_model, train_adapter
from stock_models import (
    bidirectional_logits,
    config_of,
    dllms_model,
    edit,
    logits,
    save_peft,
    save_stock,
    stock_decoder,
    stock_llama,
)
from torch import nn

from dllm_memdlm.backbones import with_lora
from dllm_memdlm.config import LoraConfig
from dllm_memdlm.inference.pretrained import load_pretrained

pytestmark = pytest.mark.usefixtures("as_from_a_shell")
MODULES = {
    "llada_moe": "dllm.pipelines.llada.models.modeling_lladamoe",
    "llada2": "dllm.pipelines.llada21.models.modeling_llada21_moe",
    "llada": "dllm.pipelines.llada.models.modeling_llada",
    "modernbert": "transformers.models.modernbert.modeling_modernbert",
}


def trained(folder: Path, model: nn.Module) -> tuple[str, str]:
    """A base and the adapter of a run on it."""
    base = save_stock(folder / "base", model, byte_tokenizer())
    return base, train_adapter(folder, base)


def test_a_runs_adapter_on_a_stock_decoder(tmp_path, monkeypatch):
    """And where this package cannot be imported. A Qwen2 has layers with and without biases."""
    name = "Qwen2ForCausalLM"
    base, folder = trained(tmp_path, stock_decoder(name, BYTES))
    ours = logits(load_pretrained(folder).model)
    stock = peft.PeftModel.from_pretrained(getattr(transformers, name).from_pretrained(base), folder)
    torch.testing.assert_close(bidirectional_logits(stock), ours, atol=1e-5, rtol=1e-5)
    assert (ours - logits(load_pretrained(base).model)).abs().max() > 0.01, "it has been trained"
    config = config_of(folder)
    assert config["auto_mapping"] == {"base_model_class": name, "parent_library": "transformers"}
    assert (config["task_type"], config["base_model_name_or_path"], config["peft_type"]) == (None, base, "LORA")
    assert "lm_head" not in config["target_modules"] and "down_proj" in config["target_modules"]
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (4, 8, None)
    for module in [name for name in sys.modules if name.partition(".")[0] == "dllm_memdlm"]:
        monkeypatch.setitem(sys.modules, module, None)
    for loader in (peft.AutoPeftModel, peft.AutoPeftModelForCausalLM):
        torch.testing.assert_close(bidirectional_logits(loader.from_pretrained(folder)), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.dllm
@pytest.mark.parametrize("kind", MODULES)
def test_a_runs_adapter_on_dllms_model(kind, tmp_path):
    base, folder = trained(tmp_path, dllms_model(kind, vocab_size=BYTES))
    theirs = type(dllms_model(kind))
    stock = peft.PeftModel.from_pretrained(theirs.from_pretrained(base), folder)
    torch.testing.assert_close(logits(stock), logits(load_pretrained(folder).model), atol=1e-4, rtol=1e-4)
    mapping = config_of(folder)["auto_mapping"]
    assert mapping == {"base_model_class": theirs.__name__, "parent_library": theirs.__module__}
    assert torch.equal(logits(peft.AutoPeftModel.from_pretrained(folder)), logits(stock))


@pytest.mark.parametrize("kind", MODULES)
def test_no_config_of_an_adapter_names_this_package(kind, tmp_path):
    folder = save_adapter(tmp_path / "adapter", save_model(tmp_path / "base", kind), tiny(kind))
    name = type(tiny(kind)).__name__
    assert config_of(folder)["auto_mapping"] == {"base_model_class": name, "parent_library": MODULES[kind]}


def test_all_linear_layers_of_llada_are_those_of_its_blocks(tmp_path):
    """`ff_out` is the output layer, too. A run goes on from the adapter, and finds it on the same layers."""
    names = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    expected = {f"model.transformer.blocks.{layer}.{name}" for layer in range(3) for name in names}
    base = save_model(tmp_path / "base", "llada")
    folder = save_adapter(tmp_path / "adapter", base, tiny("llada"))
    again = with_lora(tiny("llada"), LoraConfig(r=4, alpha=8, path=folder))
    for model in (tiny("llada", lora=True), again):
        found = {path for path, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
        assert found == expected
    named = with_lora(tiny("llada"), LoraConfig(target_modules=["q_proj", "ff_out"]))
    found = {path for path, m in named.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert found == {path for path in expected if path.endswith(("q_proj", "ff_out"))}
    assert config_of(folder)["exclude_modules"] == ["model.transformer.ff_out"]
    assert config_of(save_adapter(tmp_path / "llama", base, tiny("llama")))["exclude_modules"] is None


@pytest.mark.dllm
@pytest.mark.parametrize(
    ("kind", "saved_whole"),
    [*itertools.product(["llada_moe", "llada2"], [None, ["embed_tokens", "lm_head"]]), ("llada", None)],
    ids=str,
)
def test_an_adapter_as_the_papers_code_saves_it(kind, saved_whole, tmp_path):
    """`load_peft` of dllm: all-linear, on every expert, and on LLaDA-MoE's router, which is a linear layer."""
    if kind == "llada2" and saved_whole is not None:
        saved_whole = [{"embed_tokens": "word_embeddings"}.get(name, name) for name in saved_whole]
    base = save_stock(tmp_path / "base", dllms_model(kind))
    model = type(dllms_model(kind)).from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": "all-linear"}
    config = peft.LoraConfig(modules_to_save=saved_whole, **settings)
    expected = logits(save_peft(tmp_path / "adapter", model, config))
    edit(tmp_path / "adapter", base_model_name_or_path="/home/authors/checkpoints/base")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert any(".mlp.gate.lora_A" in name for name in names) == (kind == "llada_moe")
    assert sum("lora_" not in name for name in names) == len(saved_whole or [])
    for merge in (False, True):
        ours = load_pretrained(base, str(tmp_path / "adapter"), merge_adapter=merge)
        torch.testing.assert_close(logits(ours.model), expected, atol=1e-4, rtol=1e-4)
    assert (expected - logits(load_pretrained(base).model)).abs().max() > 0.1


ADAPTERS = {
    "for a task": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"]),
    "DoRA": peft.LoraConfig(use_dora=True, target_modules="all-linear"),
    "rank-stabilised": peft.LoraConfig(r=3, use_rslora=True, target_modules="all-linear"),
    "a rank for each layer": peft.LoraConfig(target_modules=["q_proj", "o_proj"], rank_pattern={"q_proj": 2}),
    "on the embeddings": peft.LoraConfig(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "IA3": peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:.*tie_word_embeddings.*:UserWarning")
def test_adapters_of_other_kinds(tied, tmp_path):
    """Merged, too: where input and output embeddings share a weight, the sum is only for the one it was made for.

    Settings of a later PEFT are passed over.
    """
    base = save_stock(tmp_path / "base", stock_decoder("LlamaForCausalLM", tie_word_embeddings=tied))
    bare = logits(load_pretrained(base).model)
    for what, config in ADAPTERS.items():
        folder = tmp_path / what
        expected = bidirectional_logits(save_peft(folder, stock_llama(base), config))
        edit(folder, a_later_setting=None, peft_version="0.99.0")
        for merge in (False, True):
            ours = load_pretrained(base, str(folder), merge_adapter=merge)
            torch.testing.assert_close(logits(ours.model), expected, atol=1e-4, rtol=1e-4)
        assert (expected - bare).abs().max() > 0.05, what


def test_weights_for_which_the_model_has_no_place_are_refused(tmp_path):
    """PEFT would leave them out without a word. Other refusals: helpers/bad_inference.py."""
    base, adapter = save_stock(tmp_path / "base", stock_decoder("LlamaForCausalLM")), tmp_path / "adapter"
    save_peft(adapter, stock_llama(base), peft.LoraConfig(target_modules=["q_proj"]))
    path, more = adapter / "adapter_model.safetensors", {"base_model.model.lm_head.mem_inner_A": torch.zeros(2, 2)}
    save_file({**load_file(path), **more}, path, {"format": "pt"})
    message = message_of(load_pretrained, base, str(adapter))
    assert message.startswith(f"adapter='{adapter}': made for another model; {next(iter(more))} is in")


def test_a_published_adapter_is_loaded_by_its_name(tmp_path, monkeypatch):
    """With its own tokenizer and recipe, as downloading a repository leaves it in the cache."""
    base = save_model(tmp_path / "base", "llada_moe", tokenizer=make_tokenizer())
    folder = save_adapter(tmp_path / "adapter", base, tiny("llada_moe"), {"memory": {"rank": 5}})
    make_tokenizer(bos_token="w9", mask_token="<mask>").save_pretrained(folder)
    repository, commit = tmp_path / "hub" / "models--somebody--adapter", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit, ignore=shutil.ignore_patterns("checkpoint-*"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    expected = logits(load_pretrained(folder).model)
    for names in (("somebody/adapter",), (base, "somebody/adapter")):
        loaded = load_pretrained(*names)
        assert torch.equal(logits(loaded.model), expected) and loaded.name == "somebody/adapter"
        assert (loaded.memory.rank, loaded.tokenizer.bos_token) == (5, "w9")
