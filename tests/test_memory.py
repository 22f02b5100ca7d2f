"""The inner loop and the step around it: equal to the naive step, to N steps of one sample, and it leaves no trace."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import AMPLIFIED, KINDS, MASK, assert_close_relative, examples, make_trainer, take_gradients, tiny
from conftest import train_batch as batch_of
from naive import mdlm_loss, naive_step, one_by_one, plain_experts, state_counts
from torch import Tensor, nn

from dllm_memdlm.backbones import staged_backbone
from dllm_memdlm.backbones.moe import RoutedExperts
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.fast_weights import FastWeights
from dllm_memdlm.memory import ParametricMemory, Written
from dllm_memdlm.trainer import MemDLMTrainer
from dllm_memdlm.trajectory import Trajectory

SMALL = {"rank": 4, "alpha": 8.0, "layer_fraction": 0.4}  # layers 1 and 2 of 3
ATTENTION = {"llada_moe": ("q_proj", "o_proj"), "llada2": ("query_key_value", "dense"), "llama": ("q_proj", "v_proj")}
FFN = ("gate_proj", "up_proj", "down_proj")


def memory_for(backbone: str, **changes: Any) -> MemoryConfig:
    return MemoryConfig(**{**SMALL, **AMPLIFIED[backbone], **changes})


class Step:
    """One step of the trainer, and what its inner loop wrote."""

    def __init__(self, trainer: MemDLMTrainer, batch: dict[str, Any], start: FastWeights | None = None) -> None:
        self.written: Written | None = None
        write = trainer.memory.write if trainer.memory else None

        def recording(*args: Any, **kwargs: Any) -> Written:
            self.written = write(*args, **kwargs, initial=start)
            return self.written

        if write:
            trainer.memory.write = recording
        trainer.model.zero_grad()
        self.loss = trainer.compute_loss(trainer.model, batch)
        self.loss.backward()
        self.gradients = take_gradients(trainer.model)
        self.loss = self.loss.detach()
        if write:
            del trainer.memory.write


def initial(trainer: MemDLMTrainer, batch: dict[str, Any]) -> FastWeights:
    fast = FastWeights.initial(trainer.memory.shapes, trainer.memory_config, batch["noise_keys"], torch.device("cpu"))
    # float32, but as wide as the model where the comparison is in float64
    dtype = torch.promote_types(torch.float32, next(trainer.model.parameters()).dtype)
    return FastWeights({name: v.to(dtype) for name, v in fast.tensors.items()}, fast.scaling)


def flat(fast: FastWeights) -> list[dict[str, Tensor]]:
    """The fast weights of each sample, under `layer.tensor`, experts one by one."""
    sets = [one_by_one(fast.tensors, sample) for sample in range(fast.samples)]
    return [{f"{site}.{name}": v for site, tensors in phi.items() for name, v in tensors.items()} for phi in sets]


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
    expected = naive_step(model, batch, phi0, memory, MASK, shift, trainer.loss_norm_type)
    expected.loss.backward()
    gradients = take_gradients(model, complete=False)  # a loop skips experts that no token chose

    assert step.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
    assert len(step.written.steps) == len(expected.inner_losses[0])
    for number, inner in enumerate(step.written.steps):
        for sample, losses in enumerate(expected.inner_losses):
            assert inner.loss[sample].item() == pytest.approx(losses[number], rel=tolerance, abs=tolerance)
    for ours, before, phi in zip(flat(step.written.fast_weights), flat(start), expected.phi, strict=True):
        theirs = {f"{site}.{name}": v for site, tensors in phi.items() for name, v in tensors.items()}
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

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "scope_batch": {"scope": "batch"},
    "full": {"kind": "full"},
    "full_scope_batch": {"kind": "full", "scope": "batch"},
    "three_steps": {"steps": 3},
    "one_step": {"steps": 1},
    "two_epochs": {"epochs": 2},
    "newly_revealed": {"targets": "newly_revealed"},
    "newly_revealed_scope_batch": {"targets": "newly_revealed", "steps": 3, "scope": "batch"},
    "inconsistent": {"strategy": "inconsistent"},
    "inconsistent_three_steps": {"strategy": "inconsistent", "steps": 3},
    "pre_anchor_only": {"strategy": "pre_anchor_only"},
    "anchor_only": {"strategy": "anchor_only", "epochs": 2},
    "kl": {"objective": "kl"},
    "reverse_kl": {"objective": "reverse_kl"},
    "hidden_mse": {"objective": "hidden_mse"},
    "hidden_cosine": {"objective": "hidden_cosine"},
    "kl_pre_anchor_only": {"objective": "kl", "strategy": "pre_anchor_only"},
    "uniform": {"weighting": "uniform"},
    "global_clip": {"clip": "global"},
    "global_clip_scope_batch": {"clip": "global", "scope": "batch"},
    "no_clip": {"clip": "none", "inner_lr": 0.1},
    "clip_of_zero": {"grad_clip": 0.0, "inner_lr": 0.1},
    "odd_rank": {"rank": 3},
    "first_layers": {"layers": "first"},
}


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
    """On the kernels that training uses; these settings amplify the rounding of the outer gradient the most."""
    trainer = make_trainer(tiny(kind, lora=True), tokenizer, tmp_path, memory_for(kind, **VARIANTS[variant]))
    check_against_naive(trainer, batch_of(trainer), tolerance=1e-5, of_gradients=1e-4)


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
    expected = naive_step(trainer.model, batch, [one_by_one(start.tensors, i) for i in range(3)], memory, MASK)
    expected.loss.backward()
    gradients = take_gradients(trainer.model, complete=False)
    assert step.loss.item() == pytest.approx(expected.loss.item(), rel=2e-2)
    for ours, before, phi in zip(flat(step.written.fast_weights), flat(start), expected.phi, strict=True):
        theirs = {f"{site}.{name}": v for site, tensors in phi.items() for name, v in tensors.items()}
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
        assert masks[:-1].sum(-1).tolist() == state_counts(strategy, int(anchor.sum()), total, scale, steps)
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


OFF, NO_EPOCHS = MemoryConfig(**SMALL, enabled=False), MemoryConfig(**SMALL, epochs=0)


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


# === invariant 5: a batch of N is N batches of one ===


@pytest.mark.parametrize(
    ("kind", "variant"),
    [*((kind, "paper") for kind in KINDS), ("llada_moe", "full"), ("llada2", "three_steps"), ("llama", "global_clip")],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-6)])
def test_a_batch_is_as_many_batches_of_one(kind, variant, dtype, tolerance, tokenizer, tmp_path):
    if dtype == torch.float32 and variant != "paper":
        pytest.skip("these amplify float32's rounding")
    memory = memory_for(kind, **VARIANTS[variant])
    model = tiny(kind, dtype, lora=True)
    trainer = make_trainer(model, tokenizer, tmp_path, memory, examples(5), loss_norm_type="batch")
    batch = batch_of(trainer, range(5))
    assert len(set(batch["anchor_mask"].sum(-1).tolist())) > 2, "samples should differ in their number of masks"
    singles = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(5)]
    whole = Step(trainer, batch, initial(trainer, batch))
    alone = [Step(trainer, single, initial(trainer, single)) for single in singles]

    assert whole.loss.item() == pytest.approx(sum(s.loss.item() for s in alone) / 5, rel=tolerance)
    together = flat(whole.written.fast_weights)
    for i, single in enumerate(alone):
        assert single.written.fast_weights.samples == 1
        for name, value in flat(single.written.fast_weights)[0].items():
            assert_close_relative(together[i][name], value, tolerance, f"sample {i}: {name}")
        for ours, theirs in zip(whole.written.steps, single.written.steps, strict=True):
            assert ours.loss[i].item() == pytest.approx(theirs.loss.item(), rel=tolerance)
            assert ours.grad_norm[i].item() == pytest.approx(theirs.grad_norm.item(), rel=10 * tolerance)
    mean = torch.cat([torch.stack([s.gradients[n] for s in alone]).mean(0).flatten() for n in whole.gradients])
    assert_close_relative(torch.cat([g.flatten() for g in whole.gradients.values()]), mean, tolerance, "gradient")


def test_samples_write_different_fast_weights(tokenizer, tmp_path):
    trainer = make_trainer(tiny("llada_moe"), tokenizer, tmp_path, memory_for("llada_moe"))
    first, second, _ = flat(Step(trainer, batch_of(trainer)).written.fast_weights)
    assert all(not torch.equal(first[n], second[n]) for n in first if "experts" not in n)


def test_a_sample_without_masks_writes_nothing(tokenizer, tmp_path):
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama"))
    batch = batch_of(trainer)
    for name in ("anchor_mask", "maskable", "inner_masks"):
        batch[name][1] = False
    batch["inner_ratios"][1] = 0.0
    step = Step(trainer, batch)
    assert step.loss.isfinite() and step.written.finite.all()
    assert all((v[1] == 0).all() for k, v in step.written.fast_weights.tensors.items() if k.endswith(".B"))


# === invariant 4: no trace ===


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a step must leave as it was."""
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": {(name, kind): len(getattr(module, kind)) for name, module in modules.items() for kind in hooks},
        "fast": {name: dict(module.fast) for name, module in modules.items() if isinstance(module, RoutedExperts)},
        "mode": {name: module.training for name, module in modules.items()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "state": list(model.state_dict()),
    }


