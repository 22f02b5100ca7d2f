"""From a folder or dimensions to a model: config.json by its architecture, and one line for what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, DIMENSIONS, KINDS, scale_up, tiny, tiny_config
from safetensors.torch import load_file, save_file

from dllm_memdlm.backbones import config_of, load_model, model_class, read_config, staged_backbone, with_lora
from dllm_memdlm.config import ConfigError, LoraConfig, ModelConfig

TOKENS = torch.arange(3, 23).view(2, 10)


def saved(kind: str, folder: Path, **changes: Any) -> Path:
    """A checkpoint of a tiny model, its config.json changed."""
    tiny(kind).save_pretrained(folder)
    edit(folder, **changes)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def load(folder: Path, **settings: Any) -> torch.nn.Module:
    model = ModelConfig(path=str(folder), dtype="float32", **settings)
    return load_model(model, config_of(model))


def message(call: Any, *args: Any, **kwargs: Any) -> str:
    """The whole text of the ConfigError, which must be one line."""
    with pytest.raises(ConfigError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_loaded_again(kind, tmp_path):
    model = tiny(kind).eval()
    model(input_ids=TOKENS)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded).__name__ == ARCHITECTURES[kind]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    torch.testing.assert_close(loaded.eval()(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_tied_embeddings_are_loaded_again(kind, tmp_path):
    model = tiny(kind, tie_word_embeddings=True).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load(tmp_path).eval()
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


@pytest.mark.parametrize(
    ("kind", "model_type", "module"),
    [
        ("llada_moe", "llada", "modeling_lladamoe.LLaDAMoEModelLM"),
        ("llada2", "llada2_moe", "modeling_x.LLaDA2MoeModelLM"),
    ],
)
def test_published_configs_need_no_editing(kind, model_type, module, tmp_path):
    """A model_type that another library has taken, and remote code that must not be run."""
    auto_map = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": module}
    folder = saved(kind, tmp_path, model_type=model_type, auto_map=auto_map)
    config = read_config(str(folder))
    assert type(config).__module__.startswith("dllm_memdlm.")
    assert config.hidden_size == 32 and config.num_experts == DIMENSIONS[kind]["num_experts"]
    assert not hasattr(config, "auto_map")
    assert type(load(folder)).__module__.startswith("dllm_memdlm.")


def test_an_unknown_architecture_is_refused(tmp_path):
    folder = saved("llama", tmp_path, architectures=["GPT2LMHeadModel"])
    known = (
        "LLaDAMoEModelLM, LLaDAMoEModel, LLaDA2MoeModelLM, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, "
        "Qwen3ForCausalLM, A2DLlamaLMHeadModel, A2DQwen2LMHeadModel, A2DQwen3LMHeadModel"
    )
    expected = f"model.architecture='GPT2LMHeadModel': no backbone for it; known: {known}"
    assert message(read_config, str(folder)) == expected
    assert message(model_class, "GPT2LMHeadModel") == expected
    edit(folder, architectures=None)
    nameless = f"model.path='{folder}': its config.json names no architecture; expected one there"
    assert message(read_config, str(folder)).startswith(nameless)
    assert isinstance(read_config(str(folder), "LlamaForCausalLM"), transformers.LlamaConfig)


def test_a_missing_folder_is_named(tmp_path):
    missing = str(tmp_path / "missing")
    assert message(read_config, missing) == f"model.path={missing!r}: no such folder"
    assert message(read_config, "./missing") == "model.path='./missing': no such folder"
    hub = "somebody/no-such-model"
    reason = "no such folder, and no local copy or network to get it from the hub"
    assert message(read_config, hub) == f"model.path={hub!r}: {reason}"
    assert (
        message(read_config, str(tmp_path)) == f"model.path={str(tmp_path)!r}: a folder without a readable config.json"
    )
    (tmp_path / "config.json").write_text("{")
    assert (
        message(read_config, str(tmp_path)) == f"model.path={str(tmp_path)!r}: a folder without a readable config.json"
    )


def test_missing_weights_are_named(tmp_path):
    folder = saved("llama", tmp_path)
    (folder / "model.safetensors").unlink()
    assert message(load, folder).startswith(f"model.path={str(folder)!r}: no weights (")


def test_pickled_weights_are_not_read(tmp_path):
    folder = saved("llama", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert message(load, folder).startswith(f"model.path={str(folder)!r}: no weights (")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_shape_are_refused(kind, tmp_path):
    folder = saved(kind, tmp_path, vocab_size=64)
    assert message(load, folder).startswith(f"model.path={str(folder)!r}: weights of another shape (")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_there_are_counted(kind, tmp_path):
    folder = saved(kind, tmp_path)
    weights = load_file(folder / "model.safetensors")
    gone = sorted(name for name in weights if ".layers.2." in name and "norm" in name)
    save_file({n: w for n, w in weights.items() if n not in gone}, folder / "model.safetensors", {"format": "pt"})
    expected = f"model.path={str(folder)!r}: {len(gone)} weights are missing, {gone[0]} the first"
    assert message(load, folder) == expected


def test_a_causal_llama_becomes_bidirectional(tmp_path):
    config = tiny_config("llama")
    causal = transformers.LlamaForCausalLM(config).eval()
    scale_up(causal)
    causal.save_pretrained(tmp_path)
    model = load(tmp_path).eval()
    assert isinstance(model, transformers.LlamaForCausalLM)
    other = TOKENS.clone()
    other[:, -1] = 40
    with torch.no_grad():
        for each, sees in ((causal, False), (model, True)):
            moved = (each(input_ids=TOKENS).logits - each(input_ids=other).logits)[:, :-1].abs().max(-1).values
            assert bool((moved > 1e-3).all()) == sees and bool((moved == 0).all()) != sees
        # the same weights: with one token there is no order to see
        torch.testing.assert_close(model(input_ids=TOKENS[:, :1]).logits, causal(input_ids=TOKENS[:, :1]).logits)


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "A2DQwen3LMHeadModel"])
def test_every_decoder_is_bidirectional(name):
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    dimensions = {**size, "intermediate_size": 48, "head_dim": 8}
    if name.startswith("Qwen2"):
        del dimensions["head_dim"]
    settings = ModelConfig(architecture=name, dimensions=dimensions, dtype="float32")
    model = load_model(settings, config_of(settings, vocab_size=48)).eval()
    other = TOKENS.clone()
    other[:, -1] = 40
    with torch.no_grad():
        first, second = model(input_ids=TOKENS).logits, model(input_ids=other).logits
    assert not torch.equal(first[:, 0], second[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_from_dimensions_depends_on_its_seed_alone(kind):
    model = ModelConfig(
        architecture=ARCHITECTURES[kind],
        dimensions={**DIMENSIONS[kind], "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
        dtype="float32",
    )
    config = config_of(model, vocab_size=48)
    assert config.vocab_size == 48
    first = load_model(model, config, seed=1).state_dict()
    state = torch.get_rng_state()
    second, third = (load_model(model, config, seed=seed).state_dict() for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], third["lm_head.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_dimension_is_refused(kind):
    model = ModelConfig(architecture=ARCHITECTURES[kind], dimensions={"hidden_sise": 32})
    cls = model_class(ARCHITECTURES[kind]).config_class.__name__
    assert message(config_of, model) == f"model.dimensions.hidden_sise: not a field of {cls}"


@pytest.mark.parametrize("kind", KINDS)
def test_lora_is_wrapped_around_the_backbone(kind, tmp_path):
    folder = saved(kind, tmp_path)
    settings = ModelConfig(path=str(folder), dtype="bfloat16")
    model = load_model(settings, config_of(settings), LoraConfig(r=2, alpha=4))
    assert isinstance(model, peft.PeftModel)
    assert staged_backbone(model) is model.get_base_model()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    assert next(staged_backbone(model).parameters()).dtype == torch.bfloat16
    experts = [name for name in trainable if "experts." in name and "down_proj.lora_A" in name]
    counts = {"llada_moe": 2, "llada2": 2, "llama": 0}
    assert len([name for name in experts if "shared" not in name]) == counts[kind]
    off = load_model(settings, config_of(settings), LoraConfig(enabled=False))
    assert all(p.requires_grad for p in off.parameters())


def test_lora_targets_that_match_nothing_are_refused():
    text = message(with_lora, tiny("llama"), LoraConfig(target_modules=("c_attn",)))
    assert text.startswith("lora.target_modules=('c_attn',): ") and "c_attn" in text.partition(": ")[2]


def test_a_model_without_stages_is_refused():
    model = transformers.LlamaForCausalLM(tiny_config("llama"))
    with pytest.raises(TypeError, match=r"^no backbone adapter for LlamaForCausalLM; load the model with dllm_memdlm"):
        staged_backbone(model)


@pytest.mark.parametrize("kind", ["llada_moe", "llada2"])
def test_a_bfloat16_model_from_scratch_keeps_exact_positions(kind, tmp_path):
    config = tiny_config(kind)
    model = load_model(ModelConfig(architecture=ARCHITECTURES[kind], dtype="bfloat16"), config)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    again = load_model(ModelConfig(path=str(tmp_path), dtype="bfloat16"), read_config(str(tmp_path)))
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)
