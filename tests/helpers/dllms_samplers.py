"""Our samplers beside dllm's: on the same weights, ours or those of dllm's own models, and step by step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from conftest import MASK, scale_up, tiny_config
from naive_samplers import decoder
from stock_models import DENSE_ATTRIBUTES, a2d_llama, dllms_model
from torch import Tensor, nn


def decoders(name: str) -> tuple[nn.Module, nn.Module]:
    """A model for dllm's sampler, and the same weights for ours: a backbone of ours, or of dllm's."""
    kind, _, whose = name.partition(" of ")
    if whose != "dllm":
        model = decoder(kind, torch.float32)
        return model, model
    if kind == "llama":
        model = a2d_llama()
    else:
        config = tiny_config(kind)
        shared = {field: getattr(config, field) for field in DENSE_ATTRIBUTES if hasattr(config, field)}
        # Eager, since dllm's LLaDA21Sampler passes a mask in bfloat16, which sdpa takes with no other dtype.
        shared |= {} if kind == "llada" else {"attn_implementation": "eager" if kind == "llada2" else "sdpa"}
        model = dllms_model(kind, **shared)
    scale_up(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[MASK] = 0  # never chosen
        model.get_input_embeddings().weight[MASK] *= 0.1
    model.eval()
    return model, copy.deepcopy(model)  # which our sampler changes the class of


def assert_same(
    ours: Any, theirs: Any, batch: Sequence[Tensor], settings: Any, way: str = "sample", left: bool = False, **own: Any
) -> Tensor:
    """Both go the same steps; `own` are settings that only ours has. dllm pads Dream's prompts on the `left`.

    Returns dllm's canvas.
    """
    found = []
    for sampler, changes in ((theirs, {}), (ours, own)):
        torch.manual_seed(3)
        found.append(getattr(sampler, way)(batch, settings, **changes))
    expected, output = found
    width = expected.sequences.shape[1]
    longest = max(map(len, batch))
    for row, prompt in enumerate(batch):
        length = width - longest + len(prompt) if left else width
        place = slice(width - length, width)
        histories = [canvas[row, :length].tolist() for canvas in output.histories]
        assert histories == [canvas[row, place].tolist() for canvas in expected.histories]
        assert output.sequences[row, :length].tolist() == histories[-1] == expected.sequences[row, place].tolist()
    return expected.sequences
