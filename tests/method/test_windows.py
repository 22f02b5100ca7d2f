"""Memory as it is used (ours): prompts read window after window, every token written, and the loss of prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import MASK, assert_close_relative, examples, make_trainer, take_gradients, tiny, train_batch
from saved_models import prompt_memory, random_prompts
from steps import OF_PROMPTS, OFF, SMALL, Step, flat, memory_for
from torch import Tensor

from benchmarks.naive_experts import plain_experts
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.method import noise
from dllm_memdlm.method.fast_weights import FastWeights
from dllm_memdlm.method.reference import adapted, full_forward, mdlm_loss, write_naively
from dllm_memdlm.method.trajectory import Trajectory, build_trajectory
from dllm_memdlm.method.windows import window_trajectory, windows_of
from dllm_memdlm.training.example_ids import prompt_of


def windows_in(batch: dict[str, Any], use: str = "window") -> list[Trajectory]:
    count = sum(name.startswith(f"{use}_") and name.endswith("input_ids") for name in batch)
    return [Trajectory.from_batch(batch, f"{use}_{n}_") for n in range(count)]


def same(one: FastWeights, other: FastWeights) -> bool:
    return all(torch.equal(other.tensors[name], value) for name, value in one.tensors.items())


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_cover_masks_every_token_once(steps):
    maskable = torch.rand(6, 31) < 0.7
    maskable[5] = False
    t = torch.full((6,), 0.5)
    config = MemoryConfig(strategy="cover", steps=steps)
    built = build_trajectory(maskable.long(), maskable, t, t, torch.arange(6), config)
    masks = built.inner_masks[:, :-1]
    assert torch.equal(masks.sum(1), maskable.long()) and not built.inner_masks[:, -1].any()
    sizes = masks.sum(-1)
    assert (sizes.amax(1) - sizes.amin(1)).max() <= 1
    torch.testing.assert_close(built.inner_ratios, sizes / maskable.sum(-1, keepdim=True).clamp_min(1))


def test_windows_are_even_and_in_order():
    texts = [torch.arange(n) for n in (10, 3, 0, 7)]
    windows = windows_of(texts, 3)
    assert [[len(row) for row in rows] for rows in windows] == [[2, 3, 0, 2], [3, 0, 0, 2], [2, 0, 0, 3], [3, 0, 0, 0]]
    for row, text in enumerate(texts):
        assert torch.equal(torch.cat([rows[row] for rows in windows]), text)
    assert [*map(len, windows_of(texts, None)[0])] == [10, 3, 0, 7]


def test_an_empty_window_leaves_fast_weights_as_they_are():
    memory = prompt_memory(tiny("llama"), memory_for("llama")).memory
    keys, texts = torch.tensor([3, 4]), [torch.tensor(text) for text in random_prompts(8, 8)]
    first = memory.write(window_trajectory(texts, keys, memory.config)).fast_weights
    last = window_trajectory([texts[0], texts[1][:0]], keys, memory.config, 1)
    then = memory.write(last, initial=first).fast_weights
    assert same(then.select([1]), first.select([1])) and not same(then, first)
    nothing = window_trajectory(texts, keys, memory.config).without_loss()
    assert same(memory.write(nothing, initial=first).fast_weights, first)


def test_a_window_as_long_as_the_text_is_the_whole_text():
    configs = [memory_for("llama", strategy="cover", steps=3, window=length) for length in (None, 24, 23)]
    whole, one, two = (prompt_memory(tiny("llama"), config).recall(random_prompts(24)) for config in configs)
    assert same(one, whole) and not same(two, whole)


@pytest.mark.parametrize("kind", ["llada_moe", "llama"])
def test_a_step_with_memory_of_prompts_is_the_naive_one(kind, tokenizer, tmp_path):
    """φ is written on each window in turn, by weights of 1; the outer loss has the loss of prompts beside it."""
    memory, model = memory_for(kind, **OF_PROMPTS), tiny(kind, torch.float64, lora=True)
    trainer = make_trainer(model, tokenizer, tmp_path, memory, examples(4))
    batch = train_batch(trainer, range(4))
    windows, prompt = windows_in(batch), Trajectory.from_batch(batch, "prompt_")
    assert len(windows) > 1 and not windows[-1].maskable.any(-1).all(), "rows should differ in their windows"
    step = Step(trainer, batch)
    start = FastWeights.initial(trainer.memory.shapes, memory, windows[0].noise_keys, windows[0].input_ids.device)
    plainly = replace(memory, weighting="uniform", source="response")
    phis, logits = flat(start), []
    with plain_experts(model):
        for row, phi in enumerate(phis):
            for window in windows:
                own = {name: value[row : row + 1] for name, value in window.to_batch().items()}
                if own["maskable"].any():
                    phi, _ = write_naively(model, own, phi, plainly, MASK, False)
            phis[row] = phi
            state = torch.where(batch["anchor_mask"], MASK, batch["input_ids"])[row : row + 1]
            with adapted(model, phi, memory.alpha / memory.rank):
                logits.append(full_forward(model, state, None, False)[0])
        maskable, level = batch["maskable"], batch["noise_level"]
        loss = mdlm_loss(torch.cat(logits), batch["input_ids"], batch["anchor_mask"], maskable, level)
        loss = loss + 0.3 * nll_of_prompts(model, prompt, maskable)
        loss.backward()
        gradients = take_gradients(model, complete=False)
    assert step.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for ours, theirs in zip(flat(step.written.fast_weights), phis, strict=True):
        for name, expected in theirs.items():
            assert_close_relative(ours[name], expected, 1e-4, name)
    ours, theirs = (torch.cat([g[name].flatten() for name in gradients]) for g in (step.gradients, gradients))
    assert_close_relative(ours, theirs, 1e-4, "outer gradient")


def nll_of_prompts(model: torch.nn.Module, prompt: Trajectory, maskable: Tensor) -> Tensor:
    """Each prompt's mean, weighted by the length of its response."""
    state = torch.where(prompt.anchor_mask, MASK, prompt.input_ids)
    logits, _ = full_forward(model, state, prompt.attention_mask, False)
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), prompt.input_ids, reduction="none")
    means = (nll * prompt.anchor_mask).sum(-1) / prompt.anchor_mask.sum(-1).clamp_min(1)
    lengths = maskable.sum(-1)
    return (means * lengths).sum() / lengths.sum()


