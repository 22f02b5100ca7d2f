"""The inner loop and the step around it are the paper's: the naive step, and plain MDLM without inner steps."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import ENCODER, KINDS, MASK, SHIFTED, assert_close_relative, examples, make_trainer, take_gradients, tiny
from conftest import train_batch as batch_of
from steps import OFF, SMALL, VARIANTS, Step, flat, initial, memory_for, plain_loss
from torch import Tensor

from benchmarks.naive_experts import plain_experts
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method.losses import cart_share, cart_weights
from dllm_memdlm.method.reference import NaiveStep, naive_step
from dllm_memdlm.training.trainer import MemDLMTrainer

ATTENTION = {"llada_moe": ("q_proj", "o_proj"), "llada2": ("query_key_value", "dense"), "llama": ("q_proj", "v_proj")}
ATTENTION["llada"] = ("q_proj", "attn_out")
FFN = ("gate_proj", "up_proj", "down_proj")


def joined(tensors: dict[str, Tensor], names: Iterable[str]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in names])


def naively(trainer: MemDLMTrainer, batch: dict[str, Any], shift: bool = False) -> tuple[NaiveStep, dict[str, Tensor]]:
    """The naive step, and its gradients."""
    model = trainer.model
    with plain_experts(model):
        phi0 = flat(initial(trainer, batch))
        step = naive_step(model, batch, phi0, trainer.memory_config, MASK, shift, trainer.loss_norm_type)
    step.loss.backward()
    return step, take_gradients(model, complete=False)  # a loop skips experts that no token chose


def check_against_naive(
    trainer: MemDLMTrainer,
    batch: dict[str, Any],
    tolerance: float,
    of_gradients: float | None = None,
    shift: bool = False,
) -> None:
    """Outer loss, inner losses, fast weights and outer gradients; and that the memory has moved the loss."""
    of_gradients = of_gradients or tolerance
    start = initial(trainer, batch)
    step = Step(trainer, batch, start)
    expected, gradients = naively(trainer, batch, shift)
    assert step.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
    inner = torch.stack([each.loss for each in step.written.steps], dim=1).double()
    torch.testing.assert_close(inner, torch.tensor(expected.inner_losses).double(), rtol=tolerance, atol=tolerance)
    for ours, before, theirs in zip(flat(step.written.fast_weights), flat(start), expected.phi, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert_close_relative(ours[name], theirs[name], tolerance, name)
        moved, should = (joined(v, theirs) - joined(before, theirs) for v in (ours, theirs))
        assert_close_relative(moved, should, tolerance, "movement of the fast weights")
    assert step.gradients.keys() == gradients.keys()
    whole = joined(gradients, gradients)
    assert_close_relative(joined(step.gradients, gradients), whole, of_gradients, "outer gradient")
    for name, gradient in gradients.items():
        # small ones against the whole too: their own rounding is as large as that of the others
        error = (step.gradients[name] - gradient).norm()
        assert error <= of_gradients * (10 * gradient.norm() + 0.1 * whole.norm()), f"gradient of {name}"
    with torch.no_grad():
        off = plain_loss(trainer.model, batch, trainer.loss_norm_type, shift)
    assert abs(off.item() - step.loss.item()) > 1e-3, "the memory does too little here for this test to see anything"


#: Those that go through code of each backbone's; the others take turns.
ON_EVERY_BACKBONE = ("paper", "scope_batch", "full")
CASES = [*itertools.product((*KINDS, SHIFTED, ENCODER), ON_EVERY_BACKBONE), (SHIFTED, "kl"), (ENCODER, "hidden_mse")]
CASES += zip(itertools.cycle(KINDS), [variant for variant in VARIANTS if variant not in ON_EVERY_BACKBONE])


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_a_step_equals_the_naive_step(kind, variant, tokenizer, tmp_path):
    """In float64; only the routers, which compute in float32, keep the tolerance from being smaller."""
    model = tiny(kind, torch.float64, lora=True)
    trainer = make_trainer(model, tokenizer, tmp_path, memory_for(kind, **VARIANTS[variant]))
    check_against_naive(trainer, batch_of(trainer), tolerance=1e-6, shift=kind == SHIFTED)


@pytest.mark.parametrize(("kind", "variant"), [*((kind, "paper") for kind in KINDS), ("llada2", "scope_batch")])
def test_a_step_in_float32(kind, variant, tokenizer, tmp_path):
    """On the kernels that training uses. These settings amplify rounding, so the naive step says how far off is near:
    its own gradients in float32 are 2e-4 from those in float64 where ours are, too."""
    memory = memory_for(kind, **VARIANTS[variant])
    trainer = make_trainer(tiny(kind, lora=True), tokenizer, tmp_path, memory)
    batch = batch_of(trainer)
    check_against_naive(trainer, batch, tolerance=1e-5, of_gradients=1e-3)
    gradients = [Step(trainer, batch, initial(trainer, batch)).gradients, naively(trainer, batch)[1]]
    exact = make_trainer(tiny(kind, lora=True).to(torch.float64), tokenizer, tmp_path, memory)
    gradients.append(naively(exact, batch)[1])
    ours, naive, exact = (joined(each, gradients[-1]).double() for each in gradients)
    assert (ours - exact).norm() <= 1.5 * (naive - exact).norm() + 1e-5 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_bfloat16(kind, tokenizer, tmp_path):
    """At the paper's inner learning rate and clip, to the tolerance of the dtype."""
    memory = MemoryConfig(rank=8, alpha=16.0, layer_fraction=0.5)
    trainer = make_trainer(tiny(kind, torch.bfloat16, lora=True), tokenizer, tmp_path, memory)
    batch = batch_of(trainer)
    step, start = Step(trainer, batch), initial(trainer, batch)
    expected, gradients = naively(trainer, batch)
    assert all(v.dtype == torch.float32 for v in step.written.fast_weights.tensors.values())
    assert step.loss.item() == pytest.approx(expected.loss.item(), rel=2e-2)
    for ours, before, theirs in zip(flat(step.written.fast_weights), flat(start), expected.phi, strict=True):
        moved, should = (joined(v, theirs) - joined(before, theirs) for v in (ours, theirs))
        assert should.norm() > 0.1
        assert_close_relative(moved, should, 0.15, "fast weights")
    assert_close_relative(joined(step.gradients, gradients), joined(gradients, gradients), 0.1, "outer gradient")


