"""Plain checkpoints: the adapter is in the weights, in ours, in dllm's classes and in stock transformers.

What `memdlm export` refuses: helpers/bad_inference.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import make_tokenizer
from saved_models import BYTES, byte_tokenizer, save_model, save_pair, save_recipe, train_adapter, weights_of
from stock_models import bidirectional_logits, dllms_model, logits, save_peft, save_stock, stock_decoder, stock_llama
from torch import Tensor

from dllm_memdlm import export as command
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.inference.plain_checkpoint import export
from dllm_memdlm.inference.pretrained import load_pretrained

pytestmark = pytest.mark.usefixtures("as_from_a_shell")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[str, str]:
    return save_pair(tmp_path_factory.mktemp("llama"), "llama")


def loaded_logits(folder: str | Path) -> Tensor:
    return logits(load_pretrained(str(folder)).model)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def sums(base: str, adapter: str) -> dict[str, Tensor]:
    """W + (alpha / r)·B·A of every adapted layer, and the other weights, in float32 by hand."""
    expected = {name: tensor.float() for name, tensor in weights_of(base).items()}
    lora = {name.removeprefix("base_model.model."): tensor for name, tensor in weights_of(adapter).items()}
    for name in [name for name in lora if name.endswith("lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        expected[f"{layer}.weight"] += 8 / 4 * lora[f"{layer}.lora_B.weight"].float() @ lora[name].float()
    return expected


@pytest.mark.parametrize(
    ("kind", "own", "wanted"),
    [
        *(("llada_moe", "float32", "auto"), ("llada2", "bfloat16", "auto"), ("llama", "bfloat16", "float32")),
        *(("llama", "float32", "bfloat16"), ("llama", "float32", "float16")),
    ],
)
def test_the_adapter_is_added_to_the_weights_in_float32_and_rounded_once(kind, own, wanted, tmp_path):
    base, adapter = save_pair(tmp_path, kind, getattr(torch, own))
    out = export(adapter, tmp_path / "out", dtype=wanted)
    name = own if wanted == "auto" else wanted
    merged, expected, dtype = weights_of(out), sums(base, adapter), getattr(torch, name)
    assert merged.keys() == expected.keys() and json.loads((out / "config.json").read_text())["dtype"] == name
    for layer, tensor in merged.items():
        assert tensor.dtype == dtype, layer
        torch.testing.assert_close(tensor, expected[layer].to(dtype), atol=1e-6, rtol=torch.finfo(dtype).eps, msg=layer)
        # Another order of the products may tip a rounding; sums in the lower precision would tip a good share.
        assert name == "float32" or (tensor != expected[layer].to(dtype)).float().mean() < 1e-3, layer
    if own == name == "float32":
        assert not isinstance(load_pretrained(str(out)).model, peft.PeftModel)
        assert_close(loaded_logits(out), loaded_logits(adapter))
        assert (loaded_logits(out) - loaded_logits(base)).abs().max() > 0.1
        assert torch.equal(loaded_logits(export(base, tmp_path / "named", adapter)), loaded_logits(out))


def test_the_folder_is_complete(tmp_path):
    """With settings of generation that transformers reads, and would refuse to write."""
    base, adapter = save_pair(tmp_path, "llada2")
    (Path(base) / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": false, "max_new_tokens": 7}')
    tokenizer = make_tokenizer(bos_token="w9", mask_token="<mask>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(adapter)
    (Path(adapter) / "checkpoint-2").mkdir()
    (tmp_path / "out").mkdir()
    out = export(adapter, tmp_path / "out")
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "README.md"} <= names
    assert "chat_template.jinja" in names and not [name for name in names if "adapter" in name or "checkpoint" in name]
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 7
    loaded = load_pretrained(str(out))
    assert (loaded.tokenizer.bos_token, loaded.tokenizer.mask_token) == ("w9", "<mask>")
    assert loaded.memory == MemoryConfig(rank=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"], "nothing else is left"


def test_a_model_without_an_adapter_is_converted(tmp_path, capsys):
    base, out = save_model(tmp_path / "base", "llada_moe", recipe={"memory": {"rank": 6}}), tmp_path / "out"
    assert command.main(["--model", base, "--out", str(out), "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == f"saved to {out}\n"
    found, expected = weights_of(out), weights_of(base)
    assert found.keys() == expected.keys() and load_pretrained(str(out)).memory.rank == 6
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in found.items())
    parts = export(base, tmp_path / "parts", shard_size="20KB")
    assert len(set(json.loads((parts / "model.safetensors.index.json").read_text())["weight_map"].values())) > 2
    assert torch.equal(loaded_logits(parts), loaded_logits(base))


def test_a_base_that_names_no_architecture_is_the_one_of_the_recipe(tmp_path):
    """As it was trained, so it is loaded and exported; the folder that is written names it."""
    base = save_model(tmp_path / "base", "llada_moe", byte_tokenizer())
    config = json.loads((Path(base) / "config.json").read_text())
    (name,) = config.pop("architectures")
    (Path(base) / "config.json").write_text(json.dumps(config))
    adapter = train_adapter(tmp_path, base, f"model.architecture={name}", "training.max_steps=1")
    out = export(adapter, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["architectures"] == [name]
    assert_close(loaded_logits(out), loaded_logits(adapter))


def test_stock_transformers_loads_what_a_run_trained(tmp_path):
    base = save_stock(tmp_path / "base", stock_decoder("Qwen3ForCausalLM", BYTES), byte_tokenizer())
    adapter = train_adapter(tmp_path, base)
    out = export(adapter, tmp_path / "out")
    stock = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(stock) is transformers.Qwen3ForCausalLM
    assert_close(bidirectional_logits(stock), loaded_logits(adapter))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.mask_token == "<|mask|>" and tokenizer.chat_template


@pytest.mark.dllm
@pytest.mark.parametrize("kind", ["llada_moe", "llada2", "llada", "modernbert", "qwen3"])
def test_dllm_loads_it(kind, tmp_path):
    """By its own loader, which goes by `model_type`, and by its class; nothing edited by hand.

    A decoder that dllm converted stays one: under transformers' name it would be loaded as a causal model.
    """
    import dllm
    from dllm.pipelines.a2d import A2DQwen3Config, A2DQwen3LMHeadModel

    if kind == "qwen3":
        model = A2DQwen3LMHeadModel(A2DQwen3Config(**stock_decoder("Qwen3ForCausalLM", BYTES).config.to_dict()))
    else:
        model = dllms_model(kind, vocab_size=BYTES)
    adapter = train_adapter(tmp_path, save_stock(tmp_path / "base", model, byte_tokenizer()))
    out = export(adapter, tmp_path / "out")
    if kind == "qwen3":
        found = [transformers.AutoModelForMaskedLM.from_pretrained(out)]
    else:
        arguments = dllm.utils.ModelArguments(model_name_or_path=str(out), dtype="float32")
        found = [dllm.utils.get_model(arguments), type(model).from_pretrained(out)]
    for loaded in found:
        assert type(loaded) is type(model)
        assert_close(logits(loaded), loaded_logits(adapter))
    assert_close(loaded_logits(out), loaded_logits(adapter))


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules=["q_proj", "lm_head"]),
        peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]),
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        peft.LoraConfig(target_modules=["q_proj"]),
    ],
    ids=["output", "input", "whole", "neither"],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:.*tie_word_embeddings.*:UserWarning")
def test_an_adapter_on_one_of_two_tied_embeddings(config, tmp_path):
    base = save_stock(tmp_path / "base", stock_decoder("LlamaForCausalLM", tie_word_embeddings=True))
    expected = bidirectional_logits(save_peft(tmp_path / "adapter", stock_llama(base), config))
    out = export(base, tmp_path / "out", str(tmp_path / "adapter"))
    assert_close(loaded_logits(out), expected)
    assert_close(bidirectional_logits(stock_llama(str(out))), expected)
    apart = config.modules_to_save or {"lm_head", "embed_tokens"} & set(config.target_modules)
    assert ("lm_head.weight" in weights_of(out)) == bool(apart)


def test_what_lies_beside_an_adapter_does_not_make_it_another(llama, tmp_path):
    """The config of its base, which other trainers write there; and a recipe that loads the base in 4 bit."""
    adapter = shutil.copytree(llama[1], tmp_path / "adapter")
    shutil.copy(f"{llama[0]}/config.json", adapter)
    save_recipe(adapter, {"model": {"path": llama[0], "load_in_4bit": True}})
    out, expected = export(str(adapter), tmp_path / "out"), weights_of(export(llama[1], tmp_path / "expected"))
    found = weights_of(out)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert "was trained on the same weights in 4 bit" in (out / "README.md").read_text()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_a_refusal_leaves_everything_as_it_was(llama, tmp_path):
    """The last thing to be written cannot be: a state of the trainer that is broken. Nor is a file overwritten."""
    adapter = shutil.copytree(llama[1], tmp_path / "adapter")
    (adapter / "trainer_state.json").write_text("{")
    with pytest.raises(ConfigError, match=r"trainer_state\.json: not the state"):
        export(str(adapter), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".hidden").write_text("mine")
    with pytest.raises(ConfigError, match="not empty; expected a folder that is empty"):
        export(llama[1], tmp_path / "out")
    assert (tmp_path / "out" / ".hidden").read_text() == "mine"
