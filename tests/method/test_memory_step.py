"""The inner loop and the step around it are the paper's: the naive step, and plain MDLM without inner steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, MASK, assert_close_relative, examples, make_trainer, take_gradients, tiny
from conftest import train_batch as batch_of
from steps import OFF, SMALL, VARIANTS, Step, flat, initial, memory_for

from benchmarks.naive_experts import plain_experts
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method.reference import mdlm_loss, naive_states, naive_step, one_by_one
from dllm_memdlm.training.trainer import MemDLMTrainer

ATTENTION = {"llada_moe": ("q_proj", "o_proj"), "llada2": ("query_key_value", "dense"), "llama": ("q_proj", "v_proj")}
FFN = ("gate_proj", "up_proj", "down_proj")


def check_against_naive(
    trainer: MemDLMTrainer,
    batch: dict[str, Any],
    tolerance: float,
    of_gradients: float | None = None,
    shift: bool = False,
) -> float:
    """Outer loss, inner losses, fast weights and outer gradients. Returns how far the memory moved the loss."""
    of_gradients = of_gradients or tolerance
    memory, model = trainer.memory_config, trainer.model
    start = initial(trainer, batch)
    step = Step(trainer, batch, start)
    phi0 = [one_by_one(start.tensors, sample) for sample in range(start.samples)]
    with plain_experts(model):
        expected = naive_step(model, batch, phi0, memory, MASK, shift, trainer.loss_norm_type)
    expected.loss.backward()
    gradients = take_gradients(model, complete=False)  # a loop skips experts that no token chose

    assert step.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
    assert len(step.written.steps) == len(expected.inner_losses[0])
    for number, inner in enumerate(step.written.steps):
        for sample, losses in enumerate(expected.inner_losses):
            assert inner.loss[sample].item() == pytest.approx(losses[number], rel=tolerance, abs=tolerance)
    for ours, before, theirs in zip(flat(step.written.fast_weights), flat(start), expected.phi, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert_close_relative(ours[name], theirs[name], tolerance, name)
        moved, should = (torch.cat([(v[n] - before[n]).flatten() for n in theirs]) for v in (ours, theirs))
        assert_close_relative(moved, should, tolerance, "movement of the fast weights")
    assert step.gradients.keys() == gradients.keys()
    ours, theirs = (torch.cat([g[name].flatten() for name in gradients]) for g in (step.gradients, gradients))
    assert_close_relative(ours, theirs, of_gradients, "outer gradient")
    for name, gradient in gradients.items():
        # small ones against the whole too: their own rounding is as large as that of the others
        error = (step.gradients[name] - gradient).norm()
        assert error <= of_gradients * (10 * gradient.norm() + 0.1 * theirs.norm()), f"gradient of {name}"
    with torch.no_grad(), plain_experts(model):
        tokens = torch.where(batch["anchor_mask"], MASK, batch["input_ids"])
        logits = model(input_ids=tokens, attention_mask=batch.get("attention_mask")).logits
    logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if shift else logits
    names = ("input_ids", "anchor_mask", "maskable", "noise_level")
    off = mdlm_loss(logits, *(batch[name] for name in names), trainer.loss_norm_type)
    return abs(off.item() - step.loss.item())


# === invariant 3: the step is the paper's ===


#: Those that every backbone runs; the others take turns.
ON_EVERY_BACKBONE = ("paper", "scope_batch", "full", "three_steps", "two_epochs", "newly_revealed", "kl", "global_clip")
CASES = [
    (kind, variant)
    for turn, variant in enumerate(VARIANTS)
    for place, kind in enumerate(KINDS)
    if variant in ON_EVERY_BACKBONE or turn % 3 == place
]


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_a_step_equals_the_naive_step(kind, variant, tokenizer, tmp_path):
    """In float64; only the routers, which compute in float32, keep the tolerance from being smaller."""
    model = tiny(kind, torch.float64, lora=True)
    trainer = make_trainer(model, tokenizer, tmp_path, memory_for(kind, **VARIANTS[variant]))
    changed = check_against_naive(trainer, batch_of(trainer), tolerance=1e-6)
    assert changed > 1e-3, "the memory does too little here for this test to see anything"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["paper", "scope_batch"])
def test_a_step_in_float32(kind, variant, tokenizer, tmp_path):
    """On the kernels that training uses. These settings amplify rounding, so the naive step says how far off is near:
    its own gradients in float32 are 2e-4 from those in float64 where ours are, too."""
    memory = memory_for(kind, **VARIANTS[variant])
    trainer = make_trainer(tiny(kind, lora=True), tokenizer, tmp_path, memory)
    batch = batch_of(trainer)
    check_against_naive(trainer, batch, tolerance=1e-5, of_gradients=1e-3)

    gradients = [Step(trainer, batch, initial(trainer, batch)).gradients]
    for dtype in (torch.float32, torch.float64):
        model = tiny(kind, lora=True).to(dtype)
        start = initial(make_trainer(model, tokenizer, tmp_path, memory), batch)
        phi0 = [one_by_one(start.tensors, sample) for sample in range(start.samples)]
        with plain_experts(model):
            naive_step(model, batch, phi0, memory, MASK, norm=trainer.loss_norm_type).loss.backward()
        gradients.append(take_gradients(model, complete=False))
    ours, naive, exact = (torch.cat([each[name].double().flatten() for name in gradients[-1]]) for each in gradients)
    assert (ours - exact).norm() <= 1.5 * (naive - exact).norm() + 1e-5 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_attention_carries_fast_weights_too(kind, scope, tokenizer, tmp_path):
    memory = memory_for(kind, target_modules=(*FFN, *ATTENTION[kind]), scope=scope)
    trainer = make_trainer(tiny(kind, torch.float64, lora=True), tokenizer, tmp_path, memory)
    assert check_against_naive(trainer, batch_of(trainer), tolerance=1e-6) > 1e-3


@pytest.mark.parametrize(("kind", "norm"), [("llada_moe", "token"), ("llada2", "sequence"), ("llama", "batch")])
def test_shifted_logits_and_every_norm(kind, norm, tokenizer, tmp_path):
    rows = examples(6, prompt=0, spread=0)  # every token is a label, so a begin-of-sequence token is put in front
    model, memory = tiny(kind, torch.float64, lora=True), memory_for(kind)
    training = {"loss_norm_type": norm, "right_shift_logits": True}
    trainer = make_trainer(model, tokenizer, tmp_path, memory, rows, **training)
    batch = batch_of(trainer)
    assert batch["input_ids"][:, 0].tolist() == [tokenizer.bos_token_id] * 3 and not batch["maskable"][:, 0].any()
    assert check_against_naive(trainer, batch, tolerance=1e-6, shift=True) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_attention_mask_reaches_every_forward(kind, tokenizer, tmp_path):
    trainer = make_trainer(tiny(kind, torch.float64, lora=True), tokenizer, tmp_path, memory_for(kind))
    batch = batch_of(trainer)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, -4:] = 0
    batch["attention_mask"][2, :2] = 0
    assert check_against_naive(trainer, batch, tolerance=1e-6) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_bfloat16(kind, tokenizer, tmp_path):
    """At the paper's inner learning rate and clip, to the tolerance of the dtype."""
    memory = MemoryConfig(rank=8, alpha=16.0, layer_fraction=0.5)
    trainer = make_trainer(tiny(kind, torch.bfloat16, lora=True), tokenizer, tmp_path, memory)
    batch = batch_of(trainer)
    step = Step(trainer, batch)
    start = initial(trainer, batch)
    assert all(v.dtype == torch.float32 for v in step.written.fast_weights.tensors.values())
    with plain_experts(trainer.model):
        expected = naive_step(trainer.model, batch, [one_by_one(start.tensors, i) for i in range(3)], memory, MASK)
    expected.loss.backward()
    gradients = take_gradients(trainer.model, complete=False)
    assert step.loss.item() == pytest.approx(expected.loss.item(), rel=2e-2)
    for ours, before, theirs in zip(flat(step.written.fast_weights), flat(start), expected.phi, strict=True):
        moved, should = (torch.cat([(v[n] - before[n]).flatten() for n in theirs]) for v in (ours, theirs))
        assert should.norm() > 0.1
        assert_close_relative(moved, should, 0.15, "fast weights")
    ours, theirs = (torch.cat([g[n].flatten() for n in gradients]) for g in (step.gradients, gradients))
    assert_close_relative(ours, theirs, 0.1, "outer gradient")