@pytest.mark.parametrize(("kind", "scope"), [*((kind, "sample") for kind in KINDS), ("llama", "batch")])
def test_attention_carries_fast_weights_and_takes_a_mask(kind, scope, tokenizer, tmp_path):
    memory = memory_for(kind, target_modules=(*FFN, *ATTENTION[kind]), scope=scope)
    trainer = make_trainer(tiny(kind, torch.float64, lora=True), tokenizer, tmp_path, memory)
    batch = batch_of(trainer)
    if scope == "sample":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, -4:] = 0
        batch["attention_mask"][2, :2] = 0
    check_against_naive(trainer, batch, tolerance=1e-6)


@pytest.mark.parametrize(("kind", "norm"), [("llada_moe", "token"), ("llada2", "sequence"), ("llama", "batch")])
def test_shifted_logits_and_every_norm(kind, norm, tokenizer, tmp_path):
    rows = examples(6, prompt=0, spread=0)  # every token is a label, so a begin-of-sequence token is put in front
    training = {"loss_norm_type": norm, "right_shift_logits": True}
    model = tiny(kind, torch.float64, lora=True)
    trainer = make_trainer(model, tokenizer, tmp_path, memory_for(kind), rows, **training)
    batch = batch_of(trainer)
    assert batch["input_ids"][:, 0].tolist() == [tokenizer.bos_token_id] * 3 and not batch["maskable"][:, 0].any()
    check_against_naive(trainer, batch, tolerance=1e-6, shift=True)


def test_the_loss_is_weighted_as_asked(tokenizer, tmp_path):
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, OFF, loss_weight_type="uniform", loss_norm_type="batch")
    batch = batch_of(trainer)
    uniform = {**batch, "noise_weight": torch.ones(3), "noise_level": torch.ones(3)}  # at t = 1 the schedule's is 1
    expected = plain_loss(trainer.model, uniform, "batch").item()
    assert Step(trainer, batch).loss.item() == pytest.approx(expected, rel=1e-5)


def plain_cart(masked: list[bool], p: float) -> list[float]:
    """A masked token weighs as much as it has visible neighbours, which count the less the farther away they are."""
    return [
        sum(p / 2 * (1 - p) ** (abs(i - j) - 1) for j, other in enumerate(masked) if not other) if own else 0.0
        for i, own in enumerate(masked)
    ]


