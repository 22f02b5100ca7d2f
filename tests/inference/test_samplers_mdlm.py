"""Low-confidence remasking: against a plain reference, batches against single prompts, and the approximations."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from conftest import ENCODER, KINDS, MASK
from dllms_samplers import assert_same, decoders
from naive_samplers import Denoiser, Draws, assert_every_step, assert_filled_in, cosine, decoder, linear, prompts
from torch import nn

from dllm_memdlm.compat.bundled import CosineAlphaScheduler
from dllm_memdlm.inference.samplers import MDLMSampler, MDLMSamplerConfig

NEW = 13

VARIANTS: dict[str, dict[str, Any]] = {
    "one_block": {},
    "fewer_steps": {"steps": 5},
    "more_steps_than_tokens": {"steps": 40},
    "blocks": {"block_size": 4, "steps": 9},
    "no_block_size": {"block_size": None, "steps": 6},
    "one_token_blocks": {"block_size": 1},
    "guided": {"cfg_scale": 0.8, "block_size": 5},
    "guided_keeping": {"cfg_scale": 1.5, "cfg_keep_tokens": list(range(3, 25))},
    "suppressed": {"suppress_tokens": list(range(5, 30)), "begin_suppress_tokens": [31, 32, 33, MASK], "steps": 7},
    "right_shift": {"right_shift_logits": True, "block_size": 6},
    "right_shift_guided": {"right_shift_logits": True, "cfg_scale": 0.5, "temperature": 0.5},
    "warm": {"temperature": 0.9, "steps": 6},
    "random": {"remasking": "random", "block_size": 5},
    "random_warm": {"remasking": "random", "temperature": 0.4, "cfg_scale": 0.3},
    "stochastic": {"stochastic_transfer": True, "steps": 8, "block_size": 7},
    "threshold": {"threshold": 0.2, "block_size": 6},
    "threshold_of_none": {"threshold": 1.0},
    "prefix": {"cache": "prefix", "block_size": 5},
    "dual": {"cache": "dual", "block_size": 5},
    "dual_right_shift": {"cache": "dual", "block_size": 5, "right_shift_logits": True, "temperature": 0.4},
    "prefix_right_shift": {"cache": "prefix", "block_size": 4, "right_shift_logits": True, "steps": 8},
    "dual_guided": {"cache": "dual", "block_size": 4, "cfg_scale": 0.9, "threshold": 0.25},
    "prefix_guided": {"cache": "prefix", "block_size": 7, "cfg_scale": 0.9, "remasking": "random"},
}
#: All on the fastest backbone, a few on each of the others.
CASES = [("llama", variant) for variant in VARIANTS] + [
    (kind, variant)
    for kind in ("llada_moe", "llada2")
    for variant in ("blocks", "right_shift_guided", "stochastic", "prefix", "dual_guided")
]
DRAWN = ("warm", "random", "random_warm", "stochastic", "right_shift_guided", "dual_right_shift", "prefix_guided")


def settings_of(**changes: Any) -> MDLMSamplerConfig:
    return MDLMSamplerConfig(**{"max_new_tokens": NEW, "block_size": NEW, "steps": NEW, "return_dict": True, **changes})


def naive(model: nn.Module, settings: MDLMSamplerConfig, seed: int | None = None, schedule: Any = linear) -> Denoiser:
    return Denoiser(model, settings, MASK, schedule, Draws(seed))


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_every_step_is_the_plain_samplers(kind, variant, tokenizer):
    model, settings = decoder(kind), settings_of(**VARIANTS[variant])
    plain = partial(naive, model, settings)
    assert_every_step(MDLMSampler(model, tokenizer), plain, settings, variant in DRAWN)


OURS = {"no_block_size"} | {name for name, changes in VARIANTS.items() if {"cache", "threshold"} & changes.keys()}
FILLED = [{}, {"block_size": 4}, {"temperature": 0.8}, {"cfg_scale": 0.7, "block_size": 5, "remasking": "random"}]
#: dllm's LLaDA2.1 takes no mask of two dimensions, which is what dllm's MDLMSampler passes.
MODELS = [*KINDS, ENCODER, *(f"{kind} of dllm" for kind in ("llada_moe", "llada", ENCODER))]


@pytest.mark.dllm
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        *(("llama of dllm", variant) for variant in VARIANTS if variant not in OURS),
        *((name, "right_shift_guided") for name in MODELS),
    ],
)
def test_every_step_is_dllms(name, variant, tokenizer):
    from dllm.core.samplers import MDLMSampler as Theirs
    from dllm.core.samplers import MDLMSamplerConfig as Config

    model, own_model = decoders(name)
    ours, theirs = MDLMSampler(own_model, tokenizer), Theirs(model, tokenizer)
    settings = {"max_new_tokens": NEW, "block_size": NEW, "steps": NEW, "return_dict": True}
    inputs = [torch.tensor(prompt) for prompt in prompts(7, 12, 3)]
    # Suppressed first tokens are all of confidence 0: a tie, which in dllm falls by how long the batch is.
    batches = [[prompt] for prompt in inputs] if variant == "suppressed" else [inputs]
    answers = [assert_same(ours, theirs, batch, Config(**settings | VARIANTS[variant])) for batch in batches]
    assert len({token for canvas in answers for token in canvas[:, 12:].flatten().tolist()}) > 3
    for row in inputs:
        row[1:3] = MASK
    for changes in FILLED:
        assert_same(ours, theirs, inputs, Config(**settings | {"block_size": None, "steps": 9} | changes), "infill")


def test_the_schedule_says_how_many_tokens_a_step_commits(tokenizer):
    model, settings, (prompt,) = decoder("llama"), settings_of(steps=6), prompts(5)
    output = MDLMSampler(model, tokenizer, CosineAlphaScheduler()).sample([prompt], settings)
    expected = naive(model, settings, schedule=cosine).sample(prompt, NEW)
    assert [canvas[0].tolist() for canvas in output.histories] == expected != naive(model, settings).sample(prompt, NEW)


@pytest.mark.parametrize("prompt", [[], torch.tensor([], dtype=torch.long), torch.tensor([5, 6, 7])])
@pytest.mark.parametrize("shift", [False, True])
def test_empty_prompts_tensors_and_a_length_that_counts_the_prompt(prompt, shift, tokenizer):
    """In a drawn order: on a canvas of masks alone every position is as sure as any other, up to rounding."""
    model, start = decoder("llama"), list(map(int, prompt)) or [tokenizer.bos_token_id] * shift
    settings = settings_of(right_shift_logits=shift, steps=4, remasking="random", temperature=0.7)
    expected = naive(model, settings, 3).sample(start, NEW)[-1]
    for changes in ({}, {"max_new_tokens": None, "max_length": len(start) + NEW}):
        output = MDLMSampler(model, tokenizer).sample([prompt], settings, [3], **changes)
        assert output.sequences[0].tolist() == expected


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"block_size": 4}),
        ("llama", {"block_size": 7, "steps": 6, "cfg_scale": 0.6}),
        ("llada2", {"temperature": 0.8, "block_size": 5}),
        ("llama", {"remasking": "random", "stochastic_transfer": True}),
        ("llada_moe", {"right_shift_logits": True}),
        ("llama", {"threshold": 0.2, "block_size": 6}),
    ],
)
@pytest.mark.parametrize("seeded", [False, True])
def test_filling_in_is_the_plain_samplers(kind, changes, seeded, tokenizer):
    model, settings = decoder(kind), settings_of(**{"block_size": None, "steps": 9, **changes})
    assert_filled_in(MDLMSampler(model, tokenizer), partial(naive, model, settings), settings, seeded)


def test_masks_that_the_model_chooses_stay_masks(tokenizer):
    """They count as committed. A later block may fill them in, but not in `infill`; as in dllm."""
    model = decoder("llama")
    with torch.no_grad():
        model.lm_head.weight[MASK] = 1.1 * model.lm_head.weight[42]
    row = [MASK] * 3 + prompts(5)[0] + [MASK] * 9
    sampler, plain = MDLMSampler(model, tokenizer), naive(model, settings_of(block_size=4, steps=4))
    sampled, filled = plain.sample(row, NEW), plain.infill(row, len(row))
    assert [c[0].tolist() for c in sampler.sample([row], plain.settings).histories] == sampled
    assert [c[0].tolist() for c in sampler.infill([row], plain.settings).histories] == filled
    assert MASK in filled[-1][:12]


def test_dual_computes_a_block_and_prefix_all_from_it_on(tokenizer):
    assert (MDLMSamplerConfig().cache, MDLMSamplerConfig().threshold) == ("none", None), "off by default"
    widths = {}
    for cache in ("none", "prefix", "dual"):
        model, seen = decoder("llada2"), widths.setdefault(cache, [])
        model.model.layers[0].register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape[1]))
        MDLMSampler(model, tokenizer).sample(prompts(10), max_new_tokens=8, block_size=4, steps=6, cache=cache)
    assert widths == {"none": [18] * 6, "prefix": [18, 8, 8, 18, 4, 4], "dual": [18, 4, 4, 18, 4, 4]}
