"""Dream's decoding: against a plain reference, alone and in batches, and by whom it is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import EOS, MASK, SHIFTED, tiny
from data_files import message_of
from naive_dream import NaiveDream
from naive_samplers import Draws, decoder, moves, prompts
from saved_models import pretrained_of, prompt_memory, random_prompts
from steps import memory_for
from torch import Tensor

from dllm_memdlm.inference.decoding import Decoder
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


def of_row(histories: list[Tensor], row: int, length: int) -> list[list[int]]:
    """The canvases of one row of a batch without its padding, and without the steps in which it stood still."""
    canvases = [canvas[row].tolist() for canvas in histories]
    assert all(set(canvas[length:]) <= {EOS} for canvas in canvases)
    return moves([canvas[:length] for canvas in canvases])


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_every_step_is_the_plain_samplers(kind, variant, tokenizer):
    """Alone with torch's global generator; in a batch each with its seed."""
    model, settings, seeds = decoder(kind), settings_of(kind, **VARIANTS[variant]), [7, 8, 7]
    sampler, inputs = DreamSampler(model, tokenizer), prompts(9, 4, 12)
    torch.manual_seed(5)
    expected = NaiveDream(model, settings, MASK, Draws()).sample(inputs[0], NEW)
    torch.manual_seed(5)
    output = sampler.sample(inputs[:1], settings)
    assert [canvas.tolist() for canvas in output.histories] == [[canvas] for canvas in expected]
    assert output.sequences.tolist() == [expected[-1]]
    assert settings.temperature > 0 or MASK not in expected[-1]
    assert len(set(expected[-1][9:])) > 2, "a canvas of one token would hide mistakes"

    together = sampler.sample(inputs, settings, seeds)
    for row, (prompt, seed) in enumerate(zip(inputs, seeds, strict=True)):
        expected = NaiveDream(model, settings, MASK, Draws(seed)).sample(prompt, NEW)
        assert of_row(together.histories, row, len(prompt) + NEW) == moves(expected)
    if variant in DRAWN:
        others = sampler.sample(inputs, settings, [1, 2, 3])
        assert [h.tolist() for h in others.histories] != [h.tolist() for h in together.histories]


@pytest.mark.parametrize("variant", ["entropy", "origin", "drawn_positions"])
def test_filling_in_is_the_plain_samplers(variant, tokenizer):
    """And masks that a prompt brings along stay, where it is only followed."""
    model, settings = decoder(SHIFTED), settings_of(**VARIANTS[variant])
    inputs = prompts(14, 6, 9)
    for row in inputs:
        row[2:5] = [MASK] * 3
    inputs[2][7] = MASK
    sampler = DreamSampler(model, tokenizer)
    filled, followed = sampler.infill(inputs, settings, [3, 4, 5]), sampler.sample(inputs, settings, [3, 4, 5])
    for number, canvas in enumerate(inputs):
        naive = NaiveDream(model, settings, MASK, Draws(number + 3)).fill(canvas)
        assert of_row(filled.histories, number, len(canvas)) == moves(naive)
        naive = NaiveDream(model, settings, MASK, Draws(number + 3)).sample(canvas, NEW)
        assert of_row(followed.histories, number, len(canvas) + NEW) == moves(naive)
        assert naive[-1][2:5] == [MASK] * 3


def test_positions_are_drawn_at_any_temperature(tokenizer):
    """Of which a small one takes the surest: probabilities that vanish are no matter."""
    model, settings = decoder(SHIFTED, torch.float32), settings_of(alg="entropy", **GREEDY, steps=5)
    expected = DreamSampler(model, tokenizer).sample(prompts(9, 4), settings).sequences
    assert torch.equal(
        DreamSampler(model, tokenizer).sample(prompts(9, 4), settings, alg_temp=1e-9).sequences, expected
    )


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_in_bfloat16(temperature, tokenizer):
    sampler, found = DreamSampler(decoder(SHIFTED, torch.bfloat16), tokenizer), []
    for alg in ("origin", "maskgit_plus", "topk_margin", "entropy"):
        tokens = sampler.sample(prompts(9, 5), max_new_tokens=13, steps=5, alg=alg, temperature=temperature)
        assert tokens.dtype == torch.long and not (tokens == MASK).any()
        found.append(tokens.tolist())
    assert found[2] != found[1] != found[3]


def test_a_temperature_of_positions_is_refused_where_none_is_by_confidence():
    text = message_of(lambda: settings_of(alg="origin", alg_temp=0.5))
    assert text.startswith("sampler.alg_temp=0.5: expected 0 with alg=")
    assert settings_of(alg="entropy", alg_temp=0.5).alg_temp == 0.5


def test_it_is_chosen_for_dream_as_its_authors_recommend_it():
    plain = Decoder(pretrained_of(tiny(SHIFTED, lora=True), shift=True))
    config = plain.config_for(40)
    assert plain.sampler == "dream"
    assert (config.steps, config.alg, config.temperature, config.right_shift_logits) == (40, "entropy", 0.0, True)
    assert Decoder(pretrained_of(tiny("llama")), "dream").config_for(4).right_shift_logits is False
    chosen = Decoder(pretrained_of(tiny(SHIFTED), shift=True), settings={"alg": "origin", "steps": 3}).config_for(40)
    assert (chosen.alg, chosen.steps) == ("origin", 3)


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


def test_the_memory_of_a_prompt_changes_its_answer_and_no_other():
    model, texts = tiny(SHIFTED), random_prompts(9, 12)
    decode = Decoder(pretrained_of(model, shift=True), memory=prompt_memory(model, memory_for(SHIFTED)))
    with decode.recalled(texts):
        together = decode.answers(texts, 6, whole=True)
    alone = []
    for text in texts:
        with decode.recalled([text]):
            alone += decode.answers([text], 6, whole=True)
    assert together == alone != Decoder(decode.pretrained).answers(texts, 6, whole=True)
