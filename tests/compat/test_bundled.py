"""The bundled subset of dllm by itself; against dllm in test_bundled_dllm.py."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import pytest
import torch

from dllm_memdlm.compat import bundled, dllm_api
from dllm_memdlm.compat.bundled import (
    BaseAlphaScheduler,
    CollatorWrapper,
    CosineAlphaScheduler,
    LinearAlphaScheduler,
    MDLMConfig,
    NoAttentionMaskWrapper,
    make_alpha_scheduler,
    prepend_bos,
)

SCHEDULERS = ["LinearAlphaScheduler", "CosineAlphaScheduler"]
TIMES = torch.linspace(0, 1, 101)

# --- schedules ---


def test_linear_schedule():
    schedule = LinearAlphaScheduler()
    assert schedule(0.25) == schedule.alpha(0.25) == 0.75
    assert schedule.alpha_derivative(0.25) == -1
    assert torch.equal(schedule(TIMES), 1 - TIMES)
    assert torch.equal(schedule.alpha_derivative(TIMES), -torch.ones(101))
    torch.testing.assert_close(schedule.weight(TIMES[1:]), 1 / TIMES[1:], rtol=2e-4, atol=0)
    assert schedule.weight(0.5) == pytest.approx(2, rel=1e-5)


def test_cosine_schedule():
    schedule = CosineAlphaScheduler()
    for t in (0.0, 0.3, 0.5, 1.0):
        assert schedule(t) == pytest.approx(1 - math.cos(math.pi / 2 * (1 - t)), abs=1e-6)
        assert schedule.alpha_derivative(t) == pytest.approx(-math.pi / 2 * math.sin(math.pi / 2 * (1 - t)), abs=1e-6)
    assert schedule.weight(0.5) == pytest.approx(math.pi / 2, rel=1e-5)
    assert (schedule(0.0), schedule(1.0)) == (pytest.approx(1), pytest.approx(0))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_derivative_and_weight_follow_from_alpha(name):
    schedule = make_alpha_scheduler(name)
    step = 1e-2
    t = torch.linspace(step, 1 - step, 50)
    slope = (schedule(t + step) - schedule(t - step)) / (2 * step)
    torch.testing.assert_close(schedule.alpha_derivative(t), slope, atol=1e-3, rtol=0)
    torch.testing.assert_close(schedule.weight(t), -schedule.alpha_derivative(t) / (1 - schedule(t)), rtol=5e-3, atol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_types_in_and_out(name):
    schedule = make_alpha_scheduler(name)
    for function in (schedule, schedule.alpha, schedule.alpha_derivative, schedule.weight):
        assert type(function(0.5)) is float
        out = function(torch.full((2, 3), 0.5))
        assert out.dtype == torch.float32 and out.shape == (2, 3)


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan])
def test_times_outside_are_refused(t):
    schedule = LinearAlphaScheduler()
    for function in (schedule, schedule.alpha_derivative, schedule.weight):
        with pytest.raises(ValueError, match=r"expected a time in \[0, 1\]"):
            function(t)
        with pytest.raises(ValueError, match=r"expected a time in \[0, 1\]"):
            function(torch.tensor([0.5, t]))
    with pytest.raises(ValueError) as error:
        schedule(1.5)
    assert str(error.value) == "t=1.5: expected a time in [0, 1]"


def test_schedules_by_name():
    for name in ("LinearAlphaScheduler", "linearalphascheduler", "LINEARALPHASCHEDULER"):
        assert type(make_alpha_scheduler(name)) is LinearAlphaScheduler
    assert type(make_alpha_scheduler("CosineAlphaScheduler")) is CosineAlphaScheduler
    with pytest.raises(ValueError) as error:
        make_alpha_scheduler("sigmoid")
    assert str(error.value) == "scheduler 'sigmoid': expected one of CosineAlphaScheduler, LinearAlphaScheduler"


def test_new_schedules_are_found_by_name():
    @dataclasses.dataclass
    class PowerAlphaScheduler(BaseAlphaScheduler):
        power: float = 2.0

        def _alpha(self, t):
            return 1 - t**self.power

        def _alpha_derivative(self, t):
            return -self.power * t ** (self.power - 1)

    try:
        schedule = make_alpha_scheduler("poweralphascheduler", power=3.0)
        assert schedule(0.5) == 0.875
        assert schedule.weight(0.5) == pytest.approx(6, rel=1e-4)
    finally:
        del BaseAlphaScheduler.registry["poweralphascheduler"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_masked_token_is_masked_earlier_with_this_probability(name):
    """(1 - α(s)) / (1 - α(t)), in floats for floats and in tensors for tensors."""
    scheduler = make_alpha_scheduler(name)
    s, t = 0.125, 0.5
    exact = (1 - scheduler.alpha(s)) / (1 - scheduler.alpha(t))
    assert scheduler.reverse_mask_prob(s=s, t=t) == pytest.approx(exact)
    assert name != "LinearAlphaScheduler" or exact == pytest.approx(0.25)
    both = scheduler.reverse_mask_prob(torch.tensor([0.0, s]), torch.tensor([t, t]))
    assert both.tolist() == pytest.approx([(1 - scheduler.alpha(0.0)) / (1 - scheduler.alpha(t)), exact], abs=1e-6)
    with pytest.raises(ValueError, match="expected s < t"):
        scheduler.reverse_mask_prob(s=t, t=t)


# --- collator wrappers ---


@dataclasses.dataclass
class Stack:
    """The innermost collator: lists to tensors."""

    names: tuple[str, ...] = ("input_ids", "attention_mask")

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        return {name: torch.tensor([feature[name] for feature in features]) for name in self.names}


@dataclasses.dataclass
class Note(CollatorWrapper):
    """Writes down when it is asked."""

    name: str
    trace: list[str] = dataclasses.field(default_factory=list)

    def before(self, features):
        self.trace.append(f"before {self.name}")
        return [feature | {self.name: 1} for feature in features]

    def after(self, outputs):
        self.trace.append(f"after {self.name}")
        return outputs


FEATURES = [{"input_ids": [1, 2], "attention_mask": [1, 1]}, {"input_ids": [3, 4], "attention_mask": [1, 0]}]


def test_wrappers_nest():
    trace: list[str] = []
    collator = Note(Note(Stack(("input_ids", "outer", "inner")), "inner", trace), "outer", trace)
    batch = collator(FEATURES)
    assert trace == ["before outer", "before inner", "after inner", "after outer"]
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2], [3, 4]],
        "outer": [1, 1],
        "inner": [1, 1],
    }


def test_no_attention_mask_wrapper():
    batch = NoAttentionMaskWrapper(Stack())(FEATURES)
    assert list(batch) == ["input_ids"]
    assert list(NoAttentionMaskWrapper(Stack(("input_ids",)))(FEATURES)) == ["input_ids"]


def test_attributes_are_delegated():
    collator = NoAttentionMaskWrapper(Note(Stack(), "middle"))
    assert collator.name == "middle" and collator.names == ("input_ids", "attention_mask")
    with pytest.raises(AttributeError) as error:
        _ = Stack().missing
    with pytest.raises(AttributeError):
        _ = collator.missing
    assert "missing" in str(error.value)
    assert not hasattr(collator, "__len__")


def test_wrappers_are_pickled_and_copied():
    collator = NoAttentionMaskWrapper(Note(Stack(), "middle"))
    copies = [pickle.loads(pickle.dumps(collator)), copy.copy(collator), copy.deepcopy(collator)]
    assert all(again == collator and again.name == "middle" for again in copies)
    for again in copies:
        assert again(FEATURES)["input_ids"].tolist() == [[1, 2], [3, 4]]
    assert copy.deepcopy(collator).collator is not collator.collator


# --- begin of sequence ---


def bos_batch(*names: str) -> dict[str, Any]:
    batch = {
        "input_ids": torch.tensor([[5, 6], [7, 8]]),
        "labels": torch.tensor([[5, 6], [-100, 8]]),
        "attention_mask": torch.tensor([[1, 1], [1, 0]], dtype=torch.int32),
    }
    return {name: batch[name] for name in names}


def test_prepend_bos():
    batch = bos_batch("input_ids", "labels", "attention_mask")
    out = prepend_bos(batch, 2)
    assert out is batch
    assert {name: value.tolist() for name, value in out.items()} == {
        "input_ids": [[2, 5, 6], [2, 7, 8]],
        "labels": [[-100, 5, 6], [-100, -100, 8]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }
    assert out["attention_mask"].dtype == torch.int32
    assert prepend_bos(bos_batch("input_ids", "labels"), 2, -1)["labels"].tolist() == [[-1, 5, 6], [-1, -100, 8]]


def test_prepend_bos_takes_what_is_there():
    out = prepend_bos(bos_batch("input_ids") | {"labels": None}, 2)
    assert out["input_ids"].tolist() == [[2, 5, 6], [2, 7, 8]]
    assert out["labels"] is None and "attention_mask" not in out


# --- training arguments ---


def test_defaults_of_the_training_arguments():
    defaults = {f.name: f.default for f in dataclasses.fields(MDLMConfig)}
    expected = {
        "time_epsilon": 1e-3,
        "loss_weight_type": "scheduler",
        "loss_norm_type": "token",
        "right_shift_logits": False,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "eval_steps": 0.1,
        "seed": 42,
    }
    assert {name: defaults[name] for name in expected} == expected


def test_run_name_follows_the_output_folder(tmp_path):
    settings = {"use_cpu": True, "bf16": False, "report_to": "none"}
    assert MDLMConfig(output_dir=str(tmp_path), **settings).run_name == str(tmp_path)
    assert MDLMConfig(output_dir=str(tmp_path), run_name="mine", **settings).run_name == "mine"


# --- the seam ---


def test_the_seam_says_which_is_in_use():
    names = set(dllm_api.__all__) - {"DLLM_COMMIT", "HAS_DLLM", "describe"}
    for name in names:
        assert (getattr(dllm_api, name) is getattr(bundled, name)) != dllm_api.HAS_DLLM, name
    assert dllm_api.describe().startswith("dllm at " if dllm_api.HAS_DLLM else "bundled subset (")
