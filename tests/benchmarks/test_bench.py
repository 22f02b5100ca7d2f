"""The benchmark runs, at a small size; what it compares is the same thing, and its tables hold together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measured import allocated

from benchmarks import __main__ as command
from benchmarks import padding, profiling, steps, switches, training
from benchmarks.device import Clock, peak_memory
from benchmarks.report import Range
from dllm_memdlm.compat import dllm_api
from dllm_memdlm.config import MemoryConfig

SHAPES = ["LLaDA-MoE, 256, 7:1", "LLaDA2.1, 256, 7:1"]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("reports")
    assert command.main(["--quick", "--repeats", "1", "--output", str(folder)]) == 0
    page = (folder / "bench.md").read_text()
    result = json.loads((folder / "bench.json").read_text())
    for section in result["sections"]:
        assert f"## {section['title']}" in page
        assert all(len(row) == len(section["columns"]) for row in section["rows"])
    return {name: section for name, section in zip(command.sections(True), result["sections"], strict=True)}


@pytest.fixture(scope="module")
def bench() -> training.Bench:
    return training.Bench(training.QUICK, training.QUICK.base)


def test_steps(found):
    rows = found["step-1"]["rows"]
    assert [row[0] for row in rows] == [*SHAPES, f"{SHAPES[1]}, checkpointing"]
    for shape, dllm, plain, memory, naive, naive_dllm, *row in rows:
        plain_dllm, memory_dllm, memory_naive, memory_naive_dllm, memory_plain, *tokens = row
        with_naive = "checkpointing" not in shape
        assert all((cell is not None) == dllm_api.HAS_DLLM for cell in (dllm, plain_dllm, memory_dllm))
        assert all((cell is not None) == with_naive for cell in (naive, memory_naive))
        assert all((cell is not None) == (with_naive and dllm_api.HAS_DLLM) for cell in (naive_dllm, memory_naive_dllm))
        for median, smallest, largest in filter(None, (memory_naive, memory_plain)):
            assert smallest <= median <= largest
        assert min(plain, memory) > 0
        assert tokens == [round(128 / plain), round(128 / memory)]


def test_profile(found):
    rows = found["profile"]["rows"]
    kinds = [kind for kind in ("dllm", "plain", "MemDLM", "naive") if kind != "dllm" or dllm_api.HAS_DLLM]
    assert [row[:2] for row in rows] == [[shape, kind] for shape in SHAPES for kind in kinds]
    gflops = {(shape, kind): gflop for shape, kind, *_, gflop, _, _, _, _, _, _ in rows}
    full_rates = set()
    for shape, kind, seconds, products, attention, rest, gflop, _, more, least, of_dllms, of_naive, of_plain in rows:
        assert min(products, attention, rest, gflop, of_naive) > 0
        assert products + attention + rest == pytest.approx(seconds)
        full_rates.add(round(gflop / (least - attention - rest), 3))
        assert (more is None) == (of_plain is None) == (kind == "dllm")
        assert more is None or more == pytest.approx(gflop / gflops[shape, "plain"])
        assert (of_dllms is None) is not dllm_api.HAS_DLLM
    assert len(full_rates) == 1, "one rate for all"


def test_checkpointing_takes_another_forward_pass_and_no_other_numbers(bench):
    checkpointed = training.Bench(training.QUICK, replace(training.QUICK.base, checkpointing=True))
    without = bench.all()
    for name, case in checkpointed.all().items():
        plainly = without[name]
        if name != "dllm":  # which draws its own masks
            assert case() == pytest.approx(plainly(), rel=1e-6)
        assert profiling.parts(case, 1.0).flops > 1.2 * profiling.parts(plainly, 1.0).flops


def test_flops_of_every_kind_of_product_and_of_nothing_else():
    a, b, out = torch.randn(1, 2, 3), torch.randn(1, 3, 5), torch.zeros(2, 5)

    def products() -> None:
        torch.bmm(a, b)
        torch.mm(a[0], b[0], out=out)
        torch.addmm(out, a[0], b[0])
        torch.nn.functional.scaled_dot_product_attention(a[None], a[None], a[None]).exp()

    found = profiling.parts(products, 1.0)
    assert found.flops == 3 * 2 * (2 * 3 * 5)
    assert min(found.products, found.attention) > 0 and sum(found[:3]) == pytest.approx(1)


def test_peaks(found):
    for row in found["peaks"]["rows"]:
        shape, weights, _, plain, memory, naive, _, _, ratio = row
        assert weights > 0 and plain < memory
        if "checkpointing" in shape:
            assert naive is ratio is None
        else:
            assert memory < naive and ratio == pytest.approx(memory / naive)


@pytest.mark.parametrize("shape", training.QUICK.shapes, ids=str)
def test_peaks_are_those_of_the_allocator(shape):
    for case in training.Bench(training.QUICK, shape).all().values():
        case()
        assert peak_memory(case) == pytest.approx(allocated(case), rel=0.05)


def test_growth(found):
    rows = found["growth"]["rows"]
    assert [row[:2] for row in rows] == [["length", 64], ["length", 128], ["steps", 1], ["steps", 2]]


def test_padding(found):
    names, shares = zip(*((row[0], float(row[1].rstrip("%"))) for row in found["padding"]["rows"]), strict=True)
    assert names == ("any lengths together", "group_by_length", "each example alone")
    assert shares[0] > 25 and 3 > shares[1] > shares[2] == 0
    for _, _, plain, memory, (median, smallest, largest) in found["padding"]["rows"]:
        assert min(plain, memory) > 0 and smallest <= median <= largest
    assert padding.share([[4, 2], [5]]) == pytest.approx(2 / 13)


@pytest.mark.parametrize("memory", [MemoryConfig(), steps.PLAIN], ids=["MemDLM", "plain"])
def test_padding_changes_no_loss(memory, bench):
    alone = padding.padded(bench.shape, [24], memory)
    wide = dict(alone)
    for key, value in alone.items():
        if value.dim() >= 2 and value.shape[-1] == 24:
            wide[key] = torch.nn.functional.pad(value, (0, 9), value=-100 if key == "labels" else 0)
    assert not wide["attention_mask"][:, 24:].any()
    trainer = steps.trainer_of(bench.model, memory)
    assert steps.ours(trainer, wide)() == pytest.approx(steps.ours(trainer, alone)(), rel=1e-5)


def test_switches(found):
    rows = {row[0]: row for row in found["switches"]["rows"]}
    assert list(rows) == ["nothing", *switches.SWITCHES, "all of these"]
    assert rows["nothing"][2] == rows["nothing"][4] == [1, 1, 1]
    for name in switches.OF_MEMORY:
        assert rows[name][1] is None and rows[name][3] > 0
    assert rows["all of these"][6] > rows["nothing"][6]


@pytest.mark.parametrize("name", [None, *switches.SWITCHES])
@pytest.mark.parametrize("memory", [MemoryConfig(), steps.PLAIN], ids=["MemDLM", "plain"])
def test_a_switch_changes_what_a_step_costs_and_not_what_it_gives(name, memory, bench):
    switched, ours = switches.switched(bench, memory, [switches.SWITCHES[name]] if name else []), bench.ours(memory)
    assert switched() == pytest.approx(ours(), rel=1e-5)
    nothing = name is None or (memory is steps.PLAIN and name in switches.OF_MEMORY)
    assert (work(switched) == work(ours)) == nothing


def work(step: steps.Step) -> tuple[int, set[str]]:
    """FLOPs and operators of a step."""
    with Clock() as clock:
        step()
    return clock.flops, set(clock.seconds)


def test_all_steps_have_the_same_loss(bench):
    naive, ours = bench.naive()(), bench.ours(steps.PUBLISHED)()
    if dllm_api.HAS_DLLM:
        on_dllms = bench.naive(steps.adapted_dllms(bench.shape.name, bench.dimensions))
        assert on_dllms() == pytest.approx(naive, rel=1e-5)
    assert naive == pytest.approx(ours, rel=1e-5)
    assert abs(ours - bench.ours(steps.PLAIN)()) > 1e-6


def test_decoding(found):
    single, batch, memory, moe = (section for name, section in found.items() if name.startswith("decode-"))
    assert [row[-1] for row in [*batch["rows"], memory["rows"][1]]] == [0] * 2
    assert [row[0] for row in memory["rows"]][1:] == [
        f"decoding, 4 steps a block{more}" for more in ("", ", and adaptation")
    ]
    (_, _, *adaptation), (_, _, *decoding), (_, _, *both) = (row[:5] for row in memory["rows"])
    assert both == pytest.approx([adaptation[0] + decoding[0], adaptation[1] + decoding[1], both[1] / both[0]])
    assert [row[:2] for row in single["rows"]] == [[48, 8], [96, 4]]
    for row in single["rows"]:
        assert {cell is None for cell in (row[6], row[7], row[9])} == {not dllm_api.HAS_DLLM}
        assert row[8] == 0 and not row[9]
        assert row[5] == pytest.approx(row[4] / row[3])
    counts = {row[0]: row[1] for row in moe["rows"]}
    assert counts["exact"] == counts["cache=dual"] == 16 > counts["threshold=0.9"]
    assert moe["rows"][0][-1] == "0 of 16"


def test_some_of_it(tmp_path, capsys):
    threads = torch.get_num_threads()
    arguments = ["--quick", "--only", "peaks", "decode-a-b", "--repeats", "1", "--output", str(tmp_path)]
    assert command.main(arguments) == 0
    titles = [section["title"] for section in json.loads((tmp_path / "bench.json").read_text())["sections"]]
    assert [title.split(",")[0] for title in titles] == ["Peak memory of a training step", "LLaDA2.1"]
    printed = capsys.readouterr().out
    assert "dllm is not installed: its trainer and its sampler are not timed" in printed or dllm_api.HAS_DLLM
    assert [printed.count(f"measuring {name}") for name in ("peaks", "decode", "step")] == [1, 1, 0]
    assert str(Path(tmp_path, "bench.md")) in printed.replace("\n", "")
    assert torch.get_num_threads() == threads
    with pytest.raises(SystemExit):
        command.main(["--only", "stepp"])
    assert "--only stepp: expected the beginning of one of step-1" in capsys.readouterr().err


def test_a_range_in_a_table():
    from benchmarks.report import text

    assert text(Range(0.456, 0.4, 0.5)) == "0.46 (0.40-0.50)"
