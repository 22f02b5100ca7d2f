"""The same tokens as dllm's samplers, step for step, on our backbones and on dllm's own models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import KINDS, MASK, scale_up, tiny_config
from naive_samplers import decoder, prompts
from stock_models import DENSE_ATTRIBUTES, a2d_llama, dllms_model
from torch import nn

from dllm_memdlm.inference.samplers import DreamSampler, LLaDA2Sampler, LLaDA21Sampler, MDLMSampler

pytestmark = pytest.mark.dllm

MDLM_VARIANTS: dict[str, dict[str, Any]] = {
    "one_block": {},
    "blocks": {"block_size": 5, "steps": 9},
    "more_steps": {"steps": 40},
    "guided": {"cfg_scale": 0.7, "block_size": 8},
    "guided_keeping": {"cfg_scale": 1.0, "cfg_keep_tokens": list(range(3, 25)), "temperature": 0.3},
    "suppressed": {"suppress_tokens": list(range(5, 30)), "begin_suppress_tokens": [31, 32, 33, MASK]},
    "right_shift": {"right_shift_logits": True, "temperature": 0.5},
    "warm": {"temperature": 0.8},
    "random": {"remasking": "random", "block_size": 6},
    "stochastic": {"stochastic_transfer": True, "steps": 9, "block_size": 8},
    "filling_in": {"steps": 9, "block_size": None},
    "filling_in_blocks": {"steps": 9, "block_size": 4},
    "filling_in_warm": {"steps": 9, "block_size": None, "temperature": 0.8},
    "filling_in_guided": {"steps": 9, "cfg_scale": 0.7, "block_size": 5, "remasking": "random"},
}
LLADA21_VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "editing": {"threshold": 0.3, "editing_threshold": 0.2},
    "one_post_step": {"threshold": 0.3, "editing_threshold": 0.05, "max_post_steps": 1},
    "no_post_step": {"threshold": 0.2, "editing_threshold": 0.05, "max_post_steps": 0},
    "several_a_step": {"num_to_transfer": 3},
    "warm": {"temperature": 0.7, "top_k": 10, "top_p": 0.9, "threshold": 0.3, "editing_threshold": 0.3},
    "early_stop": {"eos_early_stop": True, "threshold": 0.3, "editing_threshold": 0.6},
    "max_length": {"max_new_tokens": None, "max_length": 28},
}
#: What Dream's published code calls its default, recommends, and has beside. dllm's default top_k is of no effect here.
DREAM_VARIANTS: dict[str, dict[str, Any]] = {
    "maskgit_plus": {"alg": "maskgit_plus", "temperature": 0.0},
    "topk_margin": {"alg": "topk_margin", "temperature": 0.0, "top_k": 7, "steps": 9},
    "entropy": {"alg": "entropy", "temperature": 0.0, "steps": 40},
    "recommended": {"alg": "entropy", "temperature": 0.2, "top_p": 0.95},
    "warm": {"alg": "maskgit_plus", "temperature": 0.8, "top_k": 10, "top_p": 0.8, "steps": 9},
    "drawn_positions": {"alg": "topk_margin", "alg_temp": 0.3, "temperature": 0.0, "steps": 9},
    "guided": {"alg": "entropy", "temperature": 0.0, "cfg_scale": 0.7},
    "stochastic": {"alg": "maskgit_plus", "temperature": 0.0, "stochastic_transfer": True, "steps": 9},
    "filling_in": {"alg": "entropy", "temperature": 0.5, "steps": 6},
}


def decoders(name: str) -> tuple[nn.Module, nn.Module]:
    """A model for dllm's sampler, and the same weights for ours: a backbone of ours, or of dllm's."""
    kind, _, whose = name.partition(" of ")
    if whose != "dllm":
        model = decoder(kind, torch.float32)
        return model, model
    if kind == "llama":
        model = a2d_llama()
    else:
        config = tiny_config(kind)
        shared = {field: getattr(config, field) for field in DENSE_ATTRIBUTES if hasattr(config, field)}
        # Eager, since dllm's LLaDA21Sampler passes a mask in bfloat16, which sdpa takes with no other dtype.
        shared |= {} if kind == "llada" else {"attn_implementation": "eager" if kind == "llada2" else "sdpa"}
        model = dllms_model(kind, **shared)
    scale_up(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[MASK] = 0  # never chosen
        model.get_input_embeddings().weight[MASK] *= 0.1
    model.eval()
    return model, copy.deepcopy(model)  # which our sampler changes the class of


#: dllm's LLaDA2.1 takes no mask of two dimensions, which is what dllm's MDLMSampler passes.
MODELS = [*KINDS, "llada_moe of dllm", "llama of dllm", "llada of dllm", "modernbert", "modernbert of dllm"]


def assert_same(ours: Any, theirs: Any) -> None:
    assert [c.tolist() for c in ours.histories] == [c.tolist() for c in theirs.histories]
    assert torch.equal(ours.sequences, theirs.sequences)


def seeded(sample: Any, *arguments: Any, **settings: Any) -> Any:
    torch.manual_seed(3)
    return sample(*arguments, **settings)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", MDLM_VARIANTS)
def test_mdlm(name, variant, tokenizer):
    from dllm.core.samplers import MDLMSampler as Theirs
    from dllm.core.samplers import MDLMSamplerConfig

    (their_model, our_model), settings = decoders(name), {"max_new_tokens": 19, "steps": 19, "block_size": 19}
    settings, way = MDLMSamplerConfig(**settings | {"return_dict": True} | MDLM_VARIANTS[variant]), "sample"
    inputs = [torch.tensor(prompt) for prompt in prompts(7, 12, 3)]
    if variant.startswith("filling_in"):
        inputs, way = [torch.tensor(prompt) for prompt in prompts(14, 6, 9)], "infill"
        inputs[0][7:12] = MASK
        for row in inputs:
            row[1:4] = MASK
    # Suppressed first tokens are all of confidence 0: a tie, which in dllm falls by how long the batch is.
    answers = set()
    for batch in [[prompt] for prompt in inputs] if variant == "suppressed" else [inputs]:
        theirs = seeded(getattr(Theirs(their_model, tokenizer), way), batch, settings)
        assert_same(seeded(getattr(MDLMSampler(our_model, tokenizer), way), batch, settings), theirs)
        answers.update(theirs.sequences[:, 12:].flatten().tolist())
    assert way == "infill" or len(answers) > 3, "a canvas of one token would hide mistakes"


@pytest.mark.parametrize("name", ["llada2", "llada2 of dllm"])
@pytest.mark.parametrize("steps", [2, 3, 4])
@pytest.mark.parametrize("changes", [{}, {"threshold": 0.3}, {"temperature": 0.7, "top_k": 10, "top_p": 0.9}], ids=str)
def test_llada2(name, steps, changes, tokenizer):
    from dllm.pipelines.llada2.sampler import LLaDA2Sampler as Theirs
    from dllm.pipelines.llada2.sampler import LLaDA2SamplerConfig

    their_model, our_model = decoders(name)
    settings = {"max_new_tokens": 13, "block_size": 4, **changes}
    for prompt in map(torch.tensor, prompts(9, 3, 8, 18)):
        chosen = LLaDA2SamplerConfig(steps_per_block=steps, **settings, return_dict=True)
        theirs = seeded(Theirs(their_model, tokenizer).sample, [prompt], chosen)
        for cached in (True, False):
            sampler = LLaDA2Sampler(our_model, tokenizer)
            assert_same(seeded(sampler.sample, [prompt], chosen, use_cache=cached), theirs)


@pytest.mark.parametrize("name", ["llada2", "llada2 of dllm"])
@pytest.mark.parametrize("variant", LLADA21_VARIANTS)
def test_llada21(name, variant, tokenizer):
    """One prompt at a time, which is what dllm's takes; and all of them at once, where nothing is drawn."""
    from dllm.pipelines.llada21.sampler import LLaDA21Sampler as Theirs
    from dllm.pipelines.llada21.sampler import LLaDA21SamplerConfig

    their_model, our_model = decoders(name)
    settings = {"max_new_tokens": 13, "block_size": 4, "return_dict": True, **LLADA21_VARIANTS[variant]}
    settings, inputs = LLaDA21SamplerConfig(**settings), [torch.tensor(prompt) for prompt in prompts(9, 3, 8, 18)]
    sampler, alone = LLaDA21Sampler(our_model, tokenizer), []
    for prompt in inputs:
        theirs = seeded(Theirs(their_model, tokenizer).sample, [prompt], settings)
        for cached in (True, False):
            assert_same(seeded(sampler.sample, [prompt], settings, use_cache=cached), theirs)
        alone.append(theirs.sequences[0])
    if variant != "warm":
        together = sampler.sample(inputs, settings).sequences
        assert all(torch.equal(row[: len(single)], single) for row, single in zip(together, alone, strict=True))