@pytest.mark.parametrize(
    ("kind", "name", "p", "on"),
    [("llama", "cart", 0.3, True), ("llama", "cart[geo_p:0.3]", 0.3, False), (SHIFTED, "cart[geo_p:0.05]", 0.05, True)],
)
def test_cart_weights_the_outer_loss_alone(kind, name, p, on, tokenizer, tmp_path):
    """By the neighbours of each token; what the memory writes is weighted as in the paper."""
    settings = {"loss_weight_type": name, "loss_norm_type": "sequence"}
    memory = memory_for(kind) if on else OFF
    trainer = make_trainer(tiny(kind, torch.float64), tokenizer, tmp_path, memory, **settings)
    batch = batch_of(trainer)
    start = initial(trainer, batch) if on else None
    step = Step(trainer, batch, start)
    tokens, masks = batch["input_ids"], batch["anchor_mask"]
    with trainer.memory.holding(step.written.fast_weights) if on else nullcontext(), torch.no_grad():
        logits = trainer.model(input_ids=torch.where(masks, MASK, tokens)).logits
    if kind == SHIFTED:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    nll = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    weights = torch.tensor([plain_cart(row, p) for row in masks.tolist()], dtype=torch.float64)
    expected = ((nll * weights).sum(-1) / batch["maskable"].sum(-1)).mean().item()
    assert step.loss.item() == pytest.approx(expected, rel=1e-5)
    if on:
        usual = Step(make_trainer(trainer.model, tokenizer, tmp_path, memory), batch, start)
        written = zip(flat(step.written.fast_weights), flat(usual.written.fast_weights), strict=True)
        assert all(torch.equal(one[name], other[name]) for one, other in written for name in one)
        assert abs(usual.loss.item() - expected) > 0.1


def test_cart_counts_no_hidden_padding(tokenizer, tmp_path):
    """So that the loss of an example does not depend on how long the others of its batch are."""
    data = [*examples(2, shortest=10, longest=10), *examples(1, shortest=20)]
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, OFF, data, loss_weight_type="cart")
    trainer.data_collator.padding_loss = False
    totals = []
    for rows in ([0, 1], [0, 1, 2]):
        batch = trainer.data_collator([trainer.train_dataset[i] for i in rows])
        with torch.no_grad():
            totals.append(trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)[1]["loss"][:2])
    torch.testing.assert_close(*totals, rtol=1e-4, atol=1e-4)


@pytest.mark.dllm
@pytest.mark.parametrize("p", [0.3, 0.11])
def test_cart_weights_are_dllms(p):
    from dllm.pipelines.dream.trainer import DreamTrainer

    masked = torch.rand(5, 300, generator=torch.Generator().manual_seed(0)) < torch.linspace(0.1, 1, 5)[:, None]
    theirs = types.SimpleNamespace(loss_weight_type=f"cart[geo_p:{p}]")
    expected = DreamTrainer._compute_loss_weights(theirs, t=torch.rand(5), inputs={}, masked_mask=masked)
    ours = cart_weights(~masked, cart_share(theirs.loss_weight_type)) * masked
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
    assert expected.std() > 0.05


@pytest.mark.parametrize(
    ("kind", "changes", "shift", "dtype"),
    [
        *((kind, {"enabled": False}, False, torch.float32) for kind in KINDS),
        ("llada_moe", {"enabled": False}, True, torch.float64),
        ("llama", {"epochs": 0}, True, torch.float64),
        *((kind, {"inner_lr": 0.0}, False, torch.float64) for kind in ("llada2", "llada")),
    ],
)
def test_no_inner_steps_are_plain_mdlm(kind, changes, shift, dtype, tokenizer, tmp_path):
    memory, tolerance = MemoryConfig(**SMALL, **changes), {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    trainer = make_trainer(tiny(kind, dtype, lora=True), tokenizer, tmp_path, memory, right_shift_logits=shift)
    batch = batch_of(trainer)
    step, loss = Step(trainer, batch), plain_loss(trainer.model, batch, shift=shift)
    loss.backward()
    assert step.loss.item() == pytest.approx(loss.item(), rel=tolerance) and step.loss.dtype == dtype
    gradients = take_gradients(trainer.model, complete=False)
    error = joined(step.gradients, gradients) - joined(gradients, gradients)
    assert error.norm() <= tolerance * joined(gradients, gradients).norm()
