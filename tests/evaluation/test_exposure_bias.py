"""Exposure bias: both trajectories as in a plain reference; the command is in test_exposure_command.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from typing import Any

import pytest
import torch
from conftest import MASK, tiny
from inputs import poisoned
from saved_models import pretrained_of, prompt_memory, random_prompts
from steps import memory_for
from torch import Tensor, nn

from benchmarks.naive_experts import plain_experts
from dllm_memdlm.config import ConfigError
from dllm_memdlm.evaluation.exposure_bias import DenoisingStep, Example, exposure_bias
from dllm_memdlm.inference.decoding import Decoder
from dllm_memdlm.method.reference import adapted, one_by_one

#: Responses longer and shorter than the steps, behind prompts of other lengths.
EXAMPLES = list(map(Example, random_prompts(9, 3, 14, 1), random_prompts(11, 2, 6, 9, seed=1)))
STEPS = 7


def example_of(prompt: int, response: int) -> Example:
    return Example(*random_prompts(prompt), *random_prompts(response, seed=1))


def decoder_of(kind: str, memory: bool = False, shift: bool = False, **settings: Any) -> Decoder:
    model = tiny(kind)
    own = prompt_memory(model, memory_for(kind), shift) if memory else None
    return Decoder(pretrained_of(model, shift=shift), memory=own, **settings)


def numbers(steps: list[DenoisingStep]) -> Tensor:
    """Both losses [2, S], float64."""
    return torch.tensor([[step.static, step.sequential] for step in steps], dtype=torch.float64).T


def left_at(length: int, step: int, steps: int) -> int:
    """How many tokens are still masked."""
    return math.ceil(length * (1 - Fraction(step, steps)))


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Tensor]]:
    """The tokens [B, L] that the model sees, forward by forward."""
    seen: list[Tensor] = []
    with model.register_forward_pre_hook(lambda *given: seen.append(given[2]["input_ids"].clone()), with_kwargs=True):
        yield seen


def states_of(decoder: Decoder, example: Example, steps: int, **settings: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The states [n] of a response on the two trajectories: the true ones, and the model's own."""
    with recorded(decoder.pretrained.model) as seen:
        exposure_bias(decoder, [example], steps, **settings)
    first, *later = (tokens[0] for tokens in seen)
    assert all(state[: len(example.prompt)].tolist() == example.prompt for state in (first, *later))
    responses = [state[len(example.prompt) :] for state in (first, *later)]
    return responses[:1] + responses[2::2], responses[:1] + responses[1::2]


def log_probabilities(decoder: Decoder, canvas: Tensor) -> Tensor:
    """Of each token at each position [L, V], from logits everywhere."""
    with torch.no_grad():
        logits = decoder.pretrained.model(input_ids=canvas[None]).logits[0].double()
    if decoder.pretrained.right_shift_logits:
        logits = torch.cat([logits[:1], logits[:-1]])
    return logits.log_softmax(-1)


@contextmanager
def remembering(decoder: Decoder, prompt: list[int]) -> Iterator[None]:
    """The fast weights of a prompt, added to the linear layers one by one."""
    fast = None if decoder.memory is None else decoder.memory.recall([prompt])
    with ExitStack() as stack:
        stack.enter_context(plain_experts(decoder.pretrained.model))
        if fast is not None:
            stack.enter_context(adapted(decoder.pretrained.model, one_by_one(fast.tensors, 0), fast.scaling))
        yield


def plain_sums(decoder: Decoder, example: Example, steps: int, true_states: list[Tensor]) -> Tensor:
    """Static and sequential NLL sums of one example at each step [2, S]. Only the random masks are given."""
    clean, start = torch.tensor([*example.prompt, *example.response]), len(example.prompt)
    masked = {int((state == MASK).sum()): start + (state == MASK).nonzero()[:, 0] for state in true_states}
    canvas, sums = clean.index_fill(0, torch.arange(start, len(clean)), MASK), []
    for step in range(steps):
        left, own = left_at(len(example.response), step, steps), (canvas == MASK).nonzero()[:, 0]
        if len(own) > left:
            # the state before, from which all tokens of this step are committed at once
            found = log_probabilities(decoder, canvas)
            found[:, MASK] = -math.inf
            sure, best = found.softmax(-1).max(-1)
            surest = sorted(own.tolist(), key=lambda i: -sure[i])[: len(own) - left]
            canvas[surest] = best[surest]
            own = (canvas == MASK).nonzero()[:, 0]
        true = masked[left]
        assert len(true) == len(own) == left
        seen, found = log_probabilities(decoder, clean.index_fill(0, true, MASK)), log_probabilities(decoder, canvas)
        sums.append(torch.stack([-seen[true, clean[true]].sum(), -found[own, clean[own]].sum()]))
    return torch.stack(sums, 1)


def plain(decoder: Decoder, examples: list[Example], steps: int) -> Tensor:
    """Both losses [2, S], from one example after the other."""
    totals = torch.zeros(2, steps, dtype=torch.float64)
    for example in examples:
        true, _ = states_of(Decoder(decoder.pretrained), example, steps)
        with remembering(decoder, example.prompt):
            totals += plain_sums(decoder, example, steps, true)
    return totals / torch.tensor([sum(left_at(len(e.response), s, steps) for e in examples) for s in range(steps)])