@pytest.mark.parametrize(
    ("strategy", "steps"),
    [("anchor_consistent", 1), ("anchor_consistent", 2), ("anchor_consistent", 4), ("pre_anchor_only", 2)],
)
@pytest.mark.parametrize("scale", [1.0, 1.25, 1.5, 2.0])
def test_states_hold_as_many_masks_as_the_paper_says(strategy, steps, scale, tokenizer, tmp_path):
    memory = MemoryConfig(**SMALL, strategy=strategy, steps=steps, pre_anchor_scale=scale)
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, memory, examples(12))
    batch = batch_of(trainer, range(12))
    for i in range(12):
        masks, anchor = batch["inner_masks"][i], batch["anchor_mask"][i]
        total = int(batch["maskable"][i].sum())
        expected = naive_states(set(range(total)), set(range(int(anchor.sum()))), list(range(total)), scale, steps)
        expected = expected[:1] if strategy == "pre_anchor_only" else expected
        assert masks[:-1].sum(-1).tolist() == [len(state) for state in expected]
        assert torch.equal(masks[-1], anchor if strategy == "pre_anchor_only" else torch.zeros_like(anchor))
        assert all((anchor <= mask).all() and (mask <= batch["maskable"][i]).all() for mask in masks[:-1])
        assert strategy == "pre_anchor_only" or torch.equal(masks[-2], anchor)  # the last inner state is the outer one


