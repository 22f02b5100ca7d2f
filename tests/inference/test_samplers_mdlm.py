"""Low-confidence remasking: against a plain reference, batches against single prompts, and the approximations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import EOS, MASK
from naive_samplers import Denoiser, Draws, cosine, decoder, linear, moves, prompts
from torch import Tensor, nn

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
every_case = pytest.mark.parametrize(("kind", "variant"), CASES)


def settings_of(**changes: Any) -> MDLMSamplerConfig:
    return MDLMSamplerConfig(**{"max_new_tokens": NEW, "block_size": NEW, "steps": NEW, "return_dict": True, **changes})


def naive(model: nn.Module, settings: MDLMSamplerConfig, seed: int | None = None, schedule: Any = linear) -> Denoiser:
    return Denoiser(model, settings, MASK, schedule, Draws(seed))


def of_row(histories: list[Tensor], row: int, length: int) -> list[list[int]]:
    """The canvases of one row of a batch without its padding, and without the steps in which it stood still."""
    canvases = [canvas[row].tolist() for canvas in histories]
    assert all(set(canvas[length:]) <= {EOS} for canvas in canvases)
    return moves([canvas[:length] for canvas in canvases])


@every_case
def test_every_step_is_the_plain_samplers(kind, variant, tokenizer):
    """Alone with torch's global generator, in the order in which dllm draws from it; in a batch each with its seed."""
    model, settings, seeds = decoder(kind), settings_of(**VARIANTS[variant]), [7, 8, 7]
    sampler, inputs = MDLMSampler(model, tokenizer), prompts(9, 4, 12)
    torch.manual_seed(5)
    expected = naive(model, settings).sample(inputs[0], NEW)
    torch.manual_seed(5)
    output = sampler.sample(inputs[:1], settings)
    assert [canvas.tolist() for canvas in output.histories] == [[canvas] for canvas in expected]
    assert output.sequences.tolist() == [expected[-1]]
    assert settings.temperature > 0 or MASK not in expected[-1]
    assert len(set(expected[-1][9:])) > 2, "a canvas of one token would hide mistakes"

    together = sampler.sample(inputs, settings, seeds)
    assert together.sequences.shape == (3, 12 + NEW)
    for row, (prompt, seed) in enumerate(zip(inputs, seeds, strict=True)):
        expected = naive(model, settings, seed).sample(prompt, NEW)
        assert of_row(together.histories, row, len(prompt) + NEW) == moves(expected)
    if variant in DRAWN:
        others = sampler.sample(inputs, settings, [1, 2, 3])
        assert [h.tolist() for h in others.histories] != [h.tolist() for h in together.histories]


def test_the_schedule_says_how_many_tokens_a_step_commits(tokenizer):
    model, settings, (prompt,) = decoder("llama"), settings_of(steps=6), prompts(5)
    output = MDLMSampler(model, tokenizer, CosineAlphaScheduler()).sample([prompt], settings)
    expected = naive(model, settings, schedule=cosine).sample(prompt, NEW)
    assert [canvas[0].tolist() for canvas in output.histories] == expected != naive(model, settings).sample(prompt, NEW)


@pytest.mark.parametrize("seeds", [None, [4, 5]])
def test_masks_that_a_prompt_brings_along(seeds, tokenizer):
    """They are text: the sampler does not fill them in, nor in their place less of the answer, as dllm does."""
    model, settings = decoder("llada_moe"), settings_of(block_size=5, temperature=0.0 if seeds is None else 0.7)
    inputs = prompts(8, 6)
    inputs[0][2:5] = [MASK] * 3
    inputs[1][0] = MASK
    output = MDLMSampler(model, tokenizer).sample(inputs, settings, seeds)
    for row, prompt in enumerate(inputs):
        expected = naive(model, settings, seeds and seeds[row]).sample(prompt, NEW)
        assert of_row(output.histories, row, len(prompt) + NEW) == expected
        assert expected[-1][: len(prompt)] == prompt and MASK not in expected[-1][len(prompt) :]


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
    inputs = prompts(14, 6, 9)
    for row in inputs:
        row[2:5] = [MASK] * 3
    inputs[0][8:13] = [MASK] * 5
    inputs[2][0] = MASK
    for batch in [inputs] if seeded else [[row] for row in inputs]:
        seeds = [3, 4, 5] if seeded else None
        torch.manual_seed(2)
        output = MDLMSampler(model, tokenizer).infill(batch, settings, seeds)
        for row, canvas in enumerate(batch):
            torch.manual_seed(2)
            expected = naive(model, settings, seeds and seeds[row]).infill(canvas, max(map(len, batch)))
            assert of_row(output.histories, row, len(canvas)) == moves(expected)
            assert settings.temperature > 0 or MASK not in expected[-1]
            assert all(a == b for a, b in zip(canvas, expected[-1], strict=True) if a != MASK)


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