@pytest.mark.parametrize(
    ("kind", "memory", "shift"),
    [("llada_moe", True, False), ("llada2", False, False), ("llama", True, True)],
)
def test_both_losses_are_those_of_the_plain_reference(kind, memory, shift):
    decoder = decoder_of(kind, memory, shift=shift)
    found, expected = (measure(decoder, EXAMPLES, STEPS) for measure in (exposure_bias, plain))
    torch.testing.assert_close(numbers(found), expected, rtol=1e-4, atol=0)
    assert [step.ratio for step in found] == pytest.approx((expected[1] / expected[0]).tolist(), rel=2e-4)
    assert [step.step for step in found] == list(range(STEPS))
    assert DenoisingStep(0, 1.0, 0.0, 0.5, 3).ratio is None, "certainty has no ratio"
    assert numbers(found).diff(dim=0).abs()[0, 1:].mean() > 0.05, "the two trajectories should differ"
    without = numbers(exposure_bias(Decoder(decoder.pretrained), EXAMPLES, STEPS))
    assert ((numbers(found) - without).abs().mean(1) > 0.05).tolist() == [memory] * 2, "it should matter in both"


@pytest.mark.parametrize("shift", [False, True])
def test_an_empty_prompt_has_no_memory(shift):
    """The static loss alone: where all is masked, the confidences are equal but for rounding."""
    decoder, example = decoder_of("llama", memory=True, shift=shift), Example([], *random_prompts(9))
    found, without = (numbers(exposure_bias(d, [example], 3)) for d in (decoder, Decoder(decoder.pretrained)))
    torch.testing.assert_close(found[0], without[0])
    assert decoder.memory.tally.without == 1 and found.isfinite().all()


@pytest.mark.parametrize("length", [101, 13])
def test_the_right_number_stays_masked_and_nothing_is_masked_again(length):
    decoder, example = decoder_of("llada2"), example_of(5, length)
    counts = [left_at(length, step, 48) for step in range(48)]
    for states in states_of(decoder, example, 48):
        masked = [state == MASK for state in states]
        assert [int(mask.sum()) for mask in masked] == sorted(set(counts), reverse=True), "idle steps cost nothing"
        for before, after, mask in zip(states, states[1:], masked, strict=False):
            assert torch.equal(before[~mask], after[~mask]), "what is decided stays"
    found = exposure_bias(decoder, [example], 48)
    assert [step.tokens for step in found] == counts and min(counts) >= 1
    assert found[0].ratio == 1 and (found[0].masked_ratio, found[-1].masked_ratio) == (1, pytest.approx(1 / 48))


def test_the_true_states_are_the_clean_tokens_under_masks_of_the_seed_and_the_example():
    decoder, (prompt, other), (response,) = decoder_of("llama"), random_prompts(8, 8), random_prompts(30, seed=1)
    example = Example(prompt, response)
    true, again = (states_of(decoder, example, 10)[0] for _ in range(2))
    assert all(((state == MASK) | (state == torch.tensor(response))).all() for state in true)
    assert all(map(torch.equal, true, again))
    for changed, seed in ((example, 1), (Example(other, response), 0)):
        assert not any(map(torch.equal, true[1:], states_of(decoder, changed, 10, seed=seed)[0][1:]))
    with recorded(decoder.pretrained.model) as seen:  # in company
        exposure_bias(decoder, [Example(other, response[:3]), Example(other, [*response, 5, 6]), example], 10)
    inside = [tokens[1, len(prompt) : example.length] for tokens in (seen[0], *seen[2::2])]
    assert all(map(torch.equal, true, inside))


def test_every_token_is_as_likely_to_be_masked():
    decoder, examples = decoder_of("llama"), [Example(prompt, [7] * 6) for prompt in random_prompts(*[4] * 600)]
    with recorded(decoder.pretrained.model) as seen:
        exposure_bias(decoder, examples, 2, batch_size=600)
    assert (seen[2][:, 4:] == MASK).float().mean(0).tolist() == pytest.approx([0.5] * 6, abs=0.06)


def test_a_mask_is_never_an_answer():
    decoder, example = decoder_of("llada_moe"), example_of(7, 20)
    decoder.pretrained.model.lm_head.weight[MASK] *= 30
    found = log_probabilities(decoder, torch.tensor([*example.prompt, *[MASK] * 20]))[7:]
    assert (found.argmax(-1) == MASK).any(), "the model should want to"
    _, own = states_of(decoder, example, 10)
    assert [int((state == MASK).sum()) for state in own] == list(range(20, 0, -2))


@pytest.mark.parametrize(
    ("examples", "steps", "message"),
    [
        ([], 48, "48 steps of 0 examples"),
        ([Example([5], [6])], 0, "0 steps of 1 examples"),
        ([Example([5], [6]), Example([5], [])], 48, "1 of which have no response"),
        ([Example([5] * 8, [6] * 3)], 48, "1 of which .* more than max_length=10 tokens"),
        ([Example([47, 5], [6, 7])], 2, "the NLL of some tokens is not finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(examples, steps, message):
    decoder = decoder_of("llama", max_length=10)
    poisoned(decoder.pretrained.model, 47)
    with pytest.raises(ConfigError, match=message):
        exposure_bias(decoder, examples, steps)
    assert len(exposure_bias(decoder, [Example([5] * 8, [6] * 2)], 3)) == 3
