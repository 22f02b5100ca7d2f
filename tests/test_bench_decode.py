"""The benchmark of decoding runs, at a small size, and finds the tokens to be the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dllm_memdlm import dllm_api

decode = pytest.importorskip("benchmarks.decode", reason="needs a checkout: benchmarks are not installed")


def test_the_quick_benchmark(tmp_path, capsys):
    assert decode.main(["--quick", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench_decode.json").read_text())
    single, batch, memory, moe = found["sections"]
    assert [row[-1] for row in [*single["rows"], *batch["rows"], memory["rows"][1]]] == [0] * 4
    assert [row[:2] for row in single["rows"]] == [[48, 8], [96, 4]]
    for row in single["rows"]:
        assert (row[6] is None) == (not dllm_api.HAS_DLLM)
        assert row[5] == pytest.approx(row[4] / row[3])
    steps = {row[0]: row[1] for row in moe["rows"]}
    assert steps["exact"] == steps["cache=dual"] == 16 > steps["threshold=0.9"]
    assert moe["rows"][0][-1] == "0 of 16"

    page, printed = (tmp_path / "bench_decode.md").read_text(), capsys.readouterr().out
    for section in found["sections"]:
        assert f"## {section['title']}" in page
    assert "dllm is not installed: its sampler is not timed" in printed or dllm_api.HAS_DLLM
    assert str(Path(tmp_path, "bench_decode.md")) in printed.replace("\n", "")
