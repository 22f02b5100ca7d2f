"""The benchmark runs, at a small size; what it compares is the same thing, and its tables hold together."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from measured import allocated

from benchmarks import __main__ as command
from benchmarks import host, padding, profiling, steps, switches, training
from benchmarks.device import Clock, peak_memory
from benchmarks.report import Range, text
from dllm_memdlm.compat import dllm_api
from dllm_memdlm.config import MemoryConfig

SHAPES = ["LLaDA-MoE, 256, 7:1", "LLaDA2.1, 256, 7:1"]


@pytest.fixture(scope="module")
def found(tmp_path_factory, warm_python) -> dict[str, list[dict[str, Any]]]:
    """The rows of every section, by column."""
    folder = tmp_path_factory.mktemp("reports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python)
        assert command.main(["--quick", "--repeats", "1", "--output", str(folder)]) == 0
    page, result = (folder / "bench.md").read_text(), json.loads((folder / "bench.json").read_text())
    assert all(f"## {section['title']}" in page for section in result["sections"])
    tables = zip(command.sections(True), result["sections"], strict=True)
    return {name: [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]] for name, table in tables}


@pytest.fixture(scope="module")
def bench() -> training.Bench:
    return training.Bench(training.QUICK, training.QUICK.base)


@pytest.mark.slow
def test_what_cannot_be_measured_is_left_out(found):
    """dllm's where dllm is not installed, and the naive step under checkpointing."""
    rows = found["step-1"]
    assert [row["model, vocabulary, prompt:response"] for row in rows] == [*SHAPES, f"{SHAPES[1]}, checkpointing"]
    for row, naive in zip(rows, (True, True, False), strict=True):
        for column, cell in row.items():
            there = (naive or "naive" not in column) and (dllm_api.HAS_DLLM or "dllm" not in column)
            assert (cell is not None) == there, column
        smallest_to_largest = row["MemDLM ÷ plain"]
        assert sorted(smallest_to_largest)[1] == smallest_to_largest[0] > 0
        assert row["MemDLM tokens/s"] == round(128 / row["MemDLM s"])


def test_profile_growth_and_padding(found):
    kinds = [kind for kind in ("dllm", "plain", "MemDLM", "naive") if kind != "dllm" or dllm_api.HAS_DLLM]
    rows = found["profile"]
    assert [row["step"] for row in rows] == kinds * len(SHAPES)
    for row in rows:
        assert row["products s"] + row["attention s"] + row["rest s"] == pytest.approx(row["s"])
        assert (row["÷ dllm's plain"] is None) is not dllm_api.HAS_DLLM
    at_full_rate = [row["s at the full rate"] - row["attention s"] - row["rest s"] for row in rows]
    rates = [row["GFLOP of products"] / seconds for row, seconds in zip(rows, at_full_rate, strict=True)]
    assert rates == pytest.approx([rates[0]] * len(rates), rel=1e-3), "one rate for all"
    cases = [(row["setting"], row["value"]) for row in found["growth"]]
    assert cases == [("length", 64), ("length", 128), ("steps", 1), ("steps", 2)]
    shares = [float(row["padding in a batch"].rstrip("%")) for row in found["padding"]]
    assert shares[0] > 25 and 3 > shares[1] > shares[2] == 0
    assert padding.share([[4, 2], [5]]) == pytest.approx(2 / 13)


def test_checkpointing_takes_another_forward_pass_and_no_other_numbers(bench):
    checkpointed, without = training.Bench(training.QUICK, replace(bench.shape, checkpointing=True)), bench.all()
    for name, case in checkpointed.all().items():
        if name != "dllm":  # which draws its own masks
            assert case() == pytest.approx(without[name](), rel=1e-6)
        assert profiling.parts(case, 1.0).flops > 1.2 * profiling.parts(without[name], 1.0).flops


@pytest.mark.parametrize("shape", training.QUICK.shapes[1:], ids=str)
def test_peaks_are_those_of_the_allocator(shape, found):
    for case in training.Bench(training.QUICK, shape).all().values():
        case()
        assert peak_memory(case) == pytest.approx(allocated(case), rel=0.05)
    row = next(row for row in found["peaks"] if row["model, vocabulary, prompt:response"] == str(shape))
    assert row["plain"] < row["MemDLM"] < (row["naive MemDLM"] or 1e9)


