"""Training steps on one batch: dllm's plain MDLM, ours, ours with memory, and MemDLM written naively.

A step is the trainer's `compute_loss` and the backward pass. The optimizer, the same in all, is left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dllm_memdlm.backbones import with_lora
from dllm_memdlm.backbones.expert_names import split_names
from dllm_memdlm.config import LoraConfig, MemoryConfig
from dllm_memdlm.method import noise
from dllm_memdlm.method.fast_weights import FastWeights
from dllm_memdlm.method.reference import naive_step, one_by_one
from dllm_memdlm.method.trajectory import Trajectory, build_trajectory
from dllm_memdlm.training.trainer import MemDLMConfig, MemDLMTrainer

from . import models
from .naive_experts import plain_experts

PLAIN = MemoryConfig(enabled=False)
#: As published: fast weights shared by the batch.
PUBLISHED = MemoryConfig(scope="batch")
LORA = LoraConfig(dropout=0.0)

Step = Callable[[], float]


def adapted(name: str, dimensions: dict[str, Any]) -> nn.Module:
    """A model with an outer LoRA that has an effect."""
    torch.manual_seed(0)
    model = with_lora(models.build(name, dimensions), LORA).train()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.02)
    return model


def batch_of(vocabulary: int, lengths: list[int], ratio: int, memory: MemoryConfig) -> dict[str, Tensor]:
    """Random examples of these lengths, padded on the right.

    Prompt:response are as ratio:1, and half of every response is masked in the anchor.
    """
    size, length, position = len(lengths), torch.tensor(lengths)[:, None], torch.arange(max(lengths))
    own = position < length
    maskable = own & (position >= length * ratio // (ratio + 1))
    tokens = torch.randint(3, vocabulary, own.shape, generator=torch.Generator().manual_seed(1))
    tokens = tokens.masked_fill(~own, models.TOKENIZER.eos_token_id)
    keys, half = noise.example_keys(42, 0, torch.arange(size)), torch.full((size,), 0.5)
    trajectory = build_trajectory(tokens, maskable, half, half, keys, memory)
    batch = {"labels": tokens.masked_fill(~maskable, -100), **trajectory.to_batch()}
    return batch if own.all() else batch | {"attention_mask": own.long()}


def trainer_of(model: nn.Module, memory: MemoryConfig, args: MemDLMConfig | None = None) -> MemDLMTrainer:
    """A trainer that never logs in the middle of what is timed; on a CPU in float32 unless told otherwise."""
    arguments = _arguments(MemDLMConfig, model)
    trainer = MemDLMTrainer(model, memory=memory, **(arguments if args is None else {**arguments, "args": args}))
    trainer.state.logging_steps, trainer.state.global_step = 10**9, 1
    return trainer


def ours(trainer: MemDLMTrainer, batch: dict[str, Tensor]) -> Step:
    def loss() -> Tensor:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(trainer.model, dict(batch))

    return _step(trainer.model, loss)


def naive(model: nn.Module, batch: dict[str, Tensor], trainer: MemDLMTrainer) -> Step:
    """The step of a trainer with memory, written naively."""
    memory = trainer.memory_config

    def loss() -> Tensor:
        keys = trainer.memory.keys_of(Trajectory.from_batch(batch))
        start = FastWeights.initial(trainer.memory.shapes, memory, keys, keys.device)
        phi0 = [one_by_one(start.tensors, sample) for sample in range(start.samples)]
        with plain_experts(model):
            return naive_step(model, batch, phi0, memory, models.TOKENIZER.mask_token_id).loss

    return _step(model, loss)


def adapted_dllms(name: str, dimensions: dict[str, Any]) -> nn.Module:
    """dllm's model of the same weights, under the same LoRA. Raises ImportError without dllm."""
    import peft

    ours = adapted(name, dimensions)
    model = models.dllms(name, ours.unload()).train()
    linear = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    config = peft.LoraConfig(
        r=LORA.r, lora_alpha=LORA.alpha, lora_dropout=LORA.dropout, target_modules=sorted(linear - {"lm_head"})
    )
    theirs = peft.get_peft_model(model, config)
    theirs.load_state_dict(split_names(adapted(name, dimensions).state_dict()))
    return theirs


def dllms(model: nn.Module, batch: dict[str, Tensor]) -> Step:
    """dllm's MDLMTrainer on dllm's model. It draws its own masks, which its cost does not depend on."""
    from dllm.core.trainers import MDLMConfig, MDLMTrainer

    trainer = MDLMTrainer(model=model, **_arguments(MDLMConfig, model))
    inputs = {key: batch[key] for key in ("input_ids", "labels")}
    return _step(trainer.model, lambda: trainer.compute_loss(trainer.model, dict(inputs)))


def _step(model: nn.Module, loss_of: Callable[[], Tensor]) -> Step:
    def step() -> float:
        loss = loss_of()
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _arguments(config_class: type, model: nn.Module) -> dict[str, Any]:
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "eval_strategy": "no", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(output_dir=folder, gradient_checkpointing=checkpointed, **quiet)
        return {"args": args, "train_dataset": [{"input_ids": [1]}], "processing_class": models.TOKENIZER}
