"""Training that goes on from a saved adapter: `lora.path`."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file
from saved_models import BYTES, byte_tokenizer, save_adapter, save_model, train_adapter
from stock_models import config_of, edit, logits, save_peft, stock_llama

from dllm_memdlm.backbones import with_lora
from dllm_memdlm.config import ConfigError, LoraConfig
from dllm_memdlm.inference.pretrained import load_pretrained
from dllm_memdlm.training.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("as_from_a_shell")


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[str, str]:
    """A base, and an adapter for it whose config names another path."""
    folder = tmp_path_factory.mktemp("start")
    base = save_model(folder / "base", "llada_moe", byte_tokenizer())
    adapter = save_adapter(folder / "adapter", base, tiny("llada_moe", vocab_size=BYTES))
    edit(adapter, base_model_name_or_path="/their/path")
    return base, adapter


def test_training_goes_on_from_a_saved_adapter(start, tmp_path):
    base, adapter = start
    before = logits(load_pretrained(base, adapter).model)
    still = train_adapter(tmp_path / "still", base, f"lora.path={adapter}", "training.learning_rate=0")
    torch.testing.assert_close(logits(load_pretrained(still).model), before, atol=0, rtol=0)
    moved = train_adapter(tmp_path / "moved", base, f"lora.path={adapter}")
    saved, first = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (moved, adapter))
    assert saved.keys() == first.keys()
    assert sum(not torch.equal(saved[name], first[name]) for name in saved) > 0.8 * len(saved)
    config = config_of(moved)
    assert config["base_model_name_or_path"] == base, "which the adapter it came from did not name"
    assert config["auto_mapping"]["parent_library"] == "dllm.pipelines.llada.models.modeling_lladamoe"
    assert config["lora_dropout"] == 0.05, "the recipe's, not the adapter's"
    assert load_recipe(Path(moved) / "recipe.yaml").lora.path == adapter


def test_it_trains_what_the_adapter_trained(tmp_path):
    """Its matrices and whole modules, and nothing of the base."""
    base = save_model(tmp_path / "base", "llama", dtype=torch.bfloat16)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head"])
    save_peft(tmp_path / "adapter", stock_llama(base), config)
    lora = LoraConfig(r=4, alpha=8, target_modules=("q_proj",), path=str(tmp_path / "adapter"), dropout=0.25)
    model = with_lora(tiny("llama", torch.bfloat16), lora)
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 + 1
    assert all((dtype == torch.float32) == ("lora_" in name) for name, dtype in trained.items())
    assert model.get_base_model().model.layers[0].self_attn.q_proj.lora_dropout["default"].p == 0.25


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": 8}, "lora.r=8: the adapter of lora.path was made with 4; set it to that"),
        ({"alpha": 4}, "lora.alpha=4: the adapter of lora.path was made with 8; set it to that"),
        ({"bias": "all"}, "lora.bias='all': the adapter of lora.path was made with 'none'; set it to that"),
        ({"target_modules": ("q_proj",)}, "lora.target_modules=('q_proj',): the adapter of lora.path is on down_proj"),
        ({"target_modules": r".*experts.*"}, "lora.target_modules='.*experts.*': the adapter of lora.path"),
        ({"path": "/no/such"}, "lora.path='/no/such': no readable adapter_config.json ("),
    ],
)
def test_settings_that_are_not_the_adapters_are_refused(settings, says, start):
    with pytest.raises(ConfigError) as error:
        with_lora(tiny("llada_moe", vocab_size=BYTES), LoraConfig(**{"r": 4, "alpha": 8, "path": start[1], **settings}))
    assert str(error.value).startswith(says)


def test_targets_may_be_written_in_another_way(start):
    names = ("down_proj", "gate", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    for targets in (names, r".*(proj|\.gate)"):
        lora = LoraConfig(r=4, alpha=8, path=start[1], target_modules=targets)
        assert isinstance(with_lora(tiny("llada_moe", vocab_size=BYTES), lora), peft.PeftModel)


def test_an_adapter_for_another_model_or_of_another_type_is_refused(start, tmp_path):
    lora = LoraConfig(r=4, alpha=8, path=start[1])
    with pytest.raises(ConfigError, match=rf"^lora\.path='{start[1]}': made for another model; base_model\.model\."):
        with_lora(tiny("llama"), lora)
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    save_peft(tmp_path / "ia3", stock_llama(save_model(tmp_path / "base", "llama")), config)
    with pytest.raises(ConfigError, match=r": an adapter of type IA3, expected LORA$"):
        with_lora(tiny("llama"), LoraConfig(path=str(tmp_path / "ia3")))


def test_shapes_alone_need_no_adapter():
    """As `--dry-run` asks for them."""
    with torch.device("meta"):
        model = with_lora(tiny("llama"), LoraConfig(r=4, path="/not/looked/at"))
    assert isinstance(model, peft.PeftModel)
