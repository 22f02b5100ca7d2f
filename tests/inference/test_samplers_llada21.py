"""LLaDA2.1's block diffusion: against a plain reference, cached against uncached, batches against single prompts."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from conftest import EOS, KINDS, MASK
from naive_samplers import Canvas, Draws, block_diffusion, decoder, moves, prompts
from torch import Tensor, nn

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.inference.samplers import LLaDA21Sampler, LLaDA21SamplerConfig, llada21
from dllm_memdlm.method.fast_weights import FastWeights
from dllm_memdlm.method.inner_loop import ParametricMemory

NEW, SIZE = 13, 4
#: Of two blocks and a bit, within the first block, at the end of a block, and longer.
LENGTHS = (9, 3, 8, 18)


def settings_of(**changes: Any) -> LLaDA21SamplerConfig:
    return LLaDA21SamplerConfig(**{"max_new_tokens": NEW, "block_size": SIZE, "return_dict": True, **changes})


def naive(model: nn.Module, prompt: Canvas, settings: LLaDA21SamplerConfig, seed: int | None = None) -> list[Canvas]:
    return block_diffusion(model, prompt, settings, MASK, EOS, Draws(seed))


def of_row(histories: list[Tensor], row: int) -> list[Canvas]:
    return [canvas[row].tolist() for canvas in histories]


VARIANTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "paper": {"editing_threshold": None, "block_steps": 5},
    "few_steps": {"block_steps": 3, "threshold": 0.6, "editing_threshold": 0.3, "max_post_steps": 2},
    "editing": {"threshold": 0.3, "editing_threshold": 0.2},
    "one_post_step": {"threshold": 0.3, "editing_threshold": 0.05, "max_post_steps": 1},
    "no_post_step": {"threshold": 0.2, "editing_threshold": 0.05, "max_post_steps": 0},
    "several_a_step": {"num_to_transfer": 3, "threshold": 0.3, "max_post_steps": 3},
    "more_than_a_block": {"num_to_transfer": 9, "editing_threshold": 0.3, "max_post_steps": 5},
    "all_at_once": {"threshold": 0.0, "editing_threshold": 0.1, "max_post_steps": 3},
    "one_token_blocks": {"block_size": 1, "editing_threshold": 0.1, "max_post_steps": 2},
    "large_blocks": {"block_size": 16, "threshold": 0.3, "editing_threshold": 0.3, "max_post_steps": 4},
    "warm": {"temperature": 0.7, "threshold": 0.4, "editing_threshold": 0.5, "max_post_steps": 2},
    "warm_top_k": {"temperature": 1.1, "top_k": 5, "threshold": 0.4, "editing_threshold": 0.2, "max_post_steps": 1},
    "warm_top_p": {"temperature": 1.3, "top_p": 0.6, "top_k": 30, "editing_threshold": 0.2, "max_post_steps": 1},
    "max_length": {"max_new_tokens": None, "max_length": 26},
}
WARM = ("warm", "warm_top_k", "warm_top_p")


#: All on the fastest backbone, a few on each of the others.
CASES = [("llama", variant) for variant in VARIANTS] + [
    (kind, variant) for kind in ("llada2", "llada_moe") for variant in ("one_post_step", "warm_top_k")
]


# === against the reference ===


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_every_step_is_the_plain_samplers(kind, variant, tokenizer):
    model, settings = decoder(kind), settings_of(**VARIANTS[variant])
    for prompt in prompts(*LENGTHS[: len(LENGTHS) if kind == "llama" else 1]):
        torch.manual_seed(5)
        expected = naive(model, prompt, settings)
        for cached in (True, False):
            torch.manual_seed(5)
            output = LLaDA21Sampler(model, tokenizer).sample([prompt], settings, use_cache=cached)
            assert of_row(output.histories, 0) == expected
            assert output.sequences.tolist() == [expected[-1]]
        assert expected[-1][: len(prompt)] == prompt


@pytest.mark.parametrize("cached", [True, False])
def test_an_empty_prompt(cached, tokenizer):
    """All positions are equally sure to begin with, so they are committed together."""
    model, settings = decoder("llada2"), settings_of(threshold=0.0, editing_threshold=0.3, use_cache=cached)
    output = LLaDA21Sampler(model, tokenizer).sample([[]], settings)
    assert of_row(output.histories, 0) == naive(model, [], settings)


def test_the_settings_matter(tokenizer):
    """Each of these variants edits, stops or draws otherwise, or the tests above would show little."""
    model = decoder("llama")
    (prompt,) = prompts(9)
    histories = [str(naive(model, prompt, settings_of(**changes))) for changes in VARIANTS.values()]
    assert len(set(histories)) == len(VARIANTS)
    steps = naive(model, prompt, settings_of(**VARIANTS["editing"]))
    edited = [a for a, b in itertools.pairwise(steps) if any(x not in (y, MASK) for x, y in zip(a, b, strict=True))]
    assert edited, "no token was ever edited"
    assert len(set(steps[-1][9:])) > 3


def test_masks_that_a_prompt_brings_along(tokenizer):
    """They are text and stay, those in the block that is continued too, which dllm fills in."""
    model, settings = decoder("llada2"), settings_of(editing_threshold=0.3)
    (prompt,) = prompts(10)
    prompt[1] = prompt[9] = MASK
    for cached in (True, False):
        output = LLaDA21Sampler(model, tokenizer).sample([prompt], settings, use_cache=cached)
        expected = naive(model, prompt, settings)
        assert of_row(output.histories, 0) == expected
    assert [i for i, token in enumerate(expected[-1]) if token == MASK] == [1, 9]


# === a batch ===


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_a_batch_is_as_many_prompts_alone(kind, variant, cached, tokenizer):
    """Each at its own pace; random numbers included."""
    sampler, settings = LLaDA21Sampler(decoder(kind), tokenizer), settings_of(**VARIANTS[variant])
    inputs, seeds = prompts(*LENGTHS), [7, 8, 9, 7]
    together = sampler.sample(inputs, settings, seeds, use_cache=cached)
    for row, (prompt, seed) in enumerate(zip(inputs, seeds, strict=True)):
        alone = sampler.sample([prompt], settings, [seed], use_cache=True)
        length = alone.sequences.shape[1]
        assert set(together.sequences[row, length:].tolist()) <= {EOS}
        steps = [canvas[:length] for canvas in of_row(together.histories, row)]
        assert moves(steps) == moves(of_row(alone.histories, 0))
    if variant in WARM:
        others = sampler.sample(inputs, settings, [1, 2, 3, 4], use_cache=cached)
        assert not torch.equal(others.sequences, together.sequences)


@pytest.mark.parametrize("variant", WARM)
def test_a_seed_is_the_plain_samplers(variant, tokenizer):
    model, settings = decoder("llama"), settings_of(**VARIANTS[variant])
    (prompt,) = prompts(9)
    output = LLaDA21Sampler(model, tokenizer).sample([prompt], settings, [11])
    assert of_row(output.histories, 0) == naive(model, prompt, settings, 11)


# === where the text ends ===


def ending(model: nn.Module, scale: float) -> nn.Module:
    """Likelier, or less likely, to choose end of sequence."""
    with torch.no_grad():
        model.lm_head.weight[EOS] *= scale
    return model


@pytest.mark.parametrize("cached", [True, False])
def test_early_stop_ends_with_the_block_of_the_end(cached, tokenizer):
    model = ending(decoder("llama"), 0.7)
    inputs = prompts(9, 3, 14, 8)
    inputs[0][2] = EOS  # of the prompt, which ends nothing
    settings = settings_of(max_new_tokens=24, eos_early_stop=True, use_cache=cached)
    together = LLaDA21Sampler(model, tokenizer).sample(inputs, settings)
    stopped = []
    for row, prompt in enumerate(inputs):
        expected = naive(model, prompt, settings)
        steps = [canvas[: len(expected[0])] for canvas in of_row(together.histories, row)]
        assert moves(steps) == moves(expected)
        stopped.append(MASK in expected[-1])
        assert stopped[-1] <= (EOS in expected[-1][len(prompt) :])
    assert stopped == [False, False, True, False], "one should end early"


# === the cache ===


@pytest.mark.parametrize("prefill", [1, 4, 5, 9, 1000])
def test_prompts_of_several_chunks(prefill, tokenizer, monkeypatch):
    model = decoder("llada2")
    sampler, settings = LLaDA21Sampler(model, tokenizer), settings_of(editing_threshold=0.2, max_post_steps=2)
    inputs = prompts(19, 40, 3)
    expected = sampler.sample(inputs, settings, use_cache=False)
    monkeypatch.setattr(llada21, "PREFILL", prefill)
    widths = []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    output = sampler.sample(inputs, settings)
    for row in range(len(inputs)):
        assert moves(of_row(output.histories, row)) == moves(of_row(expected.histories, row))
    chunk = max(1, prefill // SIZE) * SIZE
    chunks = [min(chunk, 40 - start) for start in range(0, 40, chunk)]
    assert widths[: len(chunks)] == chunks and set(widths[len(chunks) :]) == {SIZE}


def test_a_block_that_ended_by_an_edit_is_computed_once_more(tokenizer):
    """Its keys and values must be those of its last tokens. The pass is no step."""
    (prompt,) = prompts(2 * SIZE)
    extra = {}
    for post_steps in (0, 16):
        model, calls = decoder("llada2"), []
        settings = settings_of(max_new_tokens=3 * SIZE, editing_threshold=1.0, max_post_steps=post_steps)
        model.model.layers[0].register_forward_pre_hook(lambda _, inputs, calls=calls: calls.append(inputs))
        histories = LLaDA21Sampler(model, tokenizer).sample([prompt], settings).histories
        extra[post_steps] = len(calls) - 1 - (len(histories) - 1)  # beyond the prefill and the steps
    assert extra == {0: 2, 16: 0}, "every block but the last ends by a change, or none does"


class Held(NamedTuple):
    memory: ParametricMemory
    fast: FastWeights


def held(model: nn.Module, rows: int) -> Held:
    """Fast weights of each row that change what it decodes."""
    memory = ParametricMemory(model, MemoryConfig(rank=4, layer_fraction=0.4), mask_token_id=MASK)
    fast = FastWeights.initial(memory.shapes, memory.config, torch.arange(rows), torch.get_default_device())
    generator = torch.Generator().manual_seed(2)
    drawn = {k: torch.randn(v.shape, generator=generator, dtype=torch.float64) * 0.3 for k, v in fast.tensors.items()}
    return Held(memory, FastWeights(drawn, fast.scaling))


def of_sample(fast: FastWeights, sample: int) -> FastWeights:
    return FastWeights({k: v[..., sample : sample + 1, :, :] for k, v in fast.tensors.items()}, fast.scaling)


@pytest.mark.parametrize("kind", KINDS)
def test_with_fast_weights_of_each_sample_held(kind, tokenizer):
    """Cached, uncached, in a batch and alone: the tokens of the reference with the row's own fast weights."""
    model = decoder(kind)
    sampler, settings = LLaDA21Sampler(model, tokenizer), settings_of(editing_threshold=0.2, max_post_steps=1)
    inputs = prompts(9, 3)
    memory, fast = held(model, len(inputs))
    with memory.holding(fast):
        together = [sampler.sample(inputs, settings, use_cache=cached).histories for cached in (True, False)]
    plain = sampler.sample(inputs, settings).sequences
    for row, prompt in enumerate(inputs):
        with memory.holding(of_sample(fast, row)):
            expected = naive(model, prompt, settings)
        for histories in together:
            steps = [canvas[: len(expected[0])] for canvas in of_row(histories, row)]
            assert moves(steps) == moves(expected)
            assert plain[row].tolist() != histories[-1][row].tolist()


