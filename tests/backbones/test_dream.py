"""Dream's published files, loaded and written back; and its logits, which predict the next position whoever asks."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import MASK, SHIFTED, assert_close_relative, make_trainer, scale_up, tiny, train_batch
from data_files import message_of
from published import has_our_step, is_trained_decoded_and_scored, is_written_back, write_checkpoint
from saved_models import BYTES, byte_tokenizer, prompt_memory
from steps import OFF, memory_for, plain_loss
from stock_models import dllms_model, logits
from torch import Tensor

from dllm_memdlm.backbones import DreamModel, config_of
from dllm_memdlm.config import ModelConfig
from dllm_memdlm.inference.plain_checkpoint import export
from dllm_memdlm.inference.pretrained import load_pretrained

#: config.json of Dream-v0-Instruct-7B, but for the sizes.
PUBLISHED = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "mask_token_id": MASK, "model_type": "Dream"},
    **{"hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48},
    **{"max_position_embeddings": 256, "max_window_layers": 28, "num_attention_heads": 4, "num_hidden_layers": 3},
    **{"num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000.0},
    **{"sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
    **{"transformers_version": "4.46.2", "use_sliding_window": False, "vocab_size": BYTES},
}
#: The tensors of a published layer.
LAYER = {
    **{f"self_attn.{name}_proj.weight": (size, 32) for name, size in (("q", 32), ("k", 16), ("v", 16), ("o", 32))},
    **{f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", 32), ("k", 16), ("v", 16))},
    **{"mlp.gate_proj.weight": (48, 32), "mlp.up_proj.weight": (48, 32), "mlp.down_proj.weight": (32, 48)},
    **{"input_layernorm.weight": (32,), "post_attention_layernorm.weight": (32,)},
}


def published(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """A checkpoint in bfloat16, with the names of the published ones, and its weights."""
    shapes = {"model.embed_tokens.weight": (BYTES, 32), "model.norm.weight": (32,), "lm_head.weight": (BYTES, 32)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in LAYER.items()}
    return write_checkpoint(folder, PUBLISHED, shapes, byte_tokenizer(), torch.bfloat16)


@pytest.mark.usefixtures("as_from_a_shell")
def test_published_files_are_loaded_trained_decoded_scored_and_written_back(tmp_path):
    base, weights = published(tmp_path / "base")
    named = ("architectures", "model_type", "mask_token_id", "rope_theta", "num_key_value_heads", "vocab_size")
    is_written_back(base, weights, tmp_path / "out", named)
    assert is_trained_decoded_and_scored(base, tmp_path, MASK).right_shift_logits


def test_the_defaults_are_dream_7bs():
    config = config_of(ModelConfig(architecture="DreamModel"))
    sizes = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    sizes |= {"intermediate_size": 18944, "vocab_size": 152064, "mask_token_id": 151666}
    assert {name: getattr(config, name) for name in sizes} == sizes and not config.tie_word_embeddings
    with torch.device("meta"):
        model = DreamModel(config)
    assert sum(p.numel() for p in model.parameters()) == 7_615_616_512  # as Qwen2.5-7B


def test_the_shift_follows_the_architecture(tokenizer, tmp_path):
    model = tiny(SHIFTED, torch.float64)
    for given in ({}, {"right_shift_logits": True}):
        trainer = make_trainer(model, tokenizer, tmp_path, OFF, **given)
        assert trainer.right_shift_logits is True
    batch = train_batch(trainer)
    loss, plain = trainer.compute_loss(model, batch), plain_loss(model, batch, shift=True)
    assert_close_relative(loss.detach(), plain.detach(), 1e-10)
    assert (plain - plain_loss(model, batch)).abs() > 0.1
    assert prompt_memory(model, memory_for(SHIFTED)).memory.right_shift_logits
    unshifted = partial(make_trainer, right_shift_logits=False)
    assert message_of(unshifted, tiny(SHIFTED), tokenizer, tmp_path, OFF) == (
        "training.right_shift_logits=False: expected true or none with DreamModel, whose logits are those of the next "
        "position"
    )
    for make in (make_trainer, unshifted):
        assert make(tiny("llama"), tokenizer, tmp_path, OFF).right_shift_logits is False


def test_the_mask_is_the_models(tmp_path):
    base, _ = published(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "mask_token_id": 7}))
    assert message_of(load_pretrained, base) == (
        f"tokenizer={base!r}: its mask token '<|mask|>' is number 2, and the model's mask_token_id is 7; expected the "
        "tokenizer that the model was trained with"
    )


@pytest.mark.dllm
def test_dllm_loads_what_we_save(tmp_path):
    """Its own function, by the model_type; our export and what its class saves are read by either."""
    from dllm.utils import get_model

    base, _ = published(tmp_path / "base")
    ours = load_pretrained(base, dtype="float32").model
    theirs = get_model(model_name_or_path=str(export(base, tmp_path / "out", dtype="float32")), dtype="float32")
    assert type(theirs).__module__.startswith("dllm.")
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-4, rtol=1e-4)

    theirs = dllms_model(SHIFTED, mask_token_id=MASK, vocab_size=BYTES)
    scale_up(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    byte_tokenizer().save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(logits(load_pretrained(str(tmp_path / "theirs")).model), logits(theirs))


@pytest.mark.dllm
@pytest.mark.parametrize("lora", [False, True])
def test_a_step_on_dllms_own_model_is_ours(lora, tokenizer, tmp_path):
    """Taken by the trainer as it is; the same loss and gradients as our class of the same weights has."""
    theirs = dllms_model(SHIFTED, mask_token_id=MASK)
    scale_up(theirs)
    has_our_step(theirs, tiny(SHIFTED, rope_theta=10000.0), SHIFTED, lora, tokenizer, tmp_path)