@pytest.mark.parametrize(
    ("recipe", "bits", "operators", "gigabytes"), [("llada_moe.yaml", 16, 1300, 120), ("llada2_mini.yaml", 4, 1450, 73)]
)
def test_what_a_step_costs_beside_its_arithmetic_does_not_grow(recipe, bits, operators, gigabytes, found):
    """A layer of the prefix, and one with fast weights, at the published widths."""
    (row,) = (row for row in found["host-traffic"] if (row["recipe"], row["bits"]) == (recipe, bits))
    assert 0.9 * operators < row["MemDLM operators"] < operators > 2 * row["plain operators"]
    assert 0.9 * gigabytes < row["MemDLM GB"] < gigabytes


def test_the_host(found):
    rows = {row["model"]: row for row in found["host"]}
    assert [*rows] == [*reversed(host.MODELS)] and rows[host.DENSE]["MemDLM ÷ dense"] == 1
    for name, row in rows.items():
        assert row["MemDLM s"] > 0 and row["modules"] > row["trainable tensors"] > 0
        assert (row["command to step 1, s"] is None) == (name == host.DENSE)


def test_switches(found):
    rows = {row.pop("off"): row for row in found["switches"]}
    assert list(rows) == ["nothing", *switches.SWITCHES, "all of these"]
    for name in switches.OF_MEMORY:
        assert rows[name]["plain s"] is None and rows[name]["MemDLM s"] > 0
    assert rows["all of these"]["peak MemDLM MB"] > rows["nothing"]["peak MemDLM MB"]


@pytest.mark.parametrize("memory", [MemoryConfig(), steps.PLAIN], ids=["MemDLM", "plain"])
def test_a_switch_changes_what_a_step_costs_and_not_what_it_gives(memory, bench):
    def run(step: steps.Step) -> tuple[float, tuple[int, set[str]]]:
        with Clock() as clock:
            loss = step()
        return loss, (clock.flops, set(clock.seconds))

    loss, work = run(bench.ours(memory))
    for name, off in ({None: None} | switches.SWITCHES).items():
        own_loss, own_work = run(switches.switched(bench, memory, [off] if off else []))
        assert own_loss == pytest.approx(loss, rel=1e-5), name
        assert (own_work == work) == (not off or (memory is steps.PLAIN and name in switches.OF_MEMORY)), name


def test_all_steps_have_the_same_loss(bench):
    naive, ours = bench.naive()(), bench.ours(steps.PUBLISHED)()
    if dllm_api.HAS_DLLM:
        on_dllms = bench.naive(steps.adapted_dllms(bench.shape.name, bench.dimensions))
        assert on_dllms() == pytest.approx(naive, rel=1e-5)
    assert naive == pytest.approx(ours, rel=1e-5)
    assert abs(ours - bench.ours(steps.PLAIN)()) > 1e-6


def test_decoding(found):
    single, batch, memory, moe = (rows for name, rows in found.items() if name.startswith("decode-"))
    assert batch[0]["tokens that differ"] == memory[1]["tokens that differ"] == 0
    adaptation, decoding, both = memory
    assert both["ours s"] == pytest.approx(adaptation["ours s"] + decoding["ours s"])
    assert [(row["prompt"], row["steps a block"]) for row in single] == [(48, 8), (96, 4)]
    for row in single:
        assert row["tokens that differ uncached"] == 0 and not row["dllm's"]
        assert row["uncached ÷ cached"] == pytest.approx(row["uncached s"] / row["cached s"])
        assert (row["dllm ÷ cached"] is None) is not dllm_api.HAS_DLLM
    counts = {row["sampler"]: row["steps"] for row in moe}
    assert counts["exact"] == counts["cache=dual"] == 16 > counts["threshold=0.9"]
    assert moe[0]["tokens that differ from exact"] == "0 of 16"


def test_some_of_it(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert command.main(["--quick", "--only", "decode-a-b", "--output", str(tmp_path)]) == 0
    (section,) = json.loads((tmp_path / "bench.json").read_text())["sections"]
    assert section["title"].startswith("LLaDA2.1, cached, prompts of ")
    printed = capsys.readouterr().out
    assert "dllm is not installed" in printed or dllm_api.HAS_DLLM
    assert str(tmp_path / "bench.md") in printed.replace("\n", "")
    assert torch.get_num_threads() == threads
    with pytest.raises(SystemExit):
        command.main(["--only", "stepp"])
    assert "--only stepp: expected the beginning of one of step-1" in capsys.readouterr().err
    assert text(Range(0.456, 0.4, 0.5)) == "0.46 (0.40-0.50)"
