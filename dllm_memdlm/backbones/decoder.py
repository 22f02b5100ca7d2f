"""Llama-like causal decoders from transformers, made bidirectional: same weights, no causal mask.

The classes are built on transformers' own, so parameter names and checkpoints stay as they are.
"""

from __future__ import annotations

import functools
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from .output import OutputLinear
from .staged import StagedForward

#: Architectures of this layout (embedding, layers, norm, rotary_emb, lm_head), by the name that config.json gives.
#: dllm's converted decoders (A2D…) hold the same weights as the models that they were converted from.
DECODERS = {
    "LlamaForCausalLM": "LlamaForCausalLM",
    "MistralForCausalLM": "MistralForCausalLM",
    "Qwen2ForCausalLM": "Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "Qwen3ForCausalLM",
    "A2DLlamaLMHeadModel": "LlamaForCausalLM",
    "A2DQwen2LMHeadModel": "Qwen2ForCausalLM",
    "A2DQwen3LMHeadModel": "Qwen3ForCausalLM",
}


@functools.cache
def bidirectional(architecture: str) -> type[PreTrainedModel]:
    """The bidirectional class of a decoder in `DECODERS`. Raises KeyError for another."""
    base = getattr(transformers, DECODERS[architecture])

    def __init__(self: PreTrainedModel, config: PretrainedConfig) -> None:
        base.__init__(self, config)
        for layer in self.model.layers:
            layer.self_attn.is_causal = False
        OutputLinear.put_into(self)

    namespace: dict[str, Any] = {
        "__init__": __init__,
        "__doc__": f"{base.__name__} with bidirectional attention. See `StagedForward.forward`.",
        "__module__": __name__,
    }
    # It keeps the name of its base, which save_pretrained writes to config.json.
    return type(base.__name__, (StagedForward, base), namespace)
