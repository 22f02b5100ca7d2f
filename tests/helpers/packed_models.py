"""Models in 4 bit, and the same with their weights written out, under PEFT's own LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import nn

from dllm_memdlm.backbones import load_model, read_config
from dllm_memdlm.backbones.experts import ExpertLinear
from dllm_memdlm.backbones.lora import ExpertLora
from dllm_memdlm.config import LoraConfig, ModelConfig

#: Packed in blocks of 64 weights.
DIMENSIONS: dict[str, dict[str, Any]] = {
    "llada_moe": {"hidden_size": 64, "expert_intermediate_size": 64},
    "llada2": {"hidden_size": 64, "moe_intermediate_size": 64},
    "llama": {"hidden_size": 64},
    "dream": {"hidden_size": 64},
    "modernbert": {"hidden_size": 64},
    "llada": {"hidden_size": 64},
}


def load(folder: Path, dtype: str = "float32", dropout: float = 0.0) -> nn.Module:
    """In 4 bit, under a LoRA that has an effect."""
    config = ModelConfig(path=str(folder), dtype=dtype, load_in_4bit=True)
    model = load_model(config, read_config(str(folder)), LoraConfig(r=4, alpha=8, dropout=dropout))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero to begin with, which would hide every gradient of A
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


def written_out(model: nn.Module) -> nn.Module:
    """A copy with ordinary linear layers, that hold the weights which the packed ones stand for."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, LoraLinear4bit):
            packed = module.base_layer
            module.__class__, module.base_layer = LoraLinear, nn.Linear(1, 1, bias=False)
            weight = dequantize_4bit(packed.weight.data, packed.weight.quant_state)
            module.base_layer.weight = nn.Parameter(weight, requires_grad=False)
            module.base_layer.bias = packed.bias
        if type(module) is ExpertLora:
            packed = module.base_layer
            sizes = (packed.experts, packed.in_features, packed.out_features)
            module.base_layer = ExpertLinear(*sizes, packed.unpack()).requires_grad_(False)
    return plain
