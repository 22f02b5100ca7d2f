"""ModernBERT's published files, loaded and written back; its windows of attention; transformers' own model, taken."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ENCODER, scale_up, tiny, tiny_config
from data_files import message_of
from inputs import mask_of, tokens
from published import has_our_step, is_trained_decoded_and_scored, is_written_back, write_checkpoint
from saved_models import BYTES, bert_tokenizer
from stock_models import logits
from torch import Tensor

from dllm_memdlm.backbones import ModernBertForMaskedLM as OURS
from dllm_memdlm.backbones import config_of, find_sites, load_model
from dllm_memdlm.backbones.cache import block_causal
from dllm_memdlm.config import MemoryConfig, ModelConfig
from dllm_memdlm.inference.pretrained import load_pretrained
from dllm_memdlm.training.recipe import load_recipe
from dllm_memdlm.versions import modernbert_layers

#: config.json of ModernBERT-base, but for the sizes.
PUBLISHED = {
    "architectures": ["ModernBertForMaskedLM"],
    **{"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "classifier_activation": "gelu"},
    **{"classifier_bias": False, "classifier_dropout": 0.0, "classifier_pooling": "mean", "cls_token_id": 0},
    **{"decoder_bias": True, "deterministic_flash_attn": False, "embedding_dropout": 0.0, "eos_token_id": 3},
    **{"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "gradient_checkpointing": False},
    **{"hidden_activation": "gelu", "hidden_size": 32, "initializer_cutoff_factor": 2.0, "initializer_range": 0.02},
    **{"intermediate_size": 48, "layer_norm_eps": 1e-05, "local_attention": 8, "local_rope_theta": 10000.0},
    **{"max_position_embeddings": 256, "mlp_bias": False, "mlp_dropout": 0.0, "model_type": "modernbert"},
    **{"norm_bias": False, "norm_eps": 1e-05, "num_attention_heads": 4, "num_hidden_layers": 4, "pad_token_id": 1},
    **{"position_embedding_type": "absolute", "sep_token_id": 3, "tie_word_embeddings": True},
    **{"torch_dtype": "float32", "transformers_version": "4.47.0.dev0", "vocab_size": BYTES},
}
LAYER = {"attn.Wqkv.weight": (96, 32), "attn.Wo.weight": (32, 32), "mlp.Wi.weight": (96, 32), "mlp.Wo.weight": (32, 48)}
NORMS = ("model.embeddings.norm", "model.final_norm", "head.norm", *(f"model.layers.{i}.mlp_norm" for i in range(4)))
NORMS += tuple(f"model.layers.{i}.attn_norm" for i in range(1, 4))  # the first layer comes after the embeddings' own


def published(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """A checkpoint with the names of the published ones, and its weights."""
    shapes = {"model.embeddings.tok_embeddings.weight": (BYTES, 32), "head.dense.weight": (32, 32)}
    shapes |= {"decoder.bias": (BYTES,), **{f"{name}.weight": (32,) for name in NORMS}}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(4) for name, shape in LAYER.items()}
    return write_checkpoint(folder, PUBLISHED, shapes, bert_tokenizer(), torch.float32)


@pytest.mark.usefixtures("as_from_a_shell")
def test_published_files_are_loaded_trained_decoded_scored_and_written_back(tmp_path):
    base, weights = published(tmp_path / "base")
    named = ("architectures", "model_type", "global_rope_theta", "local_rope_theta", "global_attn_every_n_layers")
    out = is_written_back(base, weights, tmp_path / "out", named)
    stock = transformers.AutoModelForMaskedLM.from_pretrained(out, dtype=torch.float32)
    ours = load_pretrained(base, dtype="float32").model
    torch.testing.assert_close(logits(ours), logits(stock), atol=1e-4, rtol=1e-4)
    is_trained_decoded_and_scored(base, tmp_path, mask=2)


def test_the_defaults_are_modernbert_bases():
    """And the recipe's dimensions are ModernBERT-large's: the published numbers of parameters."""
    large = load_recipe(Path(__file__).parents[2] / "recipes" / "modernbert_large.yaml").model.dimensions
    for dimensions, parameters in ((large, 395_881_664), ({}, 149_655_232)):
        config = config_of(ModelConfig(architecture="ModernBertForMaskedLM", dimensions=dimensions))
        with torch.device("meta"):
            model = OURS(config)
        assert sum(p.numel() for p in model.parameters()) == parameters
    sites = find_sites(model, MemoryConfig(layer_fraction=0.1))
    expected = [f"layers.{i}.mlp.{name}" for i in (19, 20, 21) for name in ("Wi", "Wo")]
    assert [site.shape.name for site in sites] == expected, "and not attn.Wo"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", ["none", "2-D", "4-D bool", "4-D additive"])
def test_most_layers_see_near_positions_alone(form, attention):
    """The logits are transformers', at positions that a prompt can be at; and far tokens count by the whole layers."""
    ours = tiny(ENCODER, attention=attention).eval()
    config = tiny_config(ENCODER)
    config._attn_implementation = attention
    stock = transformers.ModernBertForMaskedLM(config).eval()
    stock.load_state_dict(ours.state_dict())
    given = mask_of(form, torch.float32)
    visible = given.bool() if form == "2-D" else torch.ones_like(tokens(), dtype=torch.bool)
    if not form.startswith("4-D"):  # which not all releases take
        expected = logits_at(stock, given)[visible]
        torch.testing.assert_close(logits_at(ours, given)[visible], expected, atol=1e-4, rtol=1e-4)
    for layer in ours.layers[::2]:  # the whole ones
        layer.attn.Wo.weight.data.zero_()
    before = logits_at(ours, given)
    changed = tokens()
    changed[:, 0] = 3 + (changed[:, 0] - 2) % 45
    after = ours(input_ids=changed, attention_mask=given).logits
    moved = ((after - before).abs().amax(dim=2).masked_fill(~visible, 0) > 1e-6).any(dim=0)
    assert moved[:4].all() and not moved[4:].any(), "one layer, which sees 3 positions to either side"