@pytest.mark.parametrize("kind", KINDS)
def test_a_does_not_move_while_b_is_zero(kind, tokenizer, tmp_path):
    trainer = make_trainer(tiny(kind), tokenizer, tmp_path, memory_for(kind, steps=1))
    batch = batch_of(trainer)
    before, after = initial(trainer, batch), Step(trainer, batch).written.fast_weights
    for name, value in before.tensors.items():
        assert torch.equal(after.tensors[name], value) == name.endswith(".A")


# === invariant 1: without inner steps it is plain MDLM ===


NO_EPOCHS = MemoryConfig(**SMALL, epochs=0)


@pytest.mark.parametrize(
    ("memory", "shift", "dtype", "tolerance"),
    [
        pytest.param(OFF, False, torch.float32, 1e-6, id="off"),
        pytest.param(OFF, True, torch.float64, 1e-12, id="off_shifted"),
        pytest.param(NO_EPOCHS, True, torch.float32, 1e-6, id="no_epochs_shifted"),
        pytest.param(NO_EPOCHS, False, torch.float64, 1e-12, id="no_epochs"),
        pytest.param(MemoryConfig(**SMALL, inner_lr=0.0), False, torch.float64, 1e-12, id="no_learning_rate"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_inner_steps_are_plain_mdlm(kind, memory, shift, dtype, tolerance, tokenizer, tmp_path):
    trainer = make_trainer(tiny(kind, dtype, lora=True), tokenizer, tmp_path, memory, right_shift_logits=shift)
    batch = batch_of(trainer)
    step = Step(trainer, batch)
    tokens = torch.where(batch["anchor_mask"], MASK, batch["input_ids"])
    with plain_experts(trainer.model):
        logits = trainer.model(input_ids=tokens).logits
    logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if shift else logits
    # dllm's formula, its weight in the precision in which it computes one
    nll = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"], reduction="none")
    nll = nll * trainer.scheduler.weight(batch["noise_level"])[:, None] * batch["anchor_mask"]
    loss = nll.sum() / batch["maskable"].sum()
    loss.backward()
    assert step.loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert step.loss.dtype == dtype
    plain, ours = take_gradients(trainer.model, complete=False), step.gradients
    scale = torch.cat([g.flatten() for g in plain.values()]).norm()
    for name, gradient in plain.items():
        assert (ours[name] - gradient).norm() <= tolerance * scale, name