@pytest.mark.parametrize("memory", [OFF, MemoryConfig(**SMALL)])
def test_the_loss_of_prompts_is_of_one_drawn_window(memory, tokenizer, tmp_path):
    """With memory off, too; its weight is that of the recipe, and over accumulated batches that of the whole."""
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, replace(memory, prompt_loss=0.5, window=3), examples(8))
    batch = train_batch(trainer, range(8))
    plain = make_trainer(tiny("llama"), tokenizer, tmp_path, memory, examples(8))
    base = plain.compute_loss(plain.model, train_batch(plain, range(8)))
    prompt = Trajectory.from_batch(batch, "prompt_")
    nll = nll_of_prompts(trainer.model, prompt, batch["maskable"])
    loss = trainer.compute_loss(trainer.model, batch)
    assert (loss - base).item() == pytest.approx(0.5 * nll.item(), rel=1e-5)
    for row, example in enumerate(examples(8)):
        ids = torch.tensor(prompt_of(example))
        own = prompt.input_ids[row][prompt.maskable[row]]
        assert any(torch.equal(own, rows[0]) for rows in windows_of([ids], 3))
    # as one of four batches of a step
    count = batch["maskable"].sum()
    part = trainer.compute_loss(trainer.model, batch, num_items_in_batch=4 * count)
    assert (part * 4).item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_window_that_is_not_finite_leaves_no_memory():
    memory = prompt_memory(tiny("llama"), memory_for("llama")).memory
    keys, texts = torch.tensor([3, 4]), [torch.tensor(text) for text in random_prompts(8, 8)]
    windows = [window_trajectory(texts, keys, memory.config, n) for n in range(3)]
    own = memory.write

    def poisoned(trajectory: Trajectory, **given: Any) -> Any:
        written = own(trajectory, **given)
        return written._replace(finite=torch.tensor([trajectory is not windows[1], True]))

    memory.write = poisoned
    written = memory.write_all(windows)
    assert written.finite.tolist() == [False, True]
    for name, value in written.fast_weights.tensors.items():
        if name.endswith(".B"):
            assert not value[..., 0, :, :].any() and value[..., 1, :, :].any()


def test_noise_of_windows_is_their_own():
    texts = [torch.arange(3, 40)]
    keys = noise.example_keys(1, 2, torch.tensor([3]))
    config = MemoryConfig(strategy="cover", steps=2)
    first, second = (window_trajectory(texts, keys, config, n) for n in (0, 1))
    assert torch.equal(first.noise_keys, keys) and not torch.equal(first.inner_masks, second.inner_masks)


def test_the_first_token_of_a_window_is_not_predicted_from_its_own_place():
    texts, keys = [torch.arange(3, 40), torch.arange(3, 9)], torch.tensor([3, 4])
    config = MemoryConfig(strategy="cover", steps=2)
    plain, shifted = (window_trajectory(texts, keys, config, 0, shift) for shift in (False, True))
    assert plain.maskable[:, 0].all() and torch.equal(plain.attention_mask, shifted.attention_mask)
    assert torch.equal(plain.maskable[:, 1:], shifted.maskable[:, 1:]) and not shifted.maskable[:, 0].any()
    assert not shifted.inner_masks[..., 0].any() and not shifted.anchor_mask[:, 0].any()


def test_examples_without_prompts(tokenizer, tmp_path):
    """Training on prompts says so; an evaluation leaves the losses of prompts out."""
    rows = [{**row, "labels": row["input_ids"]} for row in examples(3)]
    for changes in ({"source": "prompt"}, {"prompt_loss": 0.3}):
        trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama", **changes), rows)
        with pytest.raises(ConfigError, match=r"^AnchorTrajectoryCollator: examples without a prompt .*'prompt_ids'"):
            train_batch(trainer)
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama"), rows, eval_data=rows)
    losses = {name for name in trainer.evaluate() if "loss" in name or name.endswith("prompt_nll")}
    assert losses == {"eval_loss", "eval_loss_memory_off"}
