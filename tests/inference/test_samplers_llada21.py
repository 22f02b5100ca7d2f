"""LLaDA2.1's block diffusion: against a plain reference, cached against uncached, batches against single prompts."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import EOS, MASK, VOCABULARY, tiny
from data_files import message_of
from dllms_samplers import assert_same, decoders
from naive_llada21 import block_diffusion
from naive_samplers import Canvas, Draws, decoder, moves, prompts
from torch import Tensor, nn

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.inference.samplers import (
    LLaDA2Sampler,
    LLaDA2SamplerConfig,
    LLaDA21Sampler,
    LLaDA21SamplerConfig,
    llada21,
)
from dllm_memdlm.method.fast_weights import FastWeights
from dllm_memdlm.method.inner_loop import ParametricMemory

NEW, SIZE = 13, 4
LENGTHS = (9, 3, 8, 18)  #: of two blocks and a bit, within the first block, at the end of a block, and longer
LIMIT = 600  #: far more steps than a prompt takes to come to an end

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
    "early_stop": {"eos_early_stop": True, "threshold": 0.3, "editing_threshold": 0.6},
}
#: Settings that are ours, and one that dllm's loop runs out of masks for.
NOT_IN_DLLM = ("paper", "few_steps", "more_than_a_block")
#: All on the fastest backbone, a few on each of the others.
CASES = [("llama", variant) for variant in VARIANTS] + [
    (kind, variant) for kind in ("llada2", "llada_moe") for variant in ("one_post_step", "warm_top_k")
]
every_case = pytest.mark.parametrize(("kind", "variant"), CASES)
cached_or_not = pytest.mark.parametrize("cached", [True, False])


def settings_of(**changes: Any) -> LLaDA21SamplerConfig:
    return LLaDA21SamplerConfig(**{"max_new_tokens": NEW, "block_size": SIZE, "return_dict": True, **changes})


def naive(model: nn.Module, prompt: Canvas, settings: LLaDA21SamplerConfig, seed: int | None = None) -> list[Canvas]:
    return block_diffusion(model, prompt, settings, MASK, EOS, Draws(seed))


def of_row(histories: list[Tensor], row: int = 0, length: int | None = None) -> list[Canvas]:
    return [canvas[row, :length].tolist() for canvas in histories]


@every_case
def test_every_step_is_the_plain_samplers(kind, variant, tokenizer):
    """Alone with torch's global generator; in a batch, each at its own pace, with the seed of each."""
    model, settings = decoder(kind), settings_of(**VARIANTS[variant])
    sampler, inputs, seeds = LLaDA21Sampler(model, tokenizer), prompts(*LENGTHS), [7, 8, 9, 7]
    torch.manual_seed(5)
    expected = naive(model, inputs[0], settings)
    for cached in (True, False):
        torch.manual_seed(5)
        output = sampler.sample(inputs[:1], settings, use_cache=cached)
        assert of_row(output.histories) == expected and output.sequences.tolist() == [expected[-1]]
    batches = [sampler.sample(inputs, settings, seeds, use_cache=cached).histories for cached in (True, False)]
    for row, (prompt, seed) in enumerate(zip(inputs, seeds, strict=True)):
        expected = naive(model, prompt, settings, seed)
        assert expected[-1][: len(prompt)] == prompt
        for together in batches:
            assert moves(of_row(together, row, len(expected[0]))) == moves(expected)
            assert set(together[-1][row, len(expected[0]) :].tolist()) <= {EOS}
    if settings.temperature > 0:
        assert not torch.equal(sampler.sample(inputs, settings, [1, 2, 3, 4]).sequences, batches[0][-1])


@pytest.mark.dllm
@pytest.mark.parametrize("name", ["llada2", "llada2 of dllm"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in NOT_IN_DLLM])
def test_every_step_is_dllms(name, variant, tokenizer):
    """One prompt at a time, which is what dllm's takes; and all of them at once, where nothing is drawn."""
    from dllm.pipelines.llada21.sampler import LLaDA21Sampler as Theirs
    from dllm.pipelines.llada21.sampler import LLaDA21SamplerConfig as Config

    model, own_model = decoders(name)
    ours, theirs, inputs = LLaDA21Sampler(own_model, tokenizer), Theirs(model, tokenizer), prompts(*LENGTHS)
    settings = Config(**{"max_new_tokens": NEW, "block_size": SIZE, "return_dict": True} | VARIANTS[variant])
    for cached in (True, False):
        alone = [assert_same(ours, theirs, [torch.tensor(row)], settings, use_cache=cached)[0] for row in inputs]
    if settings.temperature == 0:
        together = ours.sample(inputs, settings).sequences
        assert all(torch.equal(row[: len(single)], single) for row, single in zip(together, alone, strict=True))


