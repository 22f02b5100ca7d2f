"""What a step costs beside its arithmetic must not grow: counted at the published widths, without memory."""

from __future__ import annotations

import pytest

from benchmarks.host import step_traffic


@pytest.mark.parametrize(
    ("name", "bits", "operators", "gigabytes"), [("LLaDA-MoE", 16, 2000, 225), ("LLaDA2.1", 4, 2300, 125)]
)
def test_operators_and_bytes_of_a_step(name, bits, operators, gigabytes):
    """Three layers of the prefix, and one with fast weights."""
    counted = step_traffic(name, bits, True, {"num_hidden_layers": 4})
    assert 0.9 * operators < sum(counted.calls.values()) < operators
    assert 0.9 * gigabytes < sum(counted.bytes.values()) / 1e9 < gigabytes
    assert counted.calls["aten::_grouped_mm"] > 175 > counted.calls["aten::silu"]