class Failing(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "where"), [("train", "first layer"), ("train", "last layer"), ("eval", "last layer")])
def test_an_exception_leaves_no_trace(kind, mode, where, tokenizer, tmp_path, monkeypatch):
    trainer = make_trainer(tiny(kind, lora=True), tokenizer, tmp_path, memory_for(kind))
    model, batch = trainer.model, batch_of(trainer)
    getattr(model, mode)()
    before = traces(model)
    layer = staged_backbone(model).layers[0 if where == "first layer" else -1]
    norm = layer.post_attention_layernorm
    forward, calls, fail_at = norm.forward, 0, math.inf

    def counting(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise Failing
        return forward(x)

    monkeypatch.setattr(norm, "forward", counting)
    trainer.compute_loss(model, batch)
    assert traces(model) == before
    passes = calls
    assert passes >= (3 if where == "last layer" else 2)  # two inner steps and the outer one; two trunks
    for fail_at in range(1, passes + 1):
        calls = 0
        with pytest.raises(Failing):
            trainer.compute_loss(model, batch)
        assert traces(model) == before, f"failure in pass {fail_at}"
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_while_holding_leaves_no_trace(kind, tokenizer, tmp_path):
    trainer = make_trainer(tiny(kind), tokenizer, tmp_path, memory_for(kind))
    fast = initial(trainer, batch_of(trainer))
    before = traces(trainer.model)
    with pytest.raises(Failing), trainer.memory.holding(fast):
        assert traces(trainer.model) != before
        raise Failing
    assert traces(trainer.model) == before
    with trainer.memory.holding(None):
        assert traces(trainer.model) == before


def test_fast_weights_are_not_put_over_others(tokenizer, tmp_path):
    trainer = make_trainer(tiny("llada_moe"), tokenizer, tmp_path, memory_for("llada_moe"))
    fast = initial(trainer, batch_of(trainer))
    before = traces(trainer.model)
    with trainer.memory.holding(fast):
        inside = traces(trainer.model)
        with pytest.raises(RuntimeError, match="already holds fast weights"), trainer.memory.holding(fast):
            pass
        assert traces(trainer.model)["fast"].keys() == inside["fast"].keys()
        assert traces(trainer.model)["hooks"] == inside["hooks"]
    assert traces(trainer.model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_no_fast_weight_is_saved_or_optimised(kind, tokenizer, tmp_path):
    model = tiny(kind, lora=True)
    names, trainable = set(model.state_dict()), {p for p in model.parameters() if p.requires_grad}
    trainer = make_trainer(
        model, tokenizer, tmp_path, memory_for(kind), max_steps=1, save_strategy="steps", save_steps=1, max_grad_norm=1
    )
    seen: list[dict[str, Any]] = []
    training_step = trainer.training_step
    trainer.training_step = lambda model, inputs, *args: (
        seen.append(dict(inputs)) or training_step(model, inputs, *args)
    )
    before = {name: v.clone() for name, v in model.state_dict().items()}
    trainer.train()
    after = {name: v.clone() for name, v in model.state_dict().items()}
    model.load_state_dict(before)
    step = Step(trainer, seen[0])
    model.load_state_dict(after)

    assert set(model.state_dict()) == names
    optimised = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert set(optimised) == trainable and len(optimised) == len(trainable)
    expected = torch.stack([g.norm() for g in step.gradients.values()]).norm().item()
    logged = next(log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log)
    assert logged == pytest.approx(expected, rel=1e-5)

    folder = Path(tmp_path) / "checkpoint-1"
    from safetensors.torch import load_file

    saved = load_file(folder / "adapter_model.safetensors")
    assert {name.replace(".weight", ".default.weight") for name in saved} == {n for n in names if "lora_" in n}
    model.save_pretrained(tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys() == saved.keys()
    with trainer.memory.holding(step.written.fast_weights):
        assert set(model.state_dict()) == names
        assert {p for p in model.parameters() if p.requires_grad} == trainable


# === snapshots ===


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["lora", "full"])
def test_a_saved_snapshot_gives_the_same_logits(kind, form, tokenizer, tmp_path):
    model = tiny(kind).eval()
    memory = memory_for(kind, kind=form)
    trainer = make_trainer(model, tokenizer, tmp_path, memory)
    batch = batch_of(trainer)
    written = trainer.memory.write(Trajectory.from_batch(batch))
    with torch.no_grad(), trainer.memory.holding(written.fast_weights):
        expected = model(input_ids=batch["input_ids"]).logits
    assert not torch.allclose(model(input_ids=batch["input_ids"]).logits, expected, atol=1e-2)
    written.fast_weights.save(tmp_path / "memory.safetensors", {"prompt": "abc"})

    loaded, header = FastWeights.load(tmp_path / "memory.safetensors")
    assert header == {"prompt": "abc"}
    other = ParametricMemory(tiny(kind).eval(), memory, MASK)
    with torch.no_grad(), other.holding(loaded):
        torch.testing.assert_close(other.model(input_ids=batch["input_ids"]).logits, expected, rtol=1e-5, atol=1e-5)


def test_foreign_snapshots_are_refused(tokenizer, tmp_path):
    source = ParametricMemory(tiny("llada_moe"), MemoryConfig(**SMALL), MASK)
    fast = FastWeights.initial(source.shapes, source.config, torch.tensor([1]), torch.device("cpu"))

    other_sites = ParametricMemory(tiny("llada_moe"), MemoryConfig(**{**SMALL, "layer_fraction": 0.3}), MASK)
    message = (
        r"fast weights for other sites than this model's: layers\.1\.mlp\.experts\.down_proj\.A is in the "
        r"fast weights only"
    )
    with pytest.raises(ConfigError, match=f"^{message}$"), other_sites.holding(fast):
        pass
    back = FastWeights.initial(other_sites.shapes, other_sites.config, torch.tensor([1]), torch.device("cpu"))
    message = r"layers\.1\.mlp\.experts\.down_proj\.A is in the model only$"
    with pytest.raises(ConfigError, match=message), source.holding(back):
        pass
    other_rank = ParametricMemory(tiny("llada_moe"), MemoryConfig(**{**SMALL, "rank": 8}), MASK)
    message = r"fast weights of another size: \S+ is \(5, 4, 32\), expected \(5, 8, 32\)"
    with pytest.raises(ConfigError, match=f"^{message}$"), other_rank.holding(fast):
        pass
    for memory in (source, other_sites, other_rank):
        assert all(not m.fast for m in memory.model.modules() if isinstance(m, RoutedExperts))


def test_another_number_of_experts_is_refused():
    source = ParametricMemory(tiny("llada_moe", num_experts=4), MemoryConfig(**SMALL), MASK)
    fast = FastWeights.initial(source.shapes, source.config, torch.tensor([1]), torch.device("cpu"))
    target = ParametricMemory(tiny("llada_moe"), MemoryConfig(**SMALL), MASK)
    with pytest.raises(ConfigError, match="fast weights of another size"), target.holding(fast):
        pass


def test_what_is_no_snapshot_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=r"a safetensors file, but not a fast-weight snapshot; write one with"):
        FastWeights.load(path)
    path.write_text(json.dumps({"x": 1}))
    with pytest.raises(ConfigError, match=r"other\.safetensors: not a fast-weight snapshot \("):
        FastWeights.load(path)
    with pytest.raises(ConfigError, match=r"missing\.safetensors: not a fast-weight snapshot \("):
        FastWeights.load(tmp_path / "missing.safetensors")


# === samples that are not finite ===


def poisoned(model: nn.Module, token: int, value: float = math.nan) -> None:
    with torch.no_grad():
        staged_backbone(model).get_input_embeddings().weight[token] = value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_sample_falls_back_and_leaves_the_others(kind, value, tokenizer, tmp_path):
    rows = examples(3)
    for row in rows:
        row["input_ids"][0] = 3
    trainer = make_trainer(tiny(kind), tokenizer, tmp_path, memory_for(kind), rows)
    clean = batch_of(trainer)
    bad = {**clean, "input_ids": clean["input_ids"].clone()}
    bad["input_ids"][1, 0] = 47
    clean["input_ids"][1, 0] = 46
    for batch in (clean, bad):  # nowhere else
        batch["input_ids"][:, 1:][batch["input_ids"][:, 1:] == 47] = 5
    poisoned(trainer.model, 47, value)
    expected = trainer.memory.write(Trajectory.from_batch(clean))
    written = trainer.memory.write(Trajectory.from_batch(bad))
    assert expected.finite.all() and written.finite.tolist() == [True, False, True]
    for name, tensor in written.fast_weights.tensors.items():
        assert tensor.isfinite().all()
        for sample in (0, 2):
            ours, theirs = (t[..., sample, :, :] for t in (tensor, expected.fast_weights.tensors[name]))
            if kind == "llama":
                assert torch.equal(ours, theirs), name
            else:  # a product over an expert's rows rounds by how many there are, and the bad sample chose others
                assert_close_relative(ours, theirs, 1e-5, name)
        assert name.endswith(".A") or not tensor[..., 1, :, :].any()


@pytest.mark.parametrize("scope", ["sample", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_diverging_inner_loop_is_counted_and_the_run_goes_on(kind, scope, tokenizer, tmp_path):
    """Steps so large that the second inner loss overflows: every sample falls back, and the loss is plain MDLM's."""
    memory = memory_for(kind, inner_lr=1e38, scope=scope)
    rows = examples(6, shortest=40, longest=40)
    trainer = make_trainer(tiny(kind, lora=True), tokenizer, tmp_path, memory, rows, max_steps=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["nonfinite_samples"] for log in logs] == ([3, 3] if scope == "sample" else [1, 1])
    assert all(math.isfinite(log["loss"]) and math.isfinite(log["inner_loss_1"]) for log in logs)
    assert all("inner_loss_2" not in log for log in logs)
    assert [log["loss"] for log in logs] == [pytest.approx(log["loss_memory_off"], abs=1e-4) for log in logs]
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_healthy_run_counts_none(tokenizer, tmp_path):
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama"), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["nonfinite_samples"] == 0


# === what the memory does not change ===


def test_writing_takes_the_mode_of_the_model_as_it_is(tokenizer, tmp_path):
    """Dropout is active while adapting only where the caller has it on."""
    trainer = make_trainer(tiny("llama", lora=0.5), tokenizer, tmp_path, memory_for("llama"))
    trajectory = Trajectory.from_batch(batch_of(trainer))
    trainer.model.eval()
    first, second = (trainer.memory.write(trajectory).fast_weights.tensors for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    trainer.model.train()
    third = trainer.memory.write(trajectory).fast_weights.tensors
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_a_given_trunk_is_that_of_the_anchor(tokenizer, tmp_path):
    trainer = make_trainer(tiny("llada2"), tokenizer, tmp_path, memory_for("llada2"))
    batch = batch_of(trainer)
    trajectory = Trajectory.from_batch(batch)
    trunk = trainer.memory.trunk(torch.where(batch["anchor_mask"], MASK, batch["input_ids"]))
    given, own = (trainer.memory.write(trajectory, anchor_trunk=t).fast_weights.tensors for t in (trunk, None))
    assert all(torch.equal(given[name], own[name]) for name in own)
    assert not any(p.grad is not None for p in trainer.model.parameters())


def test_initial_fast_weights_can_be_given(tokenizer, tmp_path):
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama"))
    batch = batch_of(trainer)
    start = initial(trainer, {**batch, "noise_keys": batch["noise_keys"] + 1})
    written = trainer.memory.write(Trajectory.from_batch(batch), initial=start).fast_weights.tensors
    default = trainer.memory.write(Trajectory.from_batch(batch)).fast_weights.tensors
    assert any(not torch.equal(written[name], default[name]) for name in default)
    assert start.samples == 3 and all(not v.requires_grad for v in written.values())


def test_an_unknown_model_is_refused():
    with pytest.raises(TypeError, match=r"^no backbone adapter for Linear; load the model with .* LlamaForCausalLM, "):
        ParametricMemory(nn.Linear(2, 2), MemoryConfig(), MASK)


@pytest.mark.parametrize("kind", ["llada_moe", "llama"])
def test_fast_weights_are_held_once(kind):
    memory = ParametricMemory(tiny(kind), MemoryConfig(**SMALL), MASK)
    fast = FastWeights.initial(memory.shapes, memory.config, torch.tensor([1]), torch.device("cpu"))
    refused = pytest.raises(RuntimeError, match="already holds fast weights")
    with memory.holding(fast), refused, memory.holding(fast):
        pass
    with memory.holding(fast):
        pass


@pytest.mark.parametrize("kind", ["llada_moe", "llama"])
def test_fast_weights_of_another_number_of_samples_are_refused(kind):
    memory = ParametricMemory(tiny(kind), MemoryConfig(**SMALL), MASK)
    fast = FastWeights.initial(memory.shapes, memory.config, torch.tensor([1, 2]), torch.device("cpu"))
    for batch in (1, 3, 4):
        with memory.holding(fast), pytest.raises(ValueError, match="fast weights of 2 samples on"):
            memory.model(input_ids=torch.ones(batch, 5, dtype=torch.int64))
