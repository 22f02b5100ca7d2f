"""The memory of prompts: what it depends on, when it is written, shared and left out, and what is saved of it."""

from __future__ import annotations

import dataclasses
import math
import shutil
from typing import Any

import pytest
import torch
from conftest import MASK, assert_close_relative, tiny
from inputs import poisoned
from safetensors.torch import save_file
from saved_models import prompt_memory, random_prompts
from steps import SMALL, flat, memory_for

from benchmarks.naive_experts import plain_experts
from dllm_memdlm.backbones.moe import RoutedExperts
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.method.fast_weights import FORMAT, FastWeights
from dllm_memdlm.method.inner_loop import ParametricMemory
from dllm_memdlm.method.prompt_memory import PromptMemory, Tally, load_snapshot, save_snapshot
from dllm_memdlm.method.reference import write_naively

POISON = 47  #: a word of no random prompt
TEXT = random_prompts(20)[0]
WINDOWS = {"strategy": "cover", "steps": 3, "window": 6}


def assert_same_memory(ours: FastWeights, theirs: FastWeights, tolerance: float) -> None:
    for mine, yours in zip(flat(ours), flat(theirs), strict=True):
        assert mine.keys() == yours.keys()
        for name, expected in yours.items():
            assert_close_relative(mine[name], expected, tolerance, name)


def has_no_effect(fast: FastWeights) -> bool:
    return all(name.endswith(".A") or not tensor.any() for name, tensor in fast.tensors.items())


def tiny_memory(
    kind: str = "llama", dtype: torch.dtype = torch.float32, changes: dict[str, Any] | None = None, **settings: Any
) -> PromptMemory:
    return prompt_memory(tiny(kind, dtype), memory_for(kind, **(changes or {})), **settings)


@pytest.mark.parametrize("attention", ["full", "block_causal"])
@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance", "settings"),
    [
        ("llada_moe", torch.float64, 1e-6, {}),
        ("llama", torch.float64, 1e-6, {"shift": True}),
        ("llada2", torch.float32, 1e-4, {}),
        ("llada2", torch.float64, 1e-4, {"changes": WINDOWS}),  # whose twelve inner steps amplify its rounding
    ],
)
def test_a_batch_is_as_many_prompts_alone_in_any_order(kind, dtype, tolerance, settings, attention):
    texts, settings = random_prompts(11, 24, 17, 5), {"attention": attention, "block_size": 4, **settings}
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


@pytest.mark.parametrize(
    ("kind", "shift", "attention"),
    [
        *((kind, False, "block_causal") for kind in ("llada2", "llama", "llada")),
        *(("llada_moe", False, "full"), ("llama", True, "full")),
    ],
)
def test_it_is_written_as_by_a_naive_inner_loop(kind, shift, attention, monkeypatch):
    """Every token maskable, anchor ratio 0.2, uniform weights; φ0 and the masks are given to the naive loop."""
    prompts = tiny_memory(kind, shift=shift, attention=attention, block_size=4)
    memory, trajectories = prompts.memory, []
    own = memory.write
    monkeypatch.setattr(memory, "write", lambda given, **kw: trajectories.append(given) or own(given, **kw))
    text = random_prompts(60)[0]
    written = prompts.recall([text])
    (trajectory,) = trajectories
    assert trajectory.input_ids.tolist() == [text] and trajectory.maskable[:, int(shift) :].all()
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


@pytest.mark.parametrize("kind", ["llada2", "llama"])
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


@pytest.mark.parametrize("kind", ["llada2", "llama"])
@pytest.mark.parametrize("form", ["lora", "full"])
def test_a_saved_memory_gives_the_same_logits(kind, form, tmp_path):
    prompts = prompt_memory(tiny(kind), memory_for(kind, kind=form, rank=3, alpha=1.0))  # 1/3 has no short decimal form
    memory, fast, batch = prompts.memory, prompts.recall([TEXT]), torch.tensor([TEXT])
    strided = FastWeights({name: v.mT.contiguous().mT for name, v in fast.tensors.items()}, fast.scaling).leaves()
    save_snapshot(tmp_path / "memory", strided, "runs/mine", memory.config, TEXT)
    loaded, config = load_snapshot(tmp_path / "memory", "runs/mine", torch.get_default_device())
    assert config == memory.config and loaded.scaling == fast.scaling == config.scaling
    assert loaded.tensors.keys() == fast.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], value) for name, value in fast.tensors.items())
    other = ParametricMemory(tiny(kind).eval(), config, MASK)
    with torch.no_grad():
        with memory.holding(fast):
            expected = memory.model(input_ids=batch).logits
        assert not torch.allclose(other.model(input_ids=batch).logits, expected, atol=1e-2)
        with other.holding(loaded):
            assert torch.equal(other.model(input_ids=batch).logits, expected)


