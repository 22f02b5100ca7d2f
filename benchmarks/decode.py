"""What decoding costs: LLaDA2.1 with and without its exact cache, and with dllm's sampler where dllm is installed;
batches; a memory of the prompt; and the approximations for LLaDA-MoE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from dllm_memdlm.compat import dllm_api
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.inference.samplers import LLaDA21Sampler, MDLMSampler
from dllm_memdlm.method.fast_weights import FastWeights
from dllm_memdlm.method.inner_loop import ParametricMemory
from dllm_memdlm.method.reference import Phi, one_by_one, write_naively
from dllm_memdlm.method.windows import prompt_trajectory

from . import models
from .naive_experts import plain_experts
from .report import Section
from .timing import side_by_side


@dataclass
class Size:
    """How much is decoded, and how often; repeats are fewer where one of them takes minutes."""

    dimensions: dict[str, dict[str, Any]]
    single: list[tuple[int, int, int]]  #: tokens of the prompt, steps a block, repeats
    batch: list[int]  #: tokens of each prompt
    memory: list[tuple[int, int]]  #: steps a block and repeats, with a memory of a prompt of `batch[0]` tokens
    moe_prompt: int  #: of LLaDA-MoE, which has no cache to make it fast and is timed once
    steps: int  #: a block, where the steps are not what is compared
    repeats: int
    new: int = 64
    block: int = 32
    #: Of LLaDA-MoE's logits: random weights are never 90 % sure of a token unless they are scaled up.
    sharpness: float = 6.0


FULL = Size(
    dimensions=models.FULL,
    single=[(1024, 32, 1), (1024, 8, 3), (4096, 2, 1)],
    batch=[1024, 768, 512, 256],
    memory=[(32, 1), (8, 3)],
    moe_prompt=256,
    steps=8,
    repeats=3,
)
QUICK = Size(models.QUICK, [(48, 8, 1), (96, 4, 1)], [48, 24, 8], [(4, 1)], 32, steps=4, repeats=1, new=16, block=8)

ROUTING_NOTE = (
    "The two round differently in float32. Where two experts are as good as equal, that can send a token through the "
    "other one, and change tokens."
)
STEPS_NOTE = (
    "Random weights are nowhere near as sure of a token as the threshold of 0.95 asks for, so each step commits "
    "block / steps tokens (`num_to_transfer`; 1 for the paper's 32 steps a block), and every block ends with one step "
    "more that finds nothing to edit."
)


class LLaDA21:
    """Ways to decode with one LLaDA2.1. Each returns the finished canvas."""

    def __init__(self, size: Size) -> None:
        self.size, self.dimensions = size, size.dimensions["LLaDA2.1"]
        self.model = models.build("LLaDA2.1", self.dimensions)
        self.sampler = LLaDA21Sampler(self.model, models.TOKENIZER)
        self.ways = {"cached": self.cached, "uncached": partial(self.cached, use_cache=False)}
        if dllm_api.HAS_DLLM:
            theirs = models.dllms_sampler(self.model)
            self.ways["dllm"] = lambda prompts, steps: theirs(prompts, **self.settings(steps))

    def settings(self, steps: int) -> dict[str, Any]:
        size = self.size
        return {"max_new_tokens": size.new, "block_size": size.block, "num_to_transfer": size.block // steps}

    def prompt(self, length: int, seed: int = 1) -> Tensor:
        return models.prompt(length, self.dimensions["vocab_size"], seed)

    def cached(self, prompts: list[Tensor], steps: int, **changes: Any) -> Tensor:
        return self.sampler.sample(prompts, **self.settings(steps), **changes)


def single_prompts(llada21: LLaDA21) -> Section:
    """Cached against uncached against dllm's sampler."""
    size = llada21.size
    section = Section(
        title=f"LLaDA2.1, one prompt, {size.new} new tokens in blocks of {size.block}",
        columns=[
            *("prompt", "steps a block", "repeats", "cached s", "uncached s", "uncached ÷ cached"),
            *("dllm's sampler and model s", "dllm ÷ cached"),
            *("tokens that differ uncached", "dllm's"),
        ],
        note=f"{STEPS_NOTE} {ROUTING_NOTE}",
    )
    for length, steps, repeats in size.single:
        prompts = [llada21.prompt(length)]
        llada21.cached(prompts, 1)
        timed = side_by_side({name: partial(way, prompts, steps) for name, way in llada21.ways.items()}, repeats)
        cached, uncached, dllm = (timed.get(name) for name in ("cached", "uncached", "dllm"))
        section.rows.append(
            [
                *(length, steps, repeats, cached.seconds, uncached.seconds, uncached.seconds / cached.seconds),
                *((None, None) if dllm is None else (dllm.seconds, dllm.seconds / cached.seconds)),
                _differing(uncached.result, cached.result),
                None if dllm is None else _differing(dllm.result, cached.result),
            ]
        )
    return section


