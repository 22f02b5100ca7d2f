"""Models and adapters as transformers, dllm and PEFT save them, and the logits that two models are compared by."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from conftest import COMMON, DIMENSIONS, make_tokenizer, scale_up
from test_dllm_models import AS_PUBLISHED, dllms
from torch import Tensor, nn


def tokens() -> Tensor:
    return torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens(), **arguments).logits


def bidirectional_logits(model: nn.Module) -> Tensor:
    """A stock decoder's, with a mask that hides nothing."""
    return logits(model, attention_mask=torch.zeros(2, 1, 9, 9))


def save_stock(folder: Path, model: nn.Module, tokenizer: Any = None) -> str:
    torch.manual_seed(0)
    scale_up(model)
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


def stock_decoder(name: str, vocab_size: int = 48, **settings: Any) -> nn.Module:
    config_class = getattr(transformers, name.replace("ForCausalLM", "Config"))
    head = {} if name.startswith("Qwen2") else {"head_dim": 8}
    dimensions = {**COMMON, **DIMENSIONS["llama"], **head, "vocab_size": vocab_size, **settings}
    return getattr(transformers, name)(config_class(**dimensions))


def save_peft(folder: Path, model: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """Save an adapter as PEFT makes it. Returns the model with it."""
    adapted = peft.get_peft_model(model, copy.deepcopy(config))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
                parameter.data += "magnitude" in name  # DoRA's, which divides by them
    adapted.save_pretrained(folder)
    return adapted


def edit(folder: str | Path, **changes: Any) -> None:
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def config_of(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "adapter_config.json").read_text())


def stock_llama(base: str) -> nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(base)


def _dllms_config(kind: str, **changes: Any) -> dict[str, Any]:
    shared = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5 if kind == "llada2" else 1, "attention_dropout": 0.0}
    return {**COMMON, **DIMENSIONS[kind], **AS_PUBLISHED[kind], **shared, **changes}


def dllms_model(kind: str, **changes: Any) -> nn.Module:
    """dllm's own model, as small as ours."""
    return dllms(kind, _dllms_config(kind, **changes))