# === what else a caller may rely on ===


@pytest.mark.parametrize("cached", [True, False])
def test_in_bfloat16(cached, tokenizer):
    sampler = LLaDA21Sampler(decoder("llada2", torch.bfloat16), tokenizer)
    settings = settings_of(threshold=0.3, editing_threshold=0.3, use_cache=cached)
    for changes in ({}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}):
        output = sampler.sample(prompts(9, 3), settings, [1, 2], **changes)
        assert output.sequences.dtype == torch.long and not (output.sequences == MASK)[0].any()


@pytest.mark.parametrize("cached", [True, False])
def test_steps_yield_the_canvas_as_it_changes(cached, tokenizer):
    sampler, settings = LLaDA21Sampler(decoder("llada2"), tokenizer), settings_of(use_cache=cached)
    (prompt,) = prompts(9)
    canvases = sampler.steps([prompt], settings)
    first = next(canvases)
    assert first.tolist() == [prompt + [MASK] * (24 - 9)]
    assert torch.is_grad_enabled(), "between two steps the caller's own mode holds"
    seen = [first.clone()]
    for canvas in canvases:
        assert canvas is first
        seen.append(canvas.clone())
    assert [c.tolist() for c in seen] == [c.tolist() for c in sampler.sample([prompt], settings).histories]


def test_without_return_dict_the_canvas_alone(tokenizer):
    sampler = LLaDA21Sampler(decoder("llada2"), tokenizer)
    alone = sampler.sample(prompts(6), settings_of(return_dict=False))
    assert torch.equal(alone, sampler.sample(prompts(6), settings_of()).sequences)


def test_it_cannot_fill_in(tokenizer):
    with pytest.raises(TypeError, match=r"MDLMSampler\.infill can"):
        LLaDA21Sampler(decoder("llada2"), tokenizer).infill(prompts(5))