def batches(llada21: LLaDA21) -> Section:
    """Prompts of several lengths at once, and one after the other."""
    size = llada21.size
    prompts = [llada21.prompt(length, seed) for seed, length in enumerate(size.batch)]
    cases = {
        "together": lambda: list(llada21.cached(prompts, size.steps)),
        "one by one": lambda: [llada21.cached([prompt], size.steps)[0] for prompt in prompts],
    }
    together, alone = side_by_side(cases, size.repeats).values()
    pairs = zip(together.result, alone.result, strict=True)
    differing = sum(_differing(row[: len(one)], one) for row, one in pairs)
    return Section(
        title=f"LLaDA2.1, cached, prompts of {', '.join(map(str, size.batch))} tokens, {size.steps} steps a block",
        columns=["repeats", "batch s", "one by one s", "one by one ÷ batch", "tokens that differ"],
        rows=[[size.repeats, together.seconds, alone.seconds, alone.seconds / together.seconds, differing]],
        note=ROUTING_NOTE,
    )


def memory_of_the_prompt(llada21: LLaDA21) -> Section:
    """Writing fast weights along the prompt's trajectory, and decoding with them held; and both done naively."""
    size, model = llada21.size, llada21.model
    memory = ParametricMemory(model, MemoryConfig(weighting="uniform"), models.TOKENIZER.mask_token_id)
    prompt = llada21.prompt(size.batch[0])
    key = torch.zeros(1, dtype=torch.int64)
    trajectory = prompt_trajectory(prompt[None], torch.ones(1, len(prompt), dtype=torch.bool), key, memory.config)
    start = FastWeights.initial(memory.shapes, memory.config, memory.keys_of(trajectory), key.device)

    def adapt() -> FastWeights:
        return memory.write(trajectory).fast_weights

    def adapt_naively() -> Phi:
        phi0 = one_by_one(start.tensors, 0)
        with plain_experts(model):
            return write_naively(model, trajectory.to_batch(), phi0, memory.config, memory.mask_token_id, False)[0]

    fast_weights = adapt()

    def held(way: str, steps: int) -> Tensor:
        with memory.holding(fast_weights):
            return llada21.ways[way]([prompt], steps)

    ours, naive = (t.seconds for t in side_by_side({"ours": adapt, "naive": adapt_naively}, size.repeats).values())
    section = Section(
        title=f"LLaDA2.1 with a memory of the prompt ({len(prompt)} tokens)",
        columns=["what", "repeats", "ours s", "naive s", "naive ÷ ours", "tokens that differ"],
        rows=[["adaptation (inner loop of 2 steps)", size.repeats, ours, naive, naive / ours, None]],
    )
    for steps, repeats in size.memory:
        timed = side_by_side({way: partial(held, way, steps) for way in ("cached", "uncached")}, repeats)
        cached, uncached = (t.seconds for t in timed.values())
        differing = _differing(timed["cached"].result, timed["uncached"].result)
        what, both = f"decoding, {steps} steps a block", (ours + cached, naive + uncached)
        section.rows.append([what, repeats, cached, uncached, uncached / cached, differing])
        section.rows.append([f"{what}, and adaptation", repeats, *both, both[1] / both[0], None])
    changed = _differing(timed["cached"].result, llada21.cached([prompt], steps))
    section.note = (
        "Naive: full forward passes with logits everywhere, one expert and one tensor after the other; and decoding "
        f"without the cache. Tokens that the memory changed, with {steps} steps a block: {changed}."
    )
    return section


def approximations(size: Size) -> Section:
    """LLaDA-MoE's exact sampler against those that keep keys and values, or commit all tokens that are sure enough."""
    dimensions = size.dimensions["LLaDA-MoE"]
    model = models.build("LLaDA-MoE", dimensions, size.sharpness)
    sampler = MDLMSampler(model, models.TOKENIZER)
    prompts = [models.prompt(size.moe_prompt, dimensions["vocab_size"])]
    ways: dict[str, dict[str, Any]] = {
        "exact": {},
        "cache=prefix": {"cache": "prefix"},
        "cache=dual": {"cache": "dual"},
        "threshold=0.9": {"threshold": 0.9},
        "cache=dual, threshold=0.9": {"cache": "dual", "threshold": 0.9},
    }
    settings = {"max_new_tokens": size.new, "block_size": size.block, "steps": size.new, "return_dict": True}
    sampler.sample(prompts, **{**settings, "steps": 1})
    timed = side_by_side({name: partial(sampler.sample, prompts, **settings, **own) for name, own in ways.items()}, 1)
    exact = timed["exact"]
    section = Section(
        title=f"LLaDA-MoE, prompt of {size.moe_prompt} tokens, {size.new} new ones in blocks of {size.block}",
        columns=["sampler", "steps", "seconds", "exact ÷ this", "tokens that differ from exact"],
        note=f"Timed once; random weights with logits times {size.sharpness:g}, or none would reach the threshold. How "
        "many tokens differ says nothing about a trained model.",
    )
    for name, t in timed.items():
        differing = f"{_differing(t.result.sequences, exact.result.sequences)} of {size.new}"
        section.rows.append([name, len(t.result.histories) - 1, t.seconds, exact.seconds / t.seconds, differing])
    return section


def _differing(a: Tensor, b: Tensor) -> int:
    return int((a != b).sum())


def sections(size: Size) -> dict[str, Callable[[], Section]]:
    """What is measured, by name."""
    llada21 = cache(partial(LLaDA21, size))
    return {
        "one prompt": lambda: single_prompts(llada21()),
        "a batch": lambda: batches(llada21()),
        "a memory of the prompt": lambda: memory_of_the_prompt(llada21()),
        "approximations": lambda: approximations(size),
    }
