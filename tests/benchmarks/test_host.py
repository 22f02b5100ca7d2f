"""What a step costs beside its arithmetic must not grow: counted at the published sizes, on tensors without memory."""

from __future__ import annotations

import pytest

from benchmarks.host import step_traffic


@pytest.mark.parametrize(
    ("name", "bits", "operators", "gigabytes"), [("LLaDA-MoE", 16, 6900, 900), ("LLaDA2.1", 4, 9900, 580)]
)
def test_operators_and_bytes_of_a_step(name, bits, operators, gigabytes):
    counted = step_traffic(name, bits, True, {})
    assert 0.8 * operators < sum(counted.calls.values()) < operators
    assert 0.8 * gigabytes < sum(counted.bytes.values()) / 1e9 < gigabytes
    assert counted.calls["aten::_grouped_mm"] > 750 > counted.calls["aten::silu"]
