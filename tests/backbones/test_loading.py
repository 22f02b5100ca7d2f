"""From a folder, from dimensions or from dllm to a model. Folders that are refused: helpers/bad_inference.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import (
    ALL_KINDS,
    ARCHITECTURES,
    DIMENSIONS,
    ENCODER,
    scale_up,
    tiny,
    tiny_config,
)
from data_files import message_of
from safetensors.torch import load_file, save_file

from dllm_memdlm.backbones import (
    DECODERS,
    LLaDAConfig,
    config_of,
    find_sites,
    load_model,
    with_lora,
)
from dllm_memdlm.config import LoraConfig, MemoryConfig, ModelConfig

TOKENS = torch.arange(3, 23).view(2, 10)
OF_DLLM = ("llada_moe", "llada2", "llada")


def saved(kind: str, folder: Path) -> Path:
    tiny(kind).save_pretrained(folder)
    return folder


def output_name(kind: str) -> str:
    return {"llada": "model.transformer.ff_out.weight", ENCODER: "decoder.weight"}.get(kind, "lm_head.weight")


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def load(folder: Path, **settings: Any) -> torch.nn.Module:
    model = ModelConfig(path=str(folder), **{"dtype": "float32", **settings})
    return load_model(model, config_of(model))


SAVED = [(kind, tied) for kind in ALL_KINDS for tied in (False, True) if (kind, tied) != ("llada", True)]


@pytest.mark.parametrize(("kind", "tied"), SAVED)
def test_a_saved_model_is_loaded_again(kind, tied, tmp_path):
    """With a model_type that another library has taken, and remote code that must not be run."""
    model = tiny(kind, tie_word_embeddings=tied).eval()
    model.save_pretrained(tmp_path)
    auto_map = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.LLaDA2MoeModelLM"}
    edit(tmp_path, **({} if kind == "llama" else {"model_type": "llada", "auto_map": auto_map}))
    assert (output_name(kind) in load_file(tmp_path / "model.safetensors")) != tied
    loaded = load(tmp_path).eval()
    assert type(loaded).__name__ == ARCHITECTURES[kind] and not hasattr(loaded.config, "auto_map")
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


@pytest.mark.parametrize("kind", OF_DLLM)
def test_a_bfloat16_model_from_scratch_keeps_exact_positions(kind, tmp_path):
    model = load_model(ModelConfig(architecture=ARCHITECTURES[kind], dtype="bfloat16"), tiny_config(kind))
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and "gate.weight" not in name]
    assert all(0.01 < p.std() < 0.03 for p in matrices), "drawn by initializer_range"
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = load(tmp_path, dtype="bfloat16").eval()(input_ids=TOKENS).logits
        assert torch.equal(again, model.eval()(input_ids=TOKENS).logits)
    if kind == "llada":  # which turns in float32 what it then rounds
        far = torch.tensor([[4000]])
        turned = model.position_embeddings(torch.zeros(1, 1, 32, dtype=torch.bfloat16), far)
        exact = tiny(kind).position_embeddings(torch.zeros(1, 1, 32), far)
        assert all(torch.equal(*pair) for pair in zip(turned, exact, strict=True))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_model_from_dimensions_depends_on_its_seed_alone(kind):
    dimensions = {**DIMENSIONS[kind], "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = ModelConfig(architecture=ARCHITECTURES[kind], dimensions=dimensions, dtype="float32")
    config = config_of(model, vocab_size=48)
    assert config.vocab_size == 48
    first = load_model(model, config, seed=1).state_dict()
    state = torch.get_rng_state()
    second, third = (load_model(model, config, seed=seed).state_dict() for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first[output_name(kind)], third[output_name(kind)])


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_loads_sees_both_ways_and_has_sites(name, tmp_path):
    base = getattr(transformers, DECODERS[name])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    causal = base(base.config_class(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    scale_up(causal)
    causal.save_pretrained(tmp_path)
    edit(tmp_path, architectures=[name])
    model, changed = load(tmp_path).eval(), TOKENS.clone()
    assert isinstance(model, base) and model.state_dict().keys() == causal.state_dict().keys()
    changed[:, -1] = 40
    with torch.no_grad():
        for each, sees in ((causal, False), (model, True)):
            moved = each(input_ids=TOKENS).logits[:, 0] - each(input_ids=changed).logits[:, 0]
            assert moved.any() == sees
        # What is left without the mask is the causal model: under its mask, the same logits.
        mask = torch.ones(10, 10, dtype=torch.bool).tril()[None, None]
        expected = causal(input_ids=TOKENS).logits
        torch.testing.assert_close(model(input_ids=TOKENS, attention_mask=mask).logits, expected, rtol=1e-4, atol=1e-4)
        hidden = model(stage="prefix", input_ids=TOKENS, boundary=1).hidden
        head = model(stage="suffix", hidden=hidden, boundary=1, positions=torch.tensor([[0, 5, 9]] * 2)).logits
        torch.testing.assert_close(head, model(input_ids=TOKENS).logits[:, [0, 5, 9]], rtol=1e-4, atol=1e-4)
    assert len(find_sites(model, MemoryConfig(layer_fraction=0.5))) == 3


#: LLaDA-8B-Instruct's config.json, but for the library's own entries.
PUBLISHED = {
    **{"activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "attention_dropout": 0.0},
    **{"attention_layer_norm": False, "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False},
    **{"block_group_size": 1, "block_type": "llama", "d_model": 4096, "embedding_dropout": 0.0},
    **{"embedding_size": 126464, "eos_token_id": 126081, "flash_attention": False, "include_bias": False},
    **{"include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell"},
    **{"init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True},
    **{"mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": 12288, "mlp_ratio": 4},
    **{"multi_query_attention": None, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "pad_token_id": 126081},
    **{"precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-5, "rope": True},
    **{"rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False},
    **{"vocab_size": 126464, "weight_tying": False, "architectures": ["LLaDAModelLM"], "model_type": "llada"},
}


def test_lladas_published_config_is_read_and_written(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config, default = config_of(ModelConfig(path=str(tmp_path))), LLaDAConfig().to_dict()
    shared = PUBLISHED.keys() & default.keys() - {"architectures"}
    assert {name: default[name] for name in shared} == {name: PUBLISHED[name] for name in shared} and len(shared) > 25
    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    assert (*sizes, config.intermediate_size) == (4096, 32, 32, 32, 12288)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (4096, False)
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {name: again.get(name) for name in PUBLISHED} == PUBLISHED
    assert LLaDAConfig(multi_query_attention=False).multi_query_attention is None, "it asks for what is computed"
    few = LLaDAConfig(n_heads=8, mlp_hidden_size=None, d_model=64, mlp_ratio=3)
    assert (few.n_kv_heads, few.intermediate_size) == (8, 192)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("block_type", "sequential", "'llama'"), ("activation_type", "swiglu", "'silu'"), ("alibi", True, "False")),
        *(("layer_norm_type", "default", "'rms'"), ("layer_norm_with_affine", False, "True"), ("rope", False, "True")),
        *(("attention_layer_norm", True, "False"), ("input_emb_norm", True, "False"), ("scale_logits", True, "False")),
        *(("residual_dropout", 0.1, "0.0"), ("embedding_dropout", 0.1, "0.0"), ("bias_for_layer_norm", True, "False")),
        *(("rope_full_precision", False, "True"), ("block_group_size", 2, "1"), ("weight_tying", True, "False")),
        *(("multi_query_attention", True, "None"), ("embedding_size", 20, "at least vocab_size 48")),
    ],
)
def test_a_llada_that_is_computed_otherwise_is_refused(name, value, expected, tmp_path):
    edit(saved("llada", tmp_path), **{name: value})
    reason = f"a config.json that makes no LLaDAModelLM ({name}={value!r}: expected {expected})"
    assert message_of(config_of, ModelConfig(path=str(tmp_path))) == f"model.path={str(tmp_path)!r}: {reason}"


@pytest.mark.parametrize("kind", ["llama", "llada_moe"])
def test_weights_that_are_not_there_are_counted(kind, tmp_path):
    weights = load_file(saved(kind, tmp_path) / "model.safetensors")
    gone = sorted(name for name in weights if ".layers.2." in name and "norm" in name)
    save_file({n: w for n, w in weights.items() if n not in gone}, tmp_path / "model.safetensors", {"format": "pt"})
    assert message_of(load, tmp_path).endswith(f": {len(gone)} weights are missing, {gone[0]} the first")


def test_lora_targets_that_match_nothing_are_refused():
    text = message_of(with_lora, tiny("llama"), LoraConfig(target_modules=("c_attn",)))
    assert text.startswith("lora.target_modules=('c_attn',): ") and "c_attn" in text.partition(": ")[2]
