"""The patch for precomputed noise: dllm's plain trainer on our collator's masks, and on its own as before."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import examples, make_tokenizer, make_trainer, scale_up, seq2seq, take_gradients
from patched_dllm import ALL, NOISE, told, with_patches
from steps import OFF
from stock_models import a2d_llama
from torch import Tensor, nn

from dllm_memdlm.compat.dllm_api import MDLMConfig, MDLMTrainer
from dllm_memdlm.training.example_ids import with_example_ids


class SameNoise(MDLMTrainer):
    """As in the README of the patches."""

    def _sample_noise(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return inputs["noise_level"], inputs["anchor_mask"]


def a2d_model() -> nn.Module:
    torch.manual_seed(0)
    model = a2d_llama()
    scale_up(model)
    return model.train()


def dllms_trainer(trainer: type, config: type, model: nn.Module, shift: bool, collator: Any = None) -> Any:
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "eval_strategy": "no", "dataloader_pin_memory": False}
    options = {"remove_unused_columns": False, "per_device_train_batch_size": 3, "right_shift_logits": shift}
    return trainer(
        args=config("runs", **options, **quiet),
        model=model,
        train_dataset=with_example_ids(examples(6, prompt=0)),
        data_collator=collator or seq2seq(make_tokenizer()),
        processing_class=make_tokenizer(),
    )


def step(trainer: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.detach(), take_gradients(trainer.model)


def print_steps_on_given_noise() -> None:
    """dllm's own model and trainers, and our trainer without memory, on a batch of our collator."""
    from dllm.core.trainers import BD3LMConfig, BD3LMTrainer

    class SameBlocks(SameNoise, BD3LMTrainer):
        pass

    results = []
    for shift in (False, True):
        model, data = a2d_model(), examples(6, prompt=0)
        ours = make_trainer(copy.deepcopy(model), make_tokenizer(), Path("ours"), OFF, data, right_shift_logits=shift)
        kinds = ((SameNoise, MDLMConfig), (SameBlocks, BD3LMConfig), (MDLMTrainer, MDLMConfig))
        theirs, blocks, ignoring = (dllms_trainer(*kind, model, shift, ours.data_collator) for kind in kinds)
        batch, calls = next(iter(theirs.get_train_dataloader())), []
        model.register_forward_pre_hook(lambda *call, calls=calls: calls.append(sorted(call[2])), with_kwargs=True)
        (our_loss, our_gradients), state = step(ours, batch), torch.get_rng_state()
        loss, gradients = step(theirs, batch)
        step(blocks, batch)
        drawn = not torch.equal(state, torch.get_rng_state())
        off = [(gradients[name] - gradient).norm() / gradient.norm() for name, gradient in our_gradients.items()]
        losses = (our_loss, loss, step(ignoring, batch)[0])
        results.append([*(loss.item() for loss in losses), max(off).item(), drawn, calls])
    print(json.dumps(results))


@pytest.mark.dllm
@with_patches((NOISE,))
def test_given_noise_is_used_as_in_our_trainer(tree):
    plain = ["attention_mask", "input_ids"]
    for ours, theirs, ignored, gradients, drawn, calls in told(print_steps_on_given_noise, tree):
        assert theirs == pytest.approx(ours, rel=1e-6) and gradients < 3e-6
        assert abs(ignored - ours) > 0.01 * ours, "without the override other noise is drawn"
        assert not drawn
        assert calls == [plain, [*plain, "position_ids"], plain], "nothing else of the batch reaches the model"


def print_drawn_steps() -> None:
    """Loss, gradients and the generator after a step, of dllm's trainers as they are."""
    from dllm.core.trainers import BD3LMConfig, BD3LMTrainer

    results = []
    kinds = ((MDLMTrainer, MDLMConfig, False), (MDLMTrainer, MDLMConfig, True), (BD3LMTrainer, BD3LMConfig, False))
    for trainer_class, config, shift in kinds:
        trainer = dllms_trainer(trainer_class, config, a2d_model(), shift)
        batch = next(iter(trainer.get_train_dataloader()))
        torch.manual_seed(1)
        loss, gradients = step(trainer, batch)
        data = b"".join(tensor.numpy().tobytes() for tensor in (loss, *gradients.values(), torch.get_rng_state()))
        results.append([loss.item(), hashlib.sha256(data).hexdigest()])
    print(json.dumps(results))


@pytest.mark.dllm
@with_patches(ALL)
def test_drawn_noise_gives_the_same_bits(tree, unpatched):
    drawn = told(print_drawn_steps, tree)
    assert drawn == told(print_drawn_steps, unpatched)
    assert len({loss for loss, _ in drawn}) == len(drawn)
