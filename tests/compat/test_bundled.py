"""The bundled subset of dllm, and dllm itself where it is installed: both do the same."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dllm_memdlm.compat import bundled, dllm_api

#: By name: α(t).
SCHEDULERS = {
    "LinearAlphaScheduler": lambda t: 1 - t,
    "CosineAlphaScheduler": lambda t: 1 - math.cos(math.pi / 2 * (1 - t)),
}
FEATURES = [{"input_ids": [1, 2], "attention_mask": [1, 1]}, {"input_ids": [3, 4], "attention_mask": [1, 0]}]
NAMES = (
    *("BaseAlphaScheduler", "BaseSampler", "BaseSamplerConfig", "BaseSamplerOutput", "CollatorWrapper", "MDLMConfig"),
    *("LinearAlphaScheduler", "MDLMTrainer", "NoAttentionMaskWrapper", "prepend_bos"),
)


@pytest.fixture(params=["bundled", pytest.param("dllm", marks=pytest.mark.dllm)])
def module(request) -> Any:
    """Where the names are."""
    if request.param == "bundled":
        return bundled
    from dllm.core import schedulers

    return SimpleNamespace(**vars(schedulers) | vars(dllm_api))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules(name, module):
    """α, its slope, the weight, and how probable a masked token was masked earlier; floats for floats."""
    schedule, ours, alpha = getattr(module, name)(), getattr(bundled, name)(), SCHEDULERS[name]
    for t in (0.01, 0.3, 0.5, 0.99):
        slope = (alpha(t + 1e-6) - alpha(t - 1e-6)) / 2e-6
        assert schedule(t) == schedule.alpha(t) == pytest.approx(alpha(t), abs=1e-6)
        assert schedule.alpha_derivative(t) == pytest.approx(slope, abs=1e-4)
        assert schedule.weight(t) == pytest.approx(-slope / (1 - alpha(t)), rel=1e-3)
        assert schedule.reverse_mask_prob(0.0, t) == pytest.approx((1 - alpha(0)) / (1 - alpha(t)), abs=1e-6)
    assert (schedule(0.0), schedule(1.0)) == (pytest.approx(1), pytest.approx(0))
    assert math.isfinite(schedule.weight(0.0)), "where nothing is masked"
    for function in ("__call__", "alpha", "alpha_derivative", "weight"):
        there, here = getattr(schedule, function), getattr(ours, function)
        assert type(there(0.5)) is float and there(0.37) == here(0.37)
        times = torch.linspace(0, 1, 102).view(2, 51)
        assert torch.equal(there(times), here(times)) and there(times).dtype == torch.float32
        for outside in (-0.1, 1.1, math.nan, torch.tensor([0.5, 1.5])):
            with pytest.raises(ValueError, match=r"\[0, ?1\]"):
                there(outside)
    both = schedule.reverse_mask_prob(torch.tensor([0.125, 0.25]), torch.tensor([0.5, 0.5])).tolist()
    assert both == pytest.approx([(1 - alpha(s)) / (1 - alpha(0.5)) for s in (0.125, 0.25)], rel=1e-5)
    with pytest.raises(ValueError, match="s < t"):
        schedule.reverse_mask_prob(s=0.5, t=0.5)


@dataclasses.dataclass
class Stack:
    """The innermost collator: lists to tensors."""

    names: tuple[str, ...] = ("input_ids", "attention_mask")

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        return {name: torch.tensor([feature[name] for feature in features]) for name in self.names}


def test_wrappers_nest_and_delegate_attributes_in_copies_too(module):
    trace: list[str] = []

    class Note(module.CollatorWrapper):
        """Writes down when it is asked."""

        name = "outer"

        def before(self, features):
            trace.append(f"before {self.name}")
            return [feature | {self.name: 1} for feature in super().before(features)]

        def after(self, outputs):
            trace.append(f"after {self.name}")
            return super().after(outputs)

    inner = Note(Stack(("input_ids", "outer", "inner")))
    inner.name = "inner"
    batch = Note(inner)(FEATURES)
    assert trace == ["before outer", "before inner", "after inner", "after outer"]
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2], [3, 4]],
        "outer": [1, 1],
        "inner": [1, 1],
    }
    collator = module.NoAttentionMaskWrapper(module.CollatorWrapper(Stack()))
    for again in (collator, pickle.loads(pickle.dumps(collator)), copy.copy(collator), copy.deepcopy(collator)):
        assert again == collator and again.names == ("input_ids", "attention_mask")
        assert {name: value.tolist() for name, value in again(FEATURES).items()} == {"input_ids": [[1, 2], [3, 4]]}
        with pytest.raises(AttributeError, match="missing"):
            _ = again.missing
        assert not hasattr(again, "__len__")


def test_prepend_bos(module):
    mask = torch.tensor([[1, 1], [1, 0]], dtype=torch.int32)
    batch = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "labels": torch.tensor([[5, 6], [-100, 8]])}
    with_mask = {**batch, "attention_mask": mask}
    out = module.prepend_bos(with_mask, 2)
    assert out is with_mask and out["attention_mask"].dtype == torch.int32
    assert {name: value.tolist() for name, value in out.items()} == {
        "input_ids": [[2, 5, 6], [2, 7, 8]],
        "labels": [[-100, 5, 6], [-100, -100, 8]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }
    assert module.prepend_bos(dict(batch), 2, -1)["labels"].tolist() == [[-1, 5, 6], [-1, -100, 8]]
    out = module.prepend_bos({**batch, "labels": None}, 2)
    assert out["labels"] is None and "attention_mask" not in out


def test_training_arguments(module, tmp_path):
    def defaults(config: type) -> dict[str, Any]:
        missing = dataclasses.MISSING
        fields = {f.name: f for f in dataclasses.fields(config)}
        fields.pop("overwrite_output_dir", None)  # which only scripts read, and transformers 5 has not
        return {n: f.default if f.default_factory is missing else f.default_factory() for n, f in fields.items()}

    found = defaults(module.MDLMConfig)
    assert (found["time_epsilon"], found["loss_weight_type"], found["loss_norm_type"]) == (1e-3, "scheduler", "token")
    assert (found["learning_rate"], found["warmup_ratio"], found["seed"]) == (2e-5, 0.1, 42)
    assert found == defaults(bundled.MDLMConfig) and len(found) > 100
    for given, name in (({}, str(tmp_path)), ({"run_name": "mine"}, "mine")):
        settings = {"use_cpu": True, "bf16": False, "report_to": "none", **given}
        assert module.MDLMConfig(output_dir=str(tmp_path), **settings).run_name == name


def test_the_seam_says_which_is_in_use():
    for name in NAMES:
        assert (getattr(dllm_api, name) is getattr(bundled, name)) != dllm_api.HAS_DLLM, name
    assert dllm_api.describe().startswith("dllm at " if dllm_api.HAS_DLLM else "bundled subset (")
