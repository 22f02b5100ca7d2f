"""Trained models as they were saved: whole ones, adapters with and without a base named, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import make_tokenizer, tiny
from safetensors.torch import load_file, save_file
from saved_models import prompt_memory, random_prompts, save_adapter, save_model, save_pair, save_recipe
from steps import memory_for
from torch import Tensor

from dllm_memdlm.config import ConfigError, DataConfig, MemoryConfig, ModelConfig
from dllm_memdlm.inference.pretrained import Pretrained, load_pretrained
from dllm_memdlm.training.recipe import build_recipe

KIND = "llada_moe"
FOUR = {"num_hidden_layers": 4, "moe_layer_freq": [0, 1, 1, 1]}
MEMORY = {"rank": 4, "alpha": 8.0, "inner_lr": 0.5, "layer_fraction": 0.4, "weighting": "scheduler"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("base"), KIND)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> str:
    recipe = {"memory": MEMORY, "training": {"right_shift_logits": True}}
    return save_adapter(tmp_path_factory.mktemp("adapter"), base, tiny(KIND), recipe)


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a saved folder, to damage."""

    def copy(folder: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copy


def tokens() -> Tensor:
    return torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(pretrained: Pretrained) -> Tensor:
    with torch.no_grad():
        return pretrained.model(input_ids=tokens()).logits


def message(*args: Any, **arguments: Any) -> str:
    """What is said, in one line, of arguments that do not fit."""
    with pytest.raises(ConfigError) as error:
        load_pretrained(*args, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# === what is loaded ===


def test_a_full_model(base):
    loaded = load_pretrained(base)
    torch.testing.assert_close(logits(loaded), tiny(KIND).eval()(input_ids=tokens()).logits)
    assert loaded.name == base and loaded.memory == MemoryConfig() and loaded.right_shift_logits is False
    assert loaded.tokenizer.mask_token == "<mask>" and loaded.tokenizer.eot_token_id == loaded.tokenizer.eos_token_id


def test_nothing_of_it_is_trainable_and_its_mode_is_eval(base, adapter):
    for arguments in ({"pretrained": base}, {"pretrained": adapter}, {"pretrained": adapter, "merge_adapter": True}):
        model = load_pretrained(**arguments).model
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module.training for module in model.modules())


def test_an_adapter_alone_brings_its_base(base, adapter):
    alone, named = load_pretrained(adapter), load_pretrained(base, adapter)
    assert isinstance(alone.model, peft.PeftModel) and alone.name == named.name == adapter
    assert torch.equal(logits(alone), logits(named))
    assert (logits(alone) - logits(load_pretrained(base))).abs().max() > 0.1
    assert alone.tokenizer.get_vocab() == load_pretrained(base).tokenizer.get_vocab(), "the base's, as it has none"


def test_an_adapter_is_for_the_base_that_is_named(adapter, tmp_path):
    """Not for the one in its config, where both are given."""
    other = save_model(tmp_path / "other", KIND)
    weights = load_file(f"{other}/model.safetensors")
    weights["lm_head.weight"] = torch.zeros_like(weights["lm_head.weight"])
    save_file(weights, f"{other}/model.safetensors", {"format": "pt"})
    assert not logits(load_pretrained(other, adapter)).any() and logits(load_pretrained(adapter)).any()


def test_a_merged_adapter_gives_nearly_the_same(adapter):
    beside, merged = load_pretrained(adapter), load_pretrained(adapter, merge_adapter=True)
    torch.testing.assert_close(logits(merged), logits(beside), atol=1e-4, rtol=1e-4)
    assert not isinstance(merged.model, peft.PeftModel)
    assert not [name for name, _ in merged.model.named_modules() if "lora" in name]


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


def test_the_adapters_tokenizer_comes_first_and_the_argument_before_it(adapter, copy_of, tmp_path):
    folder = copy_of(adapter)
    make_tokenizer(bos_token="w9", mask_token="<mask>").save_pretrained(folder)
    make_tokenizer(bos_token="w8", mask_token="<mask>").save_pretrained(tmp_path / "third")
    assert load_pretrained(str(folder)).tokenizer.bos_token == "w9"
    assert load_pretrained(str(folder), tokenizer=str(tmp_path / "third")).tokenizer.bos_token == "w8"


def test_the_recipe_beside_the_weights_says_how_they_were_trained(base, adapter):
    loaded = load_pretrained(adapter)
    assert loaded.memory == MemoryConfig(**MEMORY) and loaded.right_shift_logits is True
    assert load_pretrained(base, adapter).memory == MemoryConfig(**MEMORY)


def test_the_bases_recipe_serves_where_the_adapter_has_none(copy_of, base, tmp_path):
    folder = copy_of(base)
    save_recipe(folder, {"memory": {"rank": 5}})
    adapter = save_adapter(tmp_path / "adapter", str(folder), tiny(KIND))
    assert load_pretrained(adapter).memory.rank == 5


def test_a_recipe_as_a_run_writes_it(copy_of, base):
    folder = copy_of(base)
    training = {"output_dir": str(folder), "bf16": False, "right_shift_logits": True}
    recipe = build_recipe(
        {
            "model": vars(ModelConfig(architecture="LLaDAMoEModelLM")),
            "data": vars(DataConfig(dataset="rows.jsonl")),
            "memory": {**MEMORY, "target_modules": ["up_proj"]},
            "training": training,
        }
    )
    recipe.save(folder)
    loaded = load_pretrained(str(folder))
    assert loaded.memory == recipe.memory and loaded.memory.target_modules == ("up_proj",)
    assert loaded.right_shift_logits is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_the_checkpoints_or_the_one_asked_for(dtype, tmp_path):
    folder = save_model(tmp_path, "llama", dtype=dtype)
    assert {p.dtype for p in load_pretrained(folder).model.parameters()} == {dtype}
    assert {p.dtype for p in load_pretrained(folder, dtype="float32").model.parameters()} == {torch.float32}


def test_a_checkpoint_that_names_no_dtype_is_float32(copy_of, base):
    folder = copy_of(base)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("dtype") == "float32"
    (folder / "config.json").write_text(json.dumps(config))
    assert load_pretrained(str(folder)).model.lm_head.weight.dtype == torch.float32


# === what is refused ===


def test_no_such_model(tmp_path):
    assert message("/no/such") == "pretrained='/no/such': no such folder"
    assert message("nobody/nothing").startswith("pretrained='nobody/nothing': no such folder, and no local copy or net")
    assert message(str(tmp_path)) == f"pretrained='{tmp_path}': a folder without a readable config.json"


def test_no_weights(copy_of, base):
    folder = copy_of(base)
    (folder / "model.safetensors").unlink()
    assert message(str(folder)).startswith(f"pretrained='{folder}': no weights (")


def test_no_tokenizer(copy_of, base):
    folder = copy_of(base)
    for path in folder.glob("*token*"):
        path.unlink()
    expected = f"tokenizer='{folder}': the folder has no tokenizer files (tokenizer.json and its config)"
    assert message(str(folder)) == expected
    assert load_pretrained(str(folder), tokenizer=base).tokenizer.mask_token == "<mask>"
    assert message(base, tokenizer="/no/such").startswith("tokenizer='/no/such': no such folder; expected ")


def test_no_mask_token(base, tmp_path):
    make_tokenizer(bos_token="<bos>").save_pretrained(tmp_path)
    assert message(base, tokenizer=str(tmp_path)).startswith(f"tokenizer='{tmp_path}': declares no mask token")


def test_values_that_no_argument_takes(base):
    assert message(base, dtype="int8") == "model.dtype='int8': expected one of auto, float32, bfloat16, float16"
    assert message(base, attn_implementation="x").startswith(
        "model.attn_implementation='x': expected one of sdpa, eager,"
    )


def test_an_adapter_that_is_not_there(base, tmp_path):
    for missing in ("/no/such", str(tmp_path), base):
        assert message(base, missing).startswith(f"adapter='{missing}': ")


def test_an_adapter_without_its_base(adapter, copy_of):
    folder = copy_of(adapter)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    expected = f"pretrained='{folder}': an adapter that does not name its base; give pretrained=BASE,adapter={folder}"
    assert message(str(folder)) == expected
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone"}))
    assert "'/gone': no such folder" in message(str(folder))


def test_an_adapter_is_no_base_for_another(adapter):
    assert message(adapter, adapter) == f"pretrained='{adapter}': a folder without a readable config.json"


@pytest.mark.parametrize(
    ("kind", "dimensions"),
    [("llada_moe", {"hidden_size": 64}), ("llada_moe", FOUR), ("llada2", {}), ("llama", {})],
)
def test_an_adapter_of_another_model(kind, dimensions, adapter, tmp_path):
    """It would be as if there were none for the layers that it does not know."""
    other = save_model(tmp_path, kind, **dimensions)
    assert message(other, adapter).startswith(f"adapter='{adapter}': ")


def test_an_adapter_of_a_deeper_model(base, tmp_path):
    deeper = save_adapter(tmp_path, base, tiny(KIND, **FOUR))
    assert message(base, deeper).startswith(f"adapter='{deeper}': ")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_cannot_be_read(name, adapter, base, copy_of):
    folder = copy_of(adapter)
    (folder / name).write_text("{no")
    assert message(base, str(folder)).startswith(f"adapter='{folder}': ")
    assert str(folder) in message(str(folder))


def test_weights_that_cannot_be_read(base, copy_of):
    folder = copy_of(base)
    (folder / "model.safetensors").write_text("{no")
    assert message(str(folder)).startswith(f"pretrained='{folder}': ")


@pytest.mark.parametrize(
    "recipe", ["memory: {rnak: 4}", "memory: [", "memory: {rank: 0}", "memory: [1]", "- memory", "training: 1"]
)
def test_a_recipe_that_cannot_be_read(recipe, base, copy_of):
    folder = copy_of(base)
    (folder / "recipe.yaml").write_text(recipe)
    assert str(folder / "recipe.yaml") in message(str(folder))


@pytest.mark.parametrize("recipe", ["", "memory:", "training:"])
def test_sections_of_a_recipe_may_be_empty(recipe, base, copy_of):
    folder = copy_of(base)
    (folder / "recipe.yaml").write_text(recipe)
    assert load_pretrained(str(folder)).memory == MemoryConfig()


def test_a_recipe_of_before_layers_were_always_the_last(base, copy_of):
    folder = copy_of(base)
    (folder / "recipe.yaml").write_text("memory: {rank: 3, layers: last}\n")
    assert load_pretrained(str(folder)).memory.rank == 3
    (folder / "recipe.yaml").write_text("memory: {rank: 3, layers: first}\n")
    assert "recipe.yaml: not a recipe of this version (" in message(str(folder))


def test_an_architecture_that_nothing_names(base, copy_of):
    folder = copy_of(base)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
    says = f"pretrained='{folder}': its config.json names no architecture; expected one there, or "
    assert message(str(folder)).startswith(says)
    (folder / "config.json").write_text(json.dumps({**config, "architectures": "LLaDAMoEModelLM"}))
    assert message(str(folder)).endswith("config.json has architectures='LLaDAMoEModelLM'; expected a list")


def test_an_architecture_that_is_not_known(base, copy_of):
    folder = copy_of(base)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    assert "BertModel" in message(str(folder)) and message(str(folder)).startswith(f"pretrained='{folder}': ")
