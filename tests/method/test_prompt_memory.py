"""The memory of prompts: what it depends on, and when it is written, shared and left out."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import KINDS, MASK, assert_close_relative, tiny
from inputs import poisoned
from saved_models import prompt_memory, random_prompts
from steps import flat, memory_for

from benchmarks.naive_experts import plain_experts
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method.fast_weights import FastWeights
from dllm_memdlm.method.prompt_memory import PromptMemory, Tally, at_inference
from dllm_memdlm.method.reference import write_naively

POISON = 47  #: a word of no random prompt


def assert_same_memory(ours: FastWeights, theirs: FastWeights, tolerance: float) -> None:
    for mine, yours in zip(flat(ours), flat(theirs), strict=True):
        assert mine.keys() == yours.keys()
        for name, expected in yours.items():
            assert_close_relative(mine[name], expected, tolerance, name)


def has_no_effect(fast: FastWeights) -> bool:
    return all(name.endswith(".A") or not tensor.any() for name, tensor in fast.tensors.items())


def tiny_memory(kind: str = "llama", dtype: torch.dtype = torch.float32, **settings) -> PromptMemory:
    return prompt_memory(tiny(kind, dtype), memory_for(kind), **settings)


@pytest.mark.parametrize("attention", ["full", "block_causal"])
@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance", "shift"),
    [*((kind, torch.float64, 1e-6, kind == "llama") for kind in KINDS), ("llada2", torch.float32, 1e-4, False)],
)
def test_a_batch_is_as_many_prompts_alone_in_any_order(kind, dtype, tolerance, shift, attention):
    texts = random_prompts(11, 24, 17, 5)
    settings = {"attention": attention, "block_size": 4, "shift": shift}
    memory = tiny_memory(kind, dtype, **settings)
    together = memory.recall(texts)
    alone = FastWeights.stack([tiny_memory(kind, dtype, **settings).recall([text]) for text in texts])
    assert_same_memory(together, alone, tolerance)
    assert all(value.any() for each in flat(alone) for name, value in each.items() if "experts" not in name)
    assert_same_memory(memory.recall([texts[3], texts[1]]), alone.select([3, 1]), tolerance)  # kept
    memory.recall([texts[0]])
    assert_same_memory(memory.recall([texts[1], texts[3]]), alone.select([1, 3]), tolerance)  # written anew


def test_the_seed_and_the_text_choose_the_memory():
    text, other = random_prompts(20, 20)
    first = tiny_memory().recall([text])
    assert_same_memory(tiny_memory().recall([torch.tensor(text)]), first, 0.0)
    for different in (tiny_memory(seed=1).recall([text]), tiny_memory().recall([other])):
        for name, tensor in first.tensors.items():
            assert not torch.allclose(different.tensors[name], tensor), name


@pytest.mark.parametrize("attention", ["full", "block_causal"])
@pytest.mark.parametrize(("kind", "shift"), [*((kind, False) for kind in KINDS), ("llama", True)])
def test_it_is_written_as_by_a_naive_inner_loop(kind, shift, attention, monkeypatch):
    """Every token maskable, anchor ratio 0.2, uniform weights; φ0 and the masks are given to the naive loop."""
    prompts = tiny_memory(kind, shift=shift, attention=attention, block_size=4)
    memory, trajectories = prompts.memory, []
    own = memory.write
    monkeypatch.setattr(memory, "write", lambda given, **kw: trajectories.append(given) or own(given, **kw))
    text = random_prompts(60)[0]
    written = prompts.recall([text])
    (trajectory,) = trajectories
    assert trajectory.input_ids.tolist() == [text] and trajectory.maskable.all()
    pre_anchor, anchor, clean = trajectory.inner_masks[0].int().unbind()
    assert (anchor <= pre_anchor).all() and pre_anchor.sum() == math.floor(1.5 * anchor.sum()) and not clean.any()
    assert 0.1 < anchor.float().mean() < 0.3
    assert (memory.config.weighting, memory.config.anchor_ratio, memory.config.steps) == ("uniform", 0.2, 2)
    block = torch.arange(60) // 4
    mask = (block[:, None] >= block)[None, None] if attention == "block_causal" else None
    start = FastWeights.initial(memory.shapes, memory.config, trajectory.noise_keys, torch.get_default_device())
    batch = {**trajectory.to_batch(), "attention_mask": mask}
    with plain_experts(memory.model):
        naive, losses = write_naively(memory.model, batch, flat(start)[0], memory.config, MASK, shift)
    (ours,) = flat(written)
    assert losses[0] != losses[1] and ours.keys() == naive.keys()
    for name, expected in naive.items():
        assert_close_relative(ours[name], expected, 2e-4, name)


def test_prompts_are_written_on_without_what_belongs_to_training():
    trained = MemoryConfig(enabled=False, scope="batch", sync=True, dropout=0.5, rank=4, anchor_ratio=0.4)
    config = at_inference(trained, inner_lr=0.3)
    assert config == MemoryConfig(weighting="uniform", rank=4, anchor_ratio=0.4, inner_lr=0.3)


def test_prompts_on_the_same_text_share_one_memory():
    text, other = random_prompts(12, 14)
    memory = tiny_memory()
    assert memory.recall([text] * 3).samples == 1
    assert (memory.tally.written, memory.tally.reused) == (1, 2)
    assert memory.recall([text, other, text], counted=[True, True, False]).samples == 3
    assert (memory.tally.written, memory.tally.reused) == (2, 3)
    assert memory.tally.describe() == "memories: 2 written, 3 reused (hit rate 60%)"
    memory.recall([other])
    memory.recall([text])
    assert memory.tally.written == 3, "what a call does not ask for is not kept"
    fixed = tiny_memory(fixed=memory.recall([text]))
    assert fixed.recall([other, None, text]) is fixed.fixed and fixed.tally == Tally() and Tally().hit_rate == 0


@pytest.mark.parametrize("nothing", [None, []])
def test_no_text_is_no_memory(nothing):
    memory = tiny_memory("llada2")
    assert has_no_effect(memory.recall([nothing])) and memory.recall([nothing, None]).samples == 1
    text = random_prompts(12)[0]
    both = memory.recall([nothing, text])
    assert has_no_effect(both.select([0])) and not has_no_effect(both.select([1]))
    assert dataclasses.astuple(memory.tally)[:3] == (1, 0, 4)
    model, batch = memory.memory.model, torch.tensor([text])
    with torch.no_grad():
        plain = model(input_ids=batch).logits
        for texts, without in (([nothing], True), ([text], False)):
            with memory.recalled(texts):
                assert torch.equal(model(input_ids=batch).logits, plain) == without
        assert torch.equal(model(input_ids=batch).logits, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_whose_inner_loop_is_not_finite_goes_without(kind):
    texts = random_prompts(12, 16, 9)
    memory, untouched = tiny_memory(kind, torch.float64), tiny_memory(kind, torch.float64)
    poisoned(memory.memory.model, POISON)
    written = memory.recall([texts[0], [POISON] * 20, texts[2]])
    assert has_no_effect(written.select([1])) and all(t.isfinite().all() for t in written.tensors.values())
    assert_same_memory(written.select([0, 2]), untouched.recall([texts[0], texts[2]]), 1e-6)
    assert memory.tally.describe() == "memories: 3 written, 0 reused (hit rate 0%); without: 1 not finite"
    # A first step that is finite, and so large that the second is not.
    memory = prompt_memory(tiny(kind), memory_for(kind, inner_lr=1e38))
    assert has_no_effect(memory.recall(random_prompts(40, 30))) and memory.tally.not_finite == 2


def test_a_text_without_room_goes_without_and_several_are_left_to_the_caller(monkeypatch):
    """Raised by hand: a CPU has no such limit."""
    memory, texts, most = tiny_memory(), random_prompts(12, 16), 1
    write = memory.memory.write

    def limited(trajectory, **kwargs):
        if len(trajectory.input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return write(trajectory, **kwargs)

    monkeypatch.setattr(memory.memory, "write", limited)
    with pytest.raises(torch.OutOfMemoryError):
        memory.recall(texts)
    assert memory.tally == Tally()
    assert not has_no_effect(memory.recall(texts[:1])) and memory.tally.out_of_memory == 0
    most = 0
    assert has_no_effect(memory.recall(texts[1:])) and memory.tally.written == 1
    assert memory.tally.failures() == "1 no room on the device"
