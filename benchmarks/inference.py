"""Adapting to a prompt and decoding with the memory of it, at full size with random weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from dllm_memdlm.backbones import staged_backbone
from dllm_memdlm.backbones.llada2_moe import LLaDA2MoeModelLM
from dllm_memdlm.inference.samplers import LLaDA21Sampler, MDLMSampler
from dllm_memdlm.method.inner_loop import ParametricMemory
from dllm_memdlm.method.prompt_memory import PromptMemory, at_inference
from dllm_memdlm.training.recipe import Recipe

from . import models
from .device import finish, memory, waits
from .report import Section

GIB = 2**30


def section() -> Section:
    return Section(
        title="Decoding at full size",
        columns=["model", "what", "s", "tokens/s", "peak GiB", "waits"],
        note="One prompt; the LoRA beside the base, not merged, as an adapter is loaded; the second of two calls. "
        "Peaks beyond what was held before.",
    )


def measure(name: str, model: nn.Module, recipe: Recipe, table: Section, save: Callable[[str], Any]) -> list[str]:
    """A forward pass, adaptation and decoding at 4,096 tokens, adaptation at 32,768; a row for each.

    Returns what could not be measured, and why.
    """
    device, faults = recipe.training.device, []
    cpu = device.type == "cpu"
    length, long, new, block = (48, 96, 8, 4) if cpu else (4096, 32768, 64, 32)
    backbone = staged_backbone(model.eval().requires_grad_(False))
    prompt, long_prompt = (models.prompt(n, backbone.config.vocab_size).to(device) for n in (length, long))
    written = ParametricMemory(model, at_inference(recipe.memory), models.TOKENIZER.mask_token_id)
    if isinstance(backbone, LLaDA2MoeModelLM):
        sampler: Any = LLaDA21Sampler(model, models.TOKENIZER)
        settings = {"max_new_tokens": new, "block_size": block, "num_to_transfer": 2}
    else:
        sampler = MDLMSampler(model, models.TOKENIZER)
        settings = {"max_new_tokens": new, "block_size": block, "steps": new // 2}

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=prompt[None], positions=torch.zeros(1, 1, dtype=torch.long, device=device))

    def decode() -> None:
        sampler.sample([prompt], **settings)

    def decode_with_memory() -> None:
        with written.holding(remembered[0]):
            decode()

    def adapt(text: torch.Tensor, attention: str = "full") -> None:
        prompts = PromptMemory(written, attention=attention)
        remembered[:] = [prompts.recall([text])]
        if prompts.tally.failures():
            raise RuntimeError(f"left without memory: {prompts.tally.failures()}")

    remembered: list[Any] = []

    def row(what: str, work: Callable[[], Any], tokens: int | None = None, again: bool = True) -> None:
        try:
            if again:
                work()
            with memory(device) as taken, waits(device) as waited:
                start = time.perf_counter()
                work()
                finish(device)
                seconds = time.perf_counter() - start
        except Exception as error:  # whatever it is, the next row may do
            faults.append(f"{name}, {what}: {type(error).__name__}: {error}")
            return
        speed = None if tokens is None else tokens / seconds
        table.rows.append([name, what, seconds, speed, taken.peak / GIB, sum(waited.values())])
        save(f"{name}: {what}")

    row(f"forward, {length:,} tokens", forward)
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            row("the same without the LoRA", forward)
    row(f"adapting to {length:,} tokens", lambda: adapt(prompt))
    row(f"decoding {new} tokens with memory", decode_with_memory, new)
    row(f"decoding {new} tokens", decode, new)
    row(f"adapting to {long:,} tokens", lambda: adapt(long_prompt), again=False)
    row("the same, block by block", lambda: adapt(long_prompt, "block_causal"), again=False)
    return faults