@pytest.mark.parametrize("name", ["dream", "dream of dllm"])
@pytest.mark.parametrize("variant", DREAM_VARIANTS)
def test_dream(name, variant, tokenizer):
    """dllm pads on the left. One prompt at a time, and all at once where nothing is drawn and so no tie is likely."""
    from dllm.pipelines.dream.sampler import DreamSampler as Theirs
    from dllm.pipelines.dream.sampler import DreamSamplerConfig

    their_model, our_model = decoders(name)
    settings = {"max_new_tokens": 19, "steps": 19, "return_dict": True, **DREAM_VARIANTS[variant]}
    settings, way, inputs = DreamSamplerConfig(**settings), "sample", [torch.tensor(p) for p in prompts(7, 12, 3)]
    if variant == "filling_in":
        way = "infill"
        for row in inputs:
            row[1:3] = MASK
    drawn = settings.temperature > 0 or settings.alg_temp > 0
    batches = [[row] for row in inputs] + ([] if drawn else [inputs])
    answers = set()
    for batch in batches:
        theirs = seeded(getattr(Theirs(their_model, tokenizer), way), batch, settings)
        ours = seeded(getattr(DreamSampler(our_model, tokenizer), way), batch, settings)
        width = theirs.sequences.shape[1]
        for row, prompt in enumerate(batch):
            length = len(prompt) + (19 if way == "sample" else 0)
            expected = [canvas[row, width - length :].tolist() for canvas in theirs.histories]
            assert [canvas[row, :length].tolist() for canvas in ours.histories] == expected
            answers.update(expected[-1])
    assert len(answers) > 12 and MASK not in answers


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_dreams_origin(temperature, tokenizer):
    """Which dllm has in its model's own generation alone."""
    from dllm.pipelines.dream.models.generation_utils import DreamGenerationConfig

    their_model, our_model = decoders("dream of dllm")
    prompt = torch.tensor(prompts(9))
    settings = {"max_new_tokens": 15, "steps": 6, "eps": 1e-3, "alg": "origin", "temperature": temperature}
    more = {"top_p": 0.9, "top_k": 20}
    tokens = {"mask_token_id": MASK, "pad_token_id": 0, "eos_token_id": 0, "output_history": True, "return_dict": True}
    given = DreamGenerationConfig(**settings, **more, **tokens)
    theirs = seeded(their_model.diffusion_generate, prompt, generation_config=given)
    ours = seeded(DreamSampler(our_model, tokenizer).sample, prompt, **settings, **more, return_dict=True)
    assert [c.tolist() for c in ours.histories[1:]] == [c.tolist() for c in theirs.history]
    assert len(set(ours.sequences[0, 9:].tolist())) > 3