@pytest.mark.dllm
@pytest.mark.parametrize("name", ["llada2", "llada2 of dllm"])
@pytest.mark.parametrize("steps", [2, 3, 4])
@pytest.mark.parametrize("changes", [{}, {"threshold": 0.3}, {"temperature": 0.7, "top_k": 10, "top_p": 0.9}], ids=str)
def test_llada2_0_is_dllms(name, steps, changes, tokenizer):
    from dllm.pipelines.llada2.sampler import LLaDA2Sampler as Theirs
    from dllm.pipelines.llada2.sampler import LLaDA2SamplerConfig as Config

    model, own_model = decoders(name)
    ours, theirs = LLaDA2Sampler(own_model, tokenizer), Theirs(model, tokenizer)
    settings = Config(max_new_tokens=NEW, block_size=SIZE, steps_per_block=steps, return_dict=True, **changes)
    for prompt in map(torch.tensor, prompts(*LENGTHS)):
        for cached in (True, False):
            assert_same(ours, theirs, [prompt], settings, use_cache=cached)


def test_llada2_0_never_edits_and_takes_an_even_share_of_a_block_in_each_step(tokenizer):
    model, (prompt,) = decoder("llada2"), prompts(9)
    chosen = {"max_new_tokens": NEW, "block_size": SIZE, "threshold": 1.0, "return_dict": True}
    histories = LLaDA2Sampler(model, tokenizer).sample([prompt], block_steps=2, **chosen).histories
    expected = naive(model, prompt, settings_of(editing_threshold=None, block_steps=2, threshold=1.0))
    assert of_row(histories) == expected
    counts = [sum(token == MASK for token in canvas) for canvas in expected]
    assert {before - after for before, after in itertools.pairwise(counts)} <= {SIZE // 2, SIZE // 2 - 1, 1}
    dllms = SimpleNamespace(steps_per_block=4, minimal_topk=1, threshold=0.5)
    assert vars(LLaDA2SamplerConfig.of(dllms, {})) == vars(LLaDA2SamplerConfig(block_steps=4, threshold=0.5))
    dllms.minimal_topk = 3
    assert message_of(LLaDA2SamplerConfig.of, dllms, {}).startswith("sampler.minimal_topk=3: expected 1;")
    assert (LLaDA2SamplerConfig().editing_threshold, LLaDA2SamplerConfig().block_steps) == (None, 32)


@cached_or_not
def test_an_empty_prompt_and_one_that_brings_masks_along(cached, tokenizer):
    """Its masks are text and stay, those in the block that is continued too, which dllm fills in."""
    model, (masked,) = decoder("llada2"), prompts(10)
    masked[1] = masked[9] = MASK
    for prompt, threshold in (([], 0.0), (masked, 0.95)):  # an empty one's positions are all equally sure at first
        settings = settings_of(threshold=threshold, editing_threshold=0.3, use_cache=cached)
        expected = naive(model, prompt, settings)
        assert of_row(LLaDA21Sampler(model, tokenizer).sample([prompt], settings).histories) == expected
    assert [i for i, token in enumerate(expected[-1]) if token == MASK] == [1, 9]


@cached_or_not
def test_early_stop_ends_with_the_block_of_the_end(cached, tokenizer):
    model, inputs = decoder("llama"), prompts(9, 3, 14, 8)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 0.7
    inputs[0][2] = EOS  # of the prompt, which ends nothing
    settings = settings_of(max_new_tokens=24, eos_early_stop=True, use_cache=cached)
    together = LLaDA21Sampler(model, tokenizer).sample(inputs, settings)
    stopped = []
    for row, prompt in enumerate(inputs):
        expected = naive(model, prompt, settings)
        assert moves(of_row(together.histories, row, len(expected[0]))) == moves(expected)
        stopped.append(MASK in expected[-1])
    assert stopped == [False, False, True, False], "one should end early"


@pytest.mark.parametrize("prefill", [1, 5, 9, 1000])
def test_prompts_of_several_chunks(prefill, tokenizer, monkeypatch):
    model, inputs, widths = decoder("llada2"), prompts(19, 40, 3), []
    sampler, settings = LLaDA21Sampler(model, tokenizer), settings_of(editing_threshold=0.2, max_post_steps=2)
    expected = sampler.sample(inputs, settings, use_cache=False)
    monkeypatch.setattr(llada21, "PREFILL", prefill)
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    output = sampler.sample(inputs, settings)
    for row in range(len(inputs)):
        assert moves(of_row(output.histories, row)) == moves(of_row(expected.histories, row))
    chunk = max(1, prefill // SIZE) * SIZE
    chunks = [min(chunk, 40 - start) for start in range(0, 40, chunk)]
    assert widths[: len(chunks)] == chunks and set(widths[len(chunks) :]) == {SIZE}


@pytest.mark.parametrize("kind", ["llada2", "llada"])
def test_with_fast_weights_of_each_sample_held(kind, tokenizer):
    model, inputs = decoder(kind), prompts(9, 3)
    sampler, settings = LLaDA21Sampler(model, tokenizer), settings_of(editing_threshold=0.2, max_post_steps=1)
    memory = ParametricMemory(model, MemoryConfig(rank=4, layer_fraction=0.4), mask_token_id=MASK)
    fast = FastWeights.initial(memory.shapes, memory.config, torch.arange(2), torch.get_default_device())
    drawn = {name: torch.randn(value.shape, dtype=torch.float64) * 0.3 for name, value in fast.tensors.items()}
    fast = FastWeights(drawn, fast.scaling)
    with memory.holding(fast):
        together = [sampler.sample(inputs, settings, use_cache=cached).histories for cached in (True, False)]
    plain = sampler.sample(inputs, settings).sequences
    for row, prompt in enumerate(inputs):
        with memory.holding(fast.select([row])):
            expected = naive(model, prompt, settings)
        for histories in together:
            assert moves(of_row(histories, row, len(expected[0]))) == moves(expected)
            assert plain[row].tolist() != histories[-1][row].tolist()


def with_table(predictions: dict[int, tuple[int, float]]) -> nn.Module:
    """A model that looks at a position's own token alone: token → (what it predicts, with which probability)."""
    model = tiny("llama").eval()
    table = torch.zeros(VOCABULARY, VOCABULARY)
    for token in range(VOCABULARY):
        choice, probability = predictions.get(token, (token, 0.99))
        table[token, choice] = torch.tensor(probability / (1 - probability) * (VOCABULARY - 1)).log()

    def forward(input_ids: Tensor, positions: Tensor | None = None, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=table[input_ids if positions is None else input_ids.gather(1, positions)])

    model.forward = forward
    return model


@cached_or_not
@pytest.mark.parametrize(
    "predictions",
    [
        *({MASK: (MASK, 0.99)}, {MASK: (MASK, 0.3)}, {MASK: (5, 0.5), 5: (MASK, 0.99)}),
        {MASK: (5, 0.99), 5: (6, 0.99), 6: (MASK, 0.99)},
        {MASK: (5, 0.5), 5: (6, 0.99), 6: (5, 0.99)},
        {token: (MASK, 0.99) for token in range(2, VOCABULARY)},
    ],
)
@pytest.mark.parametrize("changes", [{}, {"max_post_steps": 0}, {"temperature": 0.5}, {"num_to_transfer": 3}])
def test_a_model_that_chooses_the_mask_comes_to_an_end(predictions, changes, cached, tokenizer):
    sampler = LLaDA21Sampler(with_table(predictions), tokenizer)
    steps = sampler.steps(prompts(5, 2), seeds=[1, 2], max_new_tokens=13, block_size=4, use_cache=cached, **changes)
    finished = [canvas.clone() for canvas in itertools.islice(steps, LIMIT)]
    assert len(finished) < LIMIT, "no end"
    assert not (finished[-1] == MASK).any()
