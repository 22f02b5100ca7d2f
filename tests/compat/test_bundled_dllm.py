"""The bundled subset against dllm, where dllm is installed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_bundled import FEATURES, SCHEDULERS, Stack, bos_batch

from dllm_memdlm.compat import bundled, dllm_api

pytestmark = pytest.mark.dllm
BOTH = (bundled, dllm_api)
TIMES = torch.linspace(0, 1, 101)


@pytest.mark.parametrize("name", [*SCHEDULERS, "linearalphascheduler"])
def test_schedules_are_those_of_dllm(name):
    ours, theirs = (module.make_alpha_scheduler(name) for module in BOTH)
    assert type(ours).__name__ == type(theirs).__name__ and type(ours) is not type(theirs)
    for function in ("alpha", "alpha_derivative", "weight", "__call__"):
        assert torch.equal(*(getattr(schedule, function)(TIMES) for schedule in (ours, theirs))), function
        for t in (0.0, 0.001, 0.37, 1.0):
            assert getattr(ours, function)(t) == getattr(theirs, function)(t)
    for s, t in ((0.0, 0.1), (0.125, 0.5), (0.9, 1.0)):
        assert ours.reverse_mask_prob(s=s, t=t) == theirs.reverse_mask_prob(s=s, t=t)
    for schedule in (ours, theirs):
        with pytest.raises(ValueError, match=r"1\.01"):
            schedule.weight(1.01)


def test_unknown_schedules_are_refused_as_in_dllm():
    for module in BOTH:
        with pytest.raises(ValueError, match=r"CosineAlphaScheduler.*LinearAlphaScheduler"):
            module.make_alpha_scheduler("sigmoid")


@pytest.mark.parametrize("names", [("input_ids",), ("input_ids", "labels", "attention_mask")], ids=len)
@pytest.mark.parametrize("label", [(), (-1,)])
def test_prepend_bos_is_that_of_dllm(names, label):
    ours, theirs = (module.prepend_bos(bos_batch(*names), 2, *label) for module in BOTH)
    assert ours.keys() == theirs.keys()
    for name in names:
        assert torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype


def test_wrappers_are_those_of_dllm():
    ours, theirs = (module.NoAttentionMaskWrapper(Stack()) for module in BOTH)
    a, b = ours(FEATURES), theirs(FEATURES)
    assert a.keys() == b.keys() and torch.equal(a["input_ids"], b["input_ids"]) and ours.names == theirs.names
    for module in BOTH:
        wrapper = module.CollatorWrapper(Stack())
        assert wrapper.before(FEATURES) is FEATURES
        with pytest.raises(AttributeError, match="missing"):
            _ = wrapper.missing


def test_training_arguments_are_those_of_dllm():
    def default_of(field: dataclasses.Field) -> Any:
        return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()

    ours, theirs = ({f.name: default_of(f) for f in dataclasses.fields(module.MDLMConfig)} for module in BOTH)
    assert len(theirs) > 100
    # which only scripts read, and transformers 5 has not
    assert theirs.pop("overwrite_output_dir") != ours.pop("overwrite_output_dir")
    assert ours == theirs
