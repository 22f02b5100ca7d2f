"""The bundled subset against dllm, where dllm is installed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_bundled import FEATURES, SCHEDULERS, TIMES, Stack, bos_batch

from dllm_memdlm.compat import dllm_api
from dllm_memdlm.compat.bundled import (
    CollatorWrapper,
    MDLMConfig,
    NoAttentionMaskWrapper,
    make_alpha_scheduler,
    prepend_bos,
)

pytestmark = pytest.mark.dllm


@pytest.mark.parametrize("name", [*SCHEDULERS, "linearalphascheduler"])
def test_schedules_are_those_of_dllm(name):
    ours, theirs = make_alpha_scheduler(name), dllm_api.make_alpha_scheduler(name)
    assert type(ours).__name__ == type(theirs).__name__ and type(ours) is not type(theirs)
    for function in ("alpha", "alpha_derivative", "weight", "__call__"):
        a, b = (getattr(schedule, function)(TIMES) for schedule in (ours, theirs))
        assert torch.equal(a, b), function
        for t in (0.0, 0.001, 0.37, 1.0):
            assert getattr(ours, function)(t) == getattr(theirs, function)(t)
    for s, t in ((0.0, 0.1), (0.125, 0.5), (0.9, 1.0)):
        assert ours.reverse_mask_prob(s=s, t=t) == theirs.reverse_mask_prob(s=s, t=t)
    for schedule in (ours, theirs):
        for t in (-0.01, 1.01):
            with pytest.raises(ValueError, match=str(t)):
                schedule.weight(t)


def test_unknown_schedules_are_refused_as_in_dllm():
    for make in (make_alpha_scheduler, dllm_api.make_alpha_scheduler):
        with pytest.raises(ValueError, match=r"CosineAlphaScheduler.*LinearAlphaScheduler"):
            make("sigmoid")


@pytest.mark.parametrize(
    "names",
    [("input_ids",), ("input_ids", "labels"), ("input_ids", "labels", "attention_mask")],
    ids=len,
)
def test_prepend_bos_is_that_of_dllm(names):
    for extra in ((), (-1,)):
        ours, theirs = (function(bos_batch(*names), 2, *extra) for function in (prepend_bos, dllm_api.prepend_bos))
        assert ours.keys() == theirs.keys()
        for name in names:
            assert torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype


def test_wrappers_are_those_of_dllm():
    ours, theirs = NoAttentionMaskWrapper(Stack()), dllm_api.NoAttentionMaskWrapper(Stack())
    a, b = ours(FEATURES), theirs(FEATURES)
    assert a.keys() == b.keys() and torch.equal(a["input_ids"], b["input_ids"])
    assert ours.names == theirs.names
    for wrapper in (CollatorWrapper, dllm_api.CollatorWrapper):
        assert wrapper(Stack()).before(FEATURES) is FEATURES
        with pytest.raises(AttributeError, match="missing"):
            _ = wrapper(Stack()).missing


def default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def test_training_arguments_are_those_of_dllm():
    ours = {f.name: default_of(f) for f in dataclasses.fields(MDLMConfig)}
    theirs = {f.name: default_of(f) for f in dataclasses.fields(dllm_api.MDLMConfig)}
    assert MDLMConfig is not dllm_api.MDLMConfig
    assert len(theirs) > 100
    # which only scripts read, and transformers 5 has not
    assert theirs.pop("overwrite_output_dir") != ours.pop("overwrite_output_dir")
    assert ours == theirs
