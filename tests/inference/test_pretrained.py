"""Trained models as they were saved: whole ones, adapters with and without a base named, and what is refused.

The other refusals: helpers/bad_inference.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import stock_models
import torch
from conftest import make_tokenizer, tiny
from data_files import message_of
from safetensors.torch import load_file, save_file
from saved_models import prompt_memory, random_prompts, save_adapter, save_model, save_pair, save_recipe
from steps import memory_for
from torch import Tensor

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.inference.pretrained import Pretrained, load_pretrained

KIND = "llada_moe"
FOUR = {"num_hidden_layers": 4, "moe_layer_freq": [0, 1, 1, 1]}
MEMORY = {"rank": 4, "alpha": 8.0, "inner_lr": 0.5, "layer_fraction": 0.4, "weighting": "scheduler"}
MEMORY |= {"target_modules": ["up_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("base"), KIND)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> str:
    recipe = {"memory": MEMORY, "training": {"right_shift_logits": True}}
    return save_adapter(tmp_path_factory.mktemp("adapter"), base, tiny(KIND), recipe)


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a saved folder, to change."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


def logits(pretrained: Pretrained) -> Tensor:
    """Of a model of which nothing is trainable and no part in training mode."""
    assert not any(parameter.requires_grad for parameter in pretrained.model.parameters())
    assert not any(module.training for module in pretrained.model.modules())
    return stock_models.logits(pretrained.model)


def test_a_full_model(base):
    loaded = load_pretrained(base)
    torch.testing.assert_close(logits(loaded), stock_models.logits(tiny(KIND)))
    assert loaded.name == base and loaded.memory == MemoryConfig() and loaded.right_shift_logits is False
    assert loaded.tokenizer.mask_token == "<mask>" and loaded.tokenizer.eot_token_id == loaded.tokenizer.eos_token_id


def test_an_adapter_alone_brings_its_base(base, adapter):
    alone, named = load_pretrained(adapter), load_pretrained(base, adapter)
    assert isinstance(alone.model, peft.PeftModel) and alone.name == named.name == adapter
    assert torch.equal(logits(alone), logits(named))
    assert (logits(alone) - logits(load_pretrained(base))).abs().max() > 0.1
    assert alone.tokenizer.get_vocab() == load_pretrained(base).tokenizer.get_vocab(), "the base's, as it has none"
    for loaded in (alone, named):  # the recipe beside the adapter
        assert loaded.memory == MemoryConfig(**{**MEMORY, "target_modules": ("up_proj",)})
        assert loaded.right_shift_logits is True


def test_an_adapter_is_for_the_base_that_is_named(adapter, tmp_path):
    """Not for the one in its config, where both are given."""
    other = save_model(tmp_path / "other", KIND)
    weights = load_file(f"{other}/model.safetensors")
    weights["lm_head.weight"] = torch.zeros_like(weights["lm_head.weight"])
    save_file(weights, f"{other}/model.safetensors", {"format": "pt"})
    assert not logits(load_pretrained(other, adapter)).any() and logits(load_pretrained(adapter)).any()


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("kind", ["llada_moe", "llada2"])
def test_experts_under_an_adapter_compute_in_the_bases_dtype(kind, load_in_4bit, products, tmp_path):
    """In a forward pass and in the inner loop on a prompt, though PEFT loads the adapter in float32."""
    base, adapter = save_pair(tmp_path, kind, torch.bfloat16, r=8)
    loaded = load_pretrained(base, adapter, load_in_4bit=load_in_4bit)
    lora = {name: p.dtype for name, p in loaded.model.named_parameters() if "lora_" in name}
    assert {dtype for name, dtype in lora.items() if ".experts." not in name} == {torch.float32}
    texts = random_prompts(200)
    with prompt_memory(loaded.model, memory_for(kind, rank=8)).recalled(texts):
        logits = loaded.model(input_ids=torch.tensor(texts)).logits
    assert logits.dtype == torch.bfloat16 and products == {torch.bfloat16}


def test_tokenizer_and_recipe_are_the_adapters_or_else_the_bases_and_the_argument_comes_before(
    base, adapter, copy_of, tmp_path
):
    folder, third = copy_of(adapter), str(tmp_path / "third")
    make_tokenizer(bos_token="w9", mask_token="<mask>").save_pretrained(folder)
    make_tokenizer(bos_token="w8", mask_token="<mask>").save_pretrained(third)
    assert load_pretrained(str(folder)).tokenizer.bos_token == "w9"
    assert load_pretrained(str(folder), tokenizer=third).tokenizer.bos_token == "w8"
    other = Path(shutil.copytree(base, tmp_path / "base"))
    save_recipe(other, {"memory": {"rank": 5}})
    assert load_pretrained(save_adapter(tmp_path / "without", str(other), tiny(KIND))).memory.rank == 5


def test_recipes_with_empty_sections_and_of_before_layers_were_always_the_last(base, copy_of):
    folder = copy_of(base)
    spelt = "memory: {rank: 4}\ndata: {template: {price: '${price}'}}"  # a text, as nothing is left to resolve
    recipes = {"": 32, "memory:\ntraining:": 32, "memory: {rank: 3, layers: last}": 3, spelt: 4}
    for recipe, rank in recipes.items():
        (folder / "recipe.yaml").write_text(recipe)
        assert load_pretrained(str(folder)).memory.rank == rank


def test_an_adapter_of_too_few_or_too_many_experts(base, adapter, copy_of):
    folder = copy_of(adapter)
    path = folder / "adapter_model.safetensors"
    saved = load_file(path)
    name = next(name for name in saved if ".experts.2." in name)
    fewer, more = {n: v for n, v in saved.items() if n != name}, name.replace(".experts.2.", ".experts.9.")
    for weights, odd, holder in ((fewer, name, "model"), (saved | {more: saved[name].clone()}, more, "adapter")):
        save_file(weights, path, {"format": "pt"})
        message = message_of(load_pretrained, base, str(folder))
        assert message == f"adapter='{folder}': made for another model; {odd} is in the {holder} only"


def test_the_dtype_is_the_checkpoints_or_the_one_asked_for(tmp_path):
    folder = save_model(tmp_path, "llama", dtype=torch.float16)
    assert {p.dtype for p in load_pretrained(folder).model.parameters()} == {torch.float16}
    assert {p.dtype for p in load_pretrained(folder, dtype="float32").model.parameters()} == {torch.float32}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": None}))
    assert {p.dtype for p in load_pretrained(folder).model.parameters()} == {torch.float32}


def test_an_adapter_of_another_model(base, adapter, tmp_path):
    """It would be as if there were none for the layers that it does not know; so would one of a deeper model."""
    for kind, dimensions in (("llada_moe", {"hidden_size": 64}), ("llada_moe", FOUR), ("llada2", {}), ("llama", {})):
        other = save_model(tmp_path / f"{kind}{len(dimensions)}", kind, **dimensions)
        assert message_of(load_pretrained, other, adapter).startswith(f"adapter='{adapter}': ")
    deeper = save_adapter(tmp_path / "deeper", base, tiny(KIND, **FOUR))
    assert message_of(load_pretrained, base, deeper).startswith(f"adapter='{deeper}': ")


def test_what_it_refuses_goes_by_the_names_of_the_arguments(base, tmp_path):
    make_tokenizer(bos_token="<bos>").save_pretrained(tmp_path)
    said = message_of(load_pretrained, base, None, str(tmp_path))
    assert said.startswith(f"tokenizer='{tmp_path}': declares no mask token") and said.endswith("set tokenizer to it")
