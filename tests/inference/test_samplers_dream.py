"""Dream's decoding: against a plain reference, alone and in batches, and by whom it is chosen."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from conftest import MASK, SHIFTED
from data_files import message_of
from dllms_samplers import assert_same, decoders
from naive_dream import NaiveDream
from naive_samplers import Draws, assert_every_step, assert_filled_in, decoder, prompts
from torch import nn

from dllm_memdlm.inference.samplers import DreamSampler, DreamSamplerConfig, LLaDA21Sampler, MDLMSampler

NEW = 13
GREEDY = {"temperature": 0.0}

VARIANTS: dict[str, dict[str, Any]] = {
    "maskgit_plus": {"alg": "maskgit_plus", **GREEDY},
    "topk_margin": {"alg": "topk_margin", **GREEDY, "steps": 5},
    "entropy": {"alg": "entropy", **GREEDY, "steps": 40},
    "origin": {"alg": "origin", "steps": 6},
    "origin_greedy": {"alg": "origin", **GREEDY, "eps": 0.2, "steps": 9},
    "warm": {"alg": "maskgit_plus", "temperature": 0.9, "top_k": 10, "top_p": 0.9},
    "warm_margin": {"alg": "topk_margin", "temperature": 0.6, "top_k": None, "top_p": None, "steps": 7},
    "warm_entropy": {"alg": "entropy", "temperature": 1.5, "top_p": 0.95, "top_k": 20},
    "drawn_positions": {"alg": "entropy", "alg_temp": 0.8, "steps": 6},
    "drawn_positions_greedy": {"alg": "maskgit_plus", **GREEDY, "alg_temp": 0.1, "steps": 5},
    "stochastic": {"alg": "maskgit_plus", **GREEDY, "stochastic_transfer": True, "steps": 8},
    "guided": {"alg": "entropy", **GREEDY, "cfg_scale": 0.8},
    "suppressed": {"alg": "maskgit_plus", **GREEDY, "suppress_tokens": list(range(5, 30))},
}
CASES = [(SHIFTED, variant) for variant in VARIANTS] + [("llada_moe", name) for name in ("entropy", "origin", "warm")]
DRAWN = ("origin", "origin_greedy", "warm", "drawn_positions", "drawn_positions_greedy", "stochastic")


def settings_of(kind: str = SHIFTED, **changes: Any) -> DreamSamplerConfig:
    own = {"max_new_tokens": NEW, "steps": NEW, "return_dict": True, "right_shift_logits": kind == SHIFTED}
    return DreamSamplerConfig(**own | changes)


def naive(model: nn.Module, settings: DreamSamplerConfig, seed: int | None) -> NaiveDream:
    return NaiveDream(model, settings, MASK, Draws(seed))


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_every_step_is_the_plain_samplers(kind, variant, tokenizer):
    model, settings = decoder(kind), settings_of(kind, **VARIANTS[variant])
    assert_every_step(DreamSampler(model, tokenizer), partial(naive, model, settings), settings, variant in DRAWN)


@pytest.mark.dllm
@pytest.mark.parametrize("name", ["dream", "dream of dllm"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith(("origin", "suppressed"))])
def test_every_step_is_dllms(name, variant, tokenizer):
    """One prompt at a time, and all at once where nothing is drawn and so no tie is likely."""
    from dllm.pipelines.dream.sampler import DreamSampler as Theirs
    from dllm.pipelines.dream.sampler import DreamSamplerConfig as Config

    model, own_model = decoders(name)
    ours, theirs = DreamSampler(own_model, tokenizer), Theirs(model, tokenizer)
    settings = Config(**{"max_new_tokens": NEW, "steps": NEW, "return_dict": True} | VARIANTS[variant])
    inputs, answers = [torch.tensor(prompt) for prompt in prompts(7, 12, 3)], set()
    drawn = settings.temperature > 0 or settings.alg_temp > 0
    for batch in [*([row] for row in inputs), *([] if drawn else [inputs])]:
        answers.update(assert_same(ours, theirs, batch, settings, left=True).flatten().tolist())
    assert len(answers) > 12 and (settings.temperature > 0 or MASK not in answers)
    for row in inputs if settings.cfg_scale == 0 else ():  # dllm fills in without guidance
        row[1:3] = MASK
        assert_same(ours, theirs, [row], settings, "infill", left=True)


@pytest.mark.dllm
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_origin_is_dreams_own(temperature, tokenizer):
    """Which dllm has in its model's own generation alone."""
    from dllm.pipelines.dream.models.generation_utils import DreamGenerationConfig

    model, own_model = decoders("dream of dllm")
    settings = {"max_new_tokens": 15, "steps": 6, "eps": 1e-3, "alg": "origin", "temperature": temperature}
    settings |= {"top_p": 0.9, "top_k": 20, "return_dict": True}
    tokens = {"mask_token_id": MASK, "pad_token_id": 0, "eos_token_id": 0, "output_history": True}
    torch.manual_seed(3)
    given = DreamGenerationConfig(**settings, **tokens)
    theirs = model.diffusion_generate(torch.tensor(prompts(9)), generation_config=given)
    torch.manual_seed(3)
    ours = DreamSampler(own_model, tokenizer).sample(prompts(9), **settings)
    assert [c.tolist() for c in ours.histories[1:]] == [c.tolist() for c in theirs.history]
    assert len(set(ours.sequences[0, 9:].tolist())) > 3


@pytest.mark.parametrize("variant", ["entropy", "origin", "drawn_positions"])
def test_filling_in_is_the_plain_samplers(variant, tokenizer):
    model, settings = decoder(SHIFTED), settings_of(**VARIANTS[variant])
    assert_filled_in(DreamSampler(model, tokenizer), partial(naive, model, settings), settings, seeded=True)


def test_positions_are_drawn_at_any_temperature(tokenizer):
    """Of which a small one takes the surest: probabilities that vanish are no matter."""
    model, settings = decoder(SHIFTED, torch.float32), settings_of(alg="entropy", **GREEDY, steps=5)
    expected = DreamSampler(model, tokenizer).sample(prompts(9, 4), settings).sequences
    assert torch.equal(
        DreamSampler(model, tokenizer).sample(prompts(9, 4), settings, alg_temp=1e-9).sequences, expected
    )


def test_a_temperature_of_positions_is_refused_where_none_is_by_confidence():
    text = message_of(lambda: settings_of(alg="origin", alg_temp=0.5))
    assert text.startswith("sampler.alg_temp=0.5: expected 0 with alg=")
    assert settings_of(alg="entropy", alg_temp=0.5).alg_temp == 0.5


def test_every_sampler_shifts_as_the_architecture_does(tokenizer):
    model, (prompt,) = decoder(SHIFTED, torch.float32), prompts(9)
    settings = {"max_new_tokens": 8, "block_size": 8, "steps": 8}
    sampler = MDLMSampler(model, tokenizer)
    own = sampler.sample([prompt], **settings)
    assert torch.equal(own, sampler.sample([prompt], right_shift_logits=True, **settings))
    for refused in (sampler, DreamSampler(model, tokenizer)):
        text = message_of(lambda sampler=refused: sampler.sample([prompt], right_shift_logits=False))
        assert text == "sampler.right_shift_logits=False: expected true with this model, whose logits are shifted"
    text = message_of(LLaDA21Sampler, model, tokenizer)
    assert text.startswith("sampler llada21: takes no logits of the next position, which those of DreamModel are")
