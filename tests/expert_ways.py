"""The two ways of routed experts."""

from __future__ import annotations

import pytest

from dllm_memdlm.backbones import moe
from dllm_memdlm.backbones.moe import RoutedExperts


@pytest.fixture(params=[True, False], ids=["in turn", "at once"])
def in_turn(request, monkeypatch):
    """Experts one after the other, as a CPU takes those of many rows, or all in one kernel, as a GPU does."""
    monkeypatch.setattr(moe, "MANY_ROWS", 0)
    monkeypatch.setattr(RoutedExperts, "in_turn", request.param)
    return request.param
