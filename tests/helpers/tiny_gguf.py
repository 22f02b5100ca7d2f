"""A SmolLM2 of a few thousand parameters in GGUF, written as llama.cpp's converter writes the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from conftest import scale_up
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<empty_output>"]
TEXTS = ["the cat sat on the mat in 2024", "the dog sat on the log"] * 5
HEADS, KEY_HEADS = 4, 2

#: How each tensor is packed; what is not named here stays in float32.
PACKED = {"token_embd": "Q8_0", "attn_q": "Q4_1", "attn_k": "Q4_1", "ffn_down": "Q4_1"}


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens by id, markers first, and merges in llama.cpp's form."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    settings = {"special_tokens": MARKERS, "initial_alphabet": tokenizers.pre_tokenizers.ByteLevel.alphabet()}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, show_progress=False, **settings)
    bpe.train_from_iterator(TEXTS, trainer)
    model = json.loads(bpe.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


def write_gguf(path: Path, drop: str = "", tokens: dict[str, str] | None = None, **fields: Any) -> dict[str, Tensor]:
    """Write the file; the weights as whoever reads it should find them, by transformers' names.

    Args:
        path: where to.
        drop: a tensor to leave out.
        tokens: markers of other names.
        fields: what the file says otherwise (architecture, tokenizer, pre), or of other sizes (width); a tensor that
            it holds as integers.
    """
    names, merges = vocabulary()
    sizes = {"vocab_size": len(names), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    scale_up(model)
    writer = gguf.GGUFWriter(path, fields.get("architecture", "llama"))
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(3)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(fields.get("width", 96))
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(64 // HEADS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(fields.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(fields.get("pre", "smollm"))
    writer.add_token_list([(tokens or {}).get(name, name) for name in names])
    writer.add_token_types([gguf.TokenType.CONTROL if n in MARKERS else gguf.TokenType.NORMAL for n in names])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    expected = {}
    translated = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    for name, parameter in model.named_parameters():
        written = translated.get_name(name, try_suffixes=(".weight",))
        weight, expected[name] = _packed(written, parameter.detach().numpy())
        if written == fields.get("integers"):
            writer.add_tensor(written, weight.astype(np.int32))
        elif written != drop:
            writer.add_tensor(written, weight, raw_dtype=_type(written))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _type(name: str) -> gguf.GGMLQuantizationType:
    kind = next((kind for part, kind in PACKED.items() if part in name), "F32")
    return gguf.GGMLQuantizationType[kind]


def _packed(name: str, weight: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """A weight as it is written, and as it is after its rounding, in transformers' order of rows."""
    heads = HEADS if "attn_q" in name else KEY_HEADS if "attn_k" in name else None
    order = np.arange(len(weight))
    if heads is not None:  # the halves of each head, one row of each in turn
        order = order.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    packed = gguf.quants.quantize(weight[order], _type(name))
    rounded = np.empty_like(weight)
    rounded[order] = gguf.quants.dequantize(packed, _type(name))
    return packed, torch.from_numpy(rounded)
