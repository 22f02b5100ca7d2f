"""The bundled subset of dllm: by itself, and against dllm where that is installed."""

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
    LinearAlphaScheduler,
    MDLMConfig,
    NoAttentionMaskWrapper,
    make_alpha_scheduler,
    prepend_bos,
)

BOTH = (bundled, dllm_api)
#: By name: α(t).
SCHEDULERS = {
    "LinearAlphaScheduler": lambda t: 1 - t,
    "CosineAlphaScheduler": lambda t: 1 - math.cos(math.pi / 2 * (1 - t)),
}
FEATURES = [{"input_ids": [1, 2], "attention_mask": [1, 1]}, {"input_ids": [3, 4], "attention_mask": [1, 0]}]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules(name):
    """α, its slope, the weight, and how probable a masked token was masked earlier; floats for floats."""
    schedule, alpha = make_alpha_scheduler(name), SCHEDULERS[name]
    for t in (0.01, 0.3, 0.5, 0.99):
        slope = (alpha(t + 1e-6) - alpha(t - 1e-6)) / 2e-6
        assert schedule(t) == schedule.alpha(t) == pytest.approx(alpha(t), abs=1e-6)
        assert schedule.alpha_derivative(t) == pytest.approx(slope, abs=1e-4)
        assert schedule.weight(t) == pytest.approx(-slope / (1 - alpha(t)), rel=1e-3)
        assert schedule.reverse_mask_prob(0.0, t) == pytest.approx((1 - alpha(0)) / (1 - alpha(t)), abs=1e-6)
    assert (schedule(0.0), schedule(1.0)) == (pytest.approx(1), pytest.approx(0))
    assert math.isfinite(schedule.weight(0.0)), "where nothing is masked"
    for function in (schedule, schedule.alpha_derivative, schedule.weight):
        out = function(torch.full((2, 3), 0.5))
        assert type(function(0.5)) is float and (out.dtype, out.shape) == (torch.float32, (2, 3))
        for outside in (-0.1, 1.1, math.nan, torch.tensor([0.5, 1.5])):
            with pytest.raises(ValueError, match=r"expected a time in \[0, 1\]"):
                function(outside)
    both = schedule.reverse_mask_prob(torch.tensor([0.125, 0.25]), torch.tensor([0.5, 0.5])).tolist()
    assert both == pytest.approx([(1 - alpha(s)) / (1 - alpha(0.5)) for s in (0.125, 0.25)], rel=1e-5)
    with pytest.raises(ValueError, match="expected s < t"):
        schedule.reverse_mask_prob(s=0.5, t=0.5)


def test_schedules_are_found_by_name_new_ones_too():
    @dataclasses.dataclass
    class PowerAlphaScheduler(BaseAlphaScheduler):
        power: float = 2.0

        def _alpha(self, t):
            return 1 - t**self.power

        def _alpha_derivative(self, t):
            return -self.power * t ** (self.power - 1)

    try:
        schedule = make_alpha_scheduler("poweralphascheduler", power=3.0)
        assert schedule(0.5) == 0.875 and schedule.weight(0.5) == pytest.approx(6, rel=1e-4)
    finally:
        del BaseAlphaScheduler.registry["poweralphascheduler"]
    assert type(make_alpha_scheduler("linearalphascheduler")) is LinearAlphaScheduler
    with pytest.raises(ValueError, match=r"'sigmoid': expected one of CosineAlphaScheduler, LinearAlphaScheduler"):
        make_alpha_scheduler("sigmoid")


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


def test_wrappers_nest():
    trace: list[str] = []
    batch = Note(Note(Stack(("input_ids", "outer", "inner")), "inner", trace), "outer", trace)(FEATURES)
    assert trace == ["before outer", "before inner", "after inner", "after outer"]
    assert batch["input_ids"].tolist() == [[1, 2], [3, 4]]
    assert batch["outer"].tolist() == batch["inner"].tolist() == [1, 1]
    assert list(NoAttentionMaskWrapper(Stack())(FEATURES)) == ["input_ids"]