def test_a_memory_is_for_the_weights_wherever_they_lie(tmp_path):
    prompts, run = prompt_memory(tiny("llama"), memory_for("llama")), tmp_path / "run"
    run.mkdir()
    save_file({"w": torch.arange(300_000.0)}, run / "model.safetensors")
    save_snapshot(run / "memory", prompts.recall([TEXT]), str(run), prompts.memory.config, TEXT)
    copy = shutil.copytree(run, tmp_path / "copy")
    load_snapshot(copy / "memory", str(copy))
    save_file({"w": torch.arange(300_000.0) + 1}, run / "model.safetensors")  # trained again
    with pytest.raises(ConfigError, match=f"written with the model '{run}', not the other weights that are there now$"):
        load_snapshot(run / "memory", str(run))
    with pytest.raises(ConfigError, match=f"written with the model '{run}', not '{tmp_path / 'third'}'$"):
        load_snapshot(run / "memory", str(shutil.copytree(run, tmp_path / "third")))


def test_other_files_are_refused(tmp_path):
    """More of them: helpers/bad_inference.py."""
    path, prompts = tmp_path / "memory", prompt_memory(tiny("llada2"), memory_for("llada2"))
    fast, config = prompts.recall([TEXT]), prompts.memory.config

    def refused(match: str) -> None:
        with pytest.raises(ConfigError, match=f"memory: {match}"):
            load_snapshot(path, "runs/mine")

    save_snapshot(path, fast, "runs/mine", config, TEXT)
    content = path.read_bytes()
    for part in (content[: len(content) // 2], content[:5], b"", b"no safetensors, but long enough to be read"):
        path.write_bytes(part)
        refused(r"not a fast-weight snapshot \(.*--save-memory")
    ours = {"format": FORMAT, "scaling": "1.0"}
    for metadata in (None, {"format": "pt"}, ours, ours | {"header": "{"}):
        save_file(fast.tensors, path, metadata)
        refused(r"not a fast-weight snapshot \(")
    fast.save(path, {"note": "ü"})  # as a user may keep them
    assert FastWeights.load(path)[1] == {"note": "ü"}
    refused("expected the memory of one text, as --save-memory writes it$")
    fast.save(path, {"model": "runs/mine", "memory": {"rnak": 4}})
    refused("not the memory settings of this version .*rnak")
    with pytest.raises(ConfigError, match=r"memory: cannot be written \("):
        save_snapshot(tmp_path / "nowhere" / "memory", fast, "runs/mine", config, TEXT)


@pytest.mark.parametrize(
    ("dimensions", "changes", "sizes"),
    [
        ({}, {"layer_fraction": 0.3}, r"is \(5, 4, 16\), expected absent"),
        ({}, {"layer_fraction": 0.7}, "is absent, expected .*"),
        ({}, {"rank": 8}, r"is \(5, 4, 16\), expected \(5, 8, 16\)"),
        ({"num_experts": 4}, {}, r"is \(5, 4, 16\), expected \(4, 4, 16\)"),
    ],
    ids=str,
)
def test_fast_weights_of_another_model_are_not_held(dimensions, changes, sizes):
    source = ParametricMemory(tiny("llada_moe"), MemoryConfig(**SMALL), MASK)
    fast = FastWeights.initial(source.shapes, source.config, torch.tensor([1]), torch.get_default_device())
    target = ParametricMemory(tiny("llada_moe", **dimensions), MemoryConfig(**{**SMALL, **changes}), MASK)
    message = rf"^fast weights that do not fit this model: layers\.\d\.\S+ {sizes}$"
    with pytest.raises(ConfigError, match=message), target.holding(fast):
        pass
    assert all(not module.fast for module in target.model.modules() if isinstance(module, RoutedExperts))
