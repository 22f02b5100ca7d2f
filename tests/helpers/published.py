"""Checkpoints in the form that their publishers gave them, and what every such model has to do here."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import torch
from conftest import assert_close_relative, make_trainer, train_batch
from safetensors.torch import save_file
from saved_models import random_prompts, train_adapter, weights_of
from steps import memory_for
from stock_models import logits
from torch import Tensor, nn

from dllm_memdlm.evaluation.likelihood import log_likelihoods, states
from dllm_memdlm.inference.decoding import Decoder
from dllm_memdlm.inference.decoding import memory_for as memory_of
from dllm_memdlm.inference.plain_checkpoint import export
from dllm_memdlm.inference.pretrained import Pretrained, load_pretrained


def write_checkpoint(
    folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], tokenizer: Any, dtype: torch.dtype
) -> tuple[str, dict[str, Tensor]]:
    """A folder of these weights, norms around 1, and the weights."""
    weights = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    weights = {name: (w + name.endswith("norm.weight")).to(dtype) for name, w in weights.items()}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return str(folder), weights


def is_written_back(base: str, weights: dict[str, Tensor], out: Path, named: tuple[str, ...]) -> Path:
    """Every weight bit for bit, under its name; and these fields of config.json. Returns the folder."""
    out = export(base, out)
    before, after = (json.loads((Path(folder) / "config.json").read_text()) for folder in (base, out))
    written = weights_of(out)
    assert written.keys() == weights.keys() and all(torch.equal(written[name], w) for name, w in weights.items())
    assert {name: after[name] for name in named} == {name: before[name] for name in named}
    assert "auto_map" not in after
    return out


def is_trained_decoded_and_scored(base: str, folder: Path, mask: int) -> Pretrained:
    """A LoRA changes the model, also merged; a memory its answers and scores. Returns the trained model."""
    run = train_adapter(folder, base, "memory.layer_fraction=0.4", "model.dtype=float32")
    loaded = load_pretrained(run, dtype="float32")
    assert loaded.memory.layer_fraction == 0.4
    assert (logits(loaded.model) - logits(load_pretrained(base, dtype="float32").model)).abs().max() > 0.01
    merged = load_pretrained(str(export(run, folder / "merged", dtype="float32")))
    torch.testing.assert_close(logits(merged.model), logits(loaded.model), atol=1e-4, rtol=1e-4)

    memory, (prompt, end) = memory_of(loaded, {"inner_lr": 10.0}), random_prompts(9, 5)
    decoder, items = Decoder(loaded, memory=memory), list(states(0, prompt, end, 6, seed=0))
    found = []
    for texts in ([prompt], [None]):
        with decoder.recalled(texts):
            scores = log_likelihoods(loaded.model, items, mask, loaded.right_shift_logits)
            found.append((decoder.answers([prompt], 6, whole=True), scores))
    assert found[0] != found[1], "the memory does something"
    assert all(len(answer[0]) == 6 for answer, _ in found)
    other = log_likelihoods(loaded.model, items, mask, not loaded.right_shift_logits)
    assert other != found[1][1], "and so does the shift"
    return loaded


def has_our_step(theirs: nn.Module, ours: nn.Module, kind: str, lora: bool, tokenizer: Any, folder: Path) -> None:
    """The trainer takes a model as its publisher built it: loss, gradients and saved names are those of our class."""
    ours.load_state_dict(theirs.state_dict())
    models = [theirs, ours]
    if lora:
        config, models = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), []
        for model in (theirs, ours):
            torch.manual_seed(5)
            models.append(peft.get_peft_model(model, copy.deepcopy(config)))
    results = []
    for model in models:
        trainer = make_trainer(model, tokenizer, folder, memory_for(kind), gradient_checkpointing=True)
        loss = trainer.compute_loss(model, train_batch(trainer))
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (expected, wanted) = results
    assert_close_relative(loss, expected, 1e-5)
    assert gradients.keys() == wanted.keys() and len(wanted) > 15
    for name, gradient in wanted.items():
        assert_close_relative(gradients[name], gradient, 1e-3, name)
    for model, name in zip(models, ("theirs", "ours"), strict=True):
        model.save_pretrained(folder / name)
    assert weights_of(folder / "theirs").keys() == weights_of(folder / "ours").keys()