def logits_at(model: torch.nn.Module, mask: Tensor | None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), attention_mask=mask).logits


ODD = {
    "biases": {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True},
    "untied": {"tie_word_embeddings": False, "decoder_bias": False},
    "dropout": {"attention_dropout": 0.3, "mlp_dropout": 0.3, "embedding_dropout": 0.3},
}


@pytest.mark.parametrize("odd", ODD)
def test_other_fields_compute_what_transformers_does(odd):
    """In training, with the same random numbers."""
    stock, ours = (cls(tiny_config(ENCODER, **ODD[odd])) for cls in (transformers.ModernBertForMaskedLM, OURS))
    scale_up(stock)
    for name, parameter in stock.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    ours.load_state_dict(stock.state_dict())
    found = []
    for model in (stock, ours):
        torch.manual_seed(3)
        found.append(logits_at(model.train(), None))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


ROPE = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
SCALED = {**ROPE, "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
EVEN, ODD_ONES = ["full_attention", "sliding_attention"] * 2, ["sliding_attention", "full_attention"] * 2
#: What either release writes, the kinds of layers and the second base that it means, and what a refusal says.
WRITTEN = {
    "of 4": ({"global_attn_every_n_layers": 2, "local_rope_theta": 5e3}, (EVEN, 5e3), None),
    "of 4, one base": ({"global_attn_every_n_layers": 2, "local_rope_theta": None}, (EVEN, 1e4), None),
    "of 5": ({"rope_parameters": ROPE, "layer_types": EVEN}, (EVEN, 1e4), None),
    "of 5 alone": ({"rope_parameters": ROPE, "layer_types": ODD_ONES}, (ODD_ONES, 1e4), "layer_types=['sliding_att"),
    "scaled": ({"rope_parameters": SCALED, "layer_types": EVEN}, None, "'rope_type': 'linear'"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_either_release_writes_is_read_by_both_or_refused(name, tmp_path):
    written, means, says = WRITTEN[name]
    base, _ = published(tmp_path / "base")
    of_4 = ("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta")
    values = {key: value for key, value in PUBLISHED.items() if key not in of_4} | written
    values |= {"global_rope_theta": 1e4} if "of 4" in name else {}
    (tmp_path / "base" / "config.json").write_text(json.dumps(values))
    if means is None or (name == "of 5 alone" and transformers.__version__ < "5"):
        assert says in message_of(load_pretrained, base)
    else:
        kinds, nearby = means
        expected = [(kind == "sliding_attention", nearby if kind == "sliding_attention" else 1e4) for kind in kinds]
        assert modernbert_layers(load_pretrained(base).model.config) == expected


def test_blocks_are_causal_in_windows_too():
    model, places = tiny(ENCODER).eval(), torch.arange(tokens().shape[1])[None]
    dense = block_causal(places, tokens().shape[1], 4)
    torch.testing.assert_close(logits_at(model, 4), logits_at(model, dense))


def test_scaled_positions_are_refused():
    scaling = {"rope_type": "linear", "factor": 2.0}
    dimensions = {"rope_scaling": scaling, "vocab_size": 48, "hidden_size": 32, "num_attention_heads": 2}
    model = ModelConfig(architecture="ModernBertForMaskedLM", dimensions=dimensions)
    says = message_of(load_model, model, config_of(model))
    assert says.startswith("model.dimensions: they make no ModernBertForMaskedLM (rope_scaling={")
    assert says.endswith("}: expected none)")


@pytest.mark.parametrize("lora", [False, True])
def test_a_step_on_transformers_own_model_is_ours(lora, tokenizer, tmp_path):
    """It is what dllm trains, and is taken by the trainer as it is; the same loss and gradients as our class has."""
    stock = transformers.ModernBertForMaskedLM(tiny_config(ENCODER))
    scale_up(stock)
    has_our_step(stock, tiny(ENCODER), ENCODER, lora, tokenizer, tmp_path)


def test_flash_attention_has_no_windows(tmp_path):
    base, _ = published(tmp_path / "base")
    assert "flash" in message_of(partial(load_pretrained, base, attn_implementation="flash_attention_2")).lower()