def test_attributes_are_delegated_in_copies_too():
    collator = NoAttentionMaskWrapper(Note(Stack(), "middle"))
    copies = [pickle.loads(pickle.dumps(collator)), copy.copy(collator), copy.deepcopy(collator)]
    assert all(again == collator for again in copies)
    for again in (collator, *copies):
        assert (again.name, again.names) == ("middle", ("input_ids", "attention_mask"))
        assert again(FEATURES)["input_ids"].tolist() == [[1, 2], [3, 4]]
        with pytest.raises(AttributeError, match="missing"):
            _ = again.missing
        assert not hasattr(again, "__len__")


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
    assert out is batch and out["attention_mask"].dtype == torch.int32
    assert {name: value.tolist() for name, value in out.items()} == {
        "input_ids": [[2, 5, 6], [2, 7, 8]],
        "labels": [[-100, 5, 6], [-100, -100, 8]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }
    assert prepend_bos(bos_batch("input_ids", "labels"), 2, -1)["labels"].tolist() == [[-1, 5, 6], [-1, -100, 8]]
    out = prepend_bos(bos_batch("input_ids") | {"labels": None}, 2)
    assert out["labels"] is None and "attention_mask" not in out


def test_training_arguments(tmp_path):
    settings = {"use_cpu": True, "bf16": False, "report_to": "none"}
    args = MDLMConfig(output_dir=str(tmp_path), **settings)
    assert (args.time_epsilon, args.loss_weight_type, args.loss_norm_type) == (1e-3, "scheduler", "token")
    assert (args.learning_rate, args.warmup_ratio, args.seed, args.run_name) == (2e-5, 0.1, 42, str(tmp_path))
    assert MDLMConfig(output_dir=str(tmp_path), run_name="mine", **settings).run_name == "mine"


def test_the_seam_says_which_is_in_use():
    for name in set(dllm_api.__all__) - {"DLLM_COMMIT", "HAS_DLLM", "commit", "describe"}:
        assert (getattr(dllm_api, name) is getattr(bundled, name)) != dllm_api.HAS_DLLM, name
    assert dllm_api.describe().startswith("dllm at " if dllm_api.HAS_DLLM else "bundled subset (")


@pytest.mark.dllm
@pytest.mark.parametrize("name", [*SCHEDULERS, "linearalphascheduler"])
def test_schedules_are_those_of_dllm(name):
    ours, theirs = (module.make_alpha_scheduler(name) for module in BOTH)
    assert type(ours).__name__ == type(theirs).__name__ and type(ours) is not type(theirs)
    for function in ("alpha", "alpha_derivative", "weight", "__call__"):
        times = torch.linspace(0, 1, 101)
        assert torch.equal(*(getattr(schedule, function)(times) for schedule in (ours, theirs))), function
        for t in (0.0, 0.001, 0.37, 1.0):
            assert getattr(ours, function)(t) == getattr(theirs, function)(t)
    for s, t in ((0.0, 0.1), (0.125, 0.5), (0.9, 1.0)):
        assert ours.reverse_mask_prob(s=s, t=t) == theirs.reverse_mask_prob(s=s, t=t)
    for schedule in (ours, theirs):
        with pytest.raises(ValueError, match=r"1\.01"):
            schedule.weight(1.01)


@pytest.mark.dllm
@pytest.mark.parametrize("names", [("input_ids",), ("input_ids", "labels", "attention_mask")], ids=len)
@pytest.mark.parametrize("label", [(), (-1,)])
def test_prepend_bos_is_that_of_dllm(names, label):
    ours, theirs = (module.prepend_bos(bos_batch(*names), 2, *label) for module in BOTH)
    assert ours.keys() == theirs.keys()
    for name in names:
        assert torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype


@pytest.mark.dllm
def test_wrappers_are_those_of_dllm():
    ours, theirs = (module.NoAttentionMaskWrapper(Stack()) for module in BOTH)
    a, b = ours(FEATURES), theirs(FEATURES)
    assert a.keys() == b.keys() and torch.equal(a["input_ids"], b["input_ids"]) and ours.names == theirs.names
    for module in BOTH:
        wrapper = module.CollatorWrapper(Stack())
        assert wrapper.before(FEATURES) is FEATURES
        with pytest.raises(AttributeError, match="missing"):
            _ = wrapper.missing


@pytest.mark.dllm
def test_training_arguments_are_those_of_dllm():
    def default_of(field: dataclasses.Field) -> Any:
        return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()

    ours, theirs = ({f.name: default_of(f) for f in dataclasses.fields(module.MDLMConfig)} for module in BOTH)
    assert len(theirs) > 100
    # which only scripts read, and transformers 5 has not
    assert theirs.pop("overwrite_output_dir") != ours.pop("overwrite_output_dir")
    assert ours == theirs
