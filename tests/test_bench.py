"""The benchmark runs, at a small size; what it compares is the same thing, and its tables hold together."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from measured import allocated

from benchmarks import __main__ as command
from benchmarks import device, full_size, padding, profiling, steps, switches, training
from benchmarks.device import CPU, Clock, peak_memory
from benchmarks.random_models import random_model, recipe_of
from benchmarks.report import Range
from benchmarks.watch import NEEDED, Watched, autocast_seen
from dllm_memdlm import dllm_api
from dllm_memdlm.backbones import load_model, read_config, staged_backbone
from dllm_memdlm.backbones.sites import adapted_layers
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.recipe import Recipe

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


# === at full size ===


@pytest.fixture
def moe() -> Recipe:
    """LLaDA-MoE's recipe, cut down."""
    return recipe_of("recipes/llada_moe.yaml", 16, small=True)


def test_full_size(tmp_path):
    recipes = ["recipes/llada_moe.yaml", "recipes/tiny_llada2.yaml"]
    more = ["--cpu", "--bits", "16", "--output", str(tmp_path), "--set", "training.gradient_checkpointing=true"]
    assert full_size.main([*recipes, *more]) == 0
    written = json.loads((tmp_path / "bench-gpu.json").read_text())
    sections = {section["title"]: section for section in written["sections"]}
    assert all(len(row) == len(section["columns"]) for section in sections.values() for row in section["rows"])
    rows = sections["A training step at full size"]["rows"]
    assert [row[:2] for row in rows] == [
        [f"{name}, 16 bit", kind] for name in ("llada_moe", "tiny_llada2") for kind in ("plain MDLM", "MemDLM")
    ]
    for row in rows:
        _, _, seconds, speed, _, flops, flop_limit, read, byte_limit, over, peak, planned, busy, waits = row
        assert speed == round(128 / seconds) and waits == 0 and 1 <= int(busy.rstrip("%")) <= 150
        assert over == pytest.approx(seconds / max(flop_limit, byte_limit)) and over > 1
        assert min(flops, read) > 0 and 0.5 < planned / peak < 2
    for plain, memory in (rows[:2], rows[2:]):
        assert plain[4] == 1 and memory[4] == pytest.approx(memory[2] / plain[2])
        assert memory[5] > plain[5] and memory[7] > plain[7]
    for row, host in zip(rows, sections["What the host does in a step, s"]["rows"], strict=True):
        assert sum(host[2:6]) == pytest.approx(row[2], rel=0.2), "nothing of a step is left out"
    whats = [row[1] for row in sections["Decoding at full size"]["rows"]]
    assert len(whats) == 7 + 6 and "decoding 8 tokens with memory" in whats


def test_a_stop_loses_nothing_that_was_measured(moe, tmp_path, monkeypatch):
    trained = full_size.trained

    def stopped(model: Any, recipe: Recipe, memory: MemoryConfig) -> Any:
        if memory.enabled:
            raise KeyboardInterrupt
        return trained(model, recipe, memory)

    monkeypatch.setattr(full_size, "trained", stopped)
    with pytest.raises(KeyboardInterrupt):
        full_size.main(["--cpu", "--bits", "16", "--output", str(tmp_path), "recipes/llada_moe.yaml"])
    section = json.loads((tmp_path / "bench-gpu.json").read_text())["sections"][0]
    assert [row[:2] for row in section["rows"]] == [["llada_moe, 16 bit", "plain MDLM"]]


def test_steps_are_those_of_training(moe, products, monkeypatch):
    """On a GPU the autocast that transformers uses on CPUs is off: all of it is accelerate's, around the model."""
    monkeypatch.setattr(full_size.MemDLMTrainer, "compute_loss_context_manager", contextlib.nullcontext)
    model, clipped, updated = random_model(moe), [], []
    clip, update = full_size.MemDLMTrainer.create_accelerator_and_postprocess, torch.optim.AdamW.step

    def watched_clip(trainer: Any) -> None:
        clip(trainer)
        norm = trainer.accelerator.clip_grad_norm_
        trainer.accelerator.clip_grad_norm_ = lambda *arguments: clipped.append(0) or norm(*arguments)

    monkeypatch.setattr(full_size.MemDLMTrainer, "create_accelerator_and_postprocess", watched_clip)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *arguments: updated.append(0) or update(*arguments))
    found = full_size.trained(model, moe, moe.memory)
    assert found.autocast == {True} and products == {torch.bfloat16}
    assert len(clipped) == len(updated) == NEEDED
    # afterwards, to decode with, the model is as it was
    seen = Watched()
    with autocast_seen(seen, staged_backbone(model).layers, CPU), torch.no_grad():
        assert model(input_ids=torch.arange(3, 9)[None]).logits.dtype == torch.bfloat16
    assert seen.autocast == {False}


def test_steps_without_autocast_are_refused(moe, monkeypatch):
    monkeypatch.setattr(full_size.MemDLMTrainer, "compute_loss_context_manager", contextlib.nullcontext)
    monkeypatch.setattr(Accelerator, "prepare_model", lambda accelerator, model, *_, **__: model)
    with pytest.raises(RuntimeError, match="without autocast"):
        full_size.trained(random_model(moe), moe, moe.memory)


def test_plans_are_made_once(moe, tmp_path, monkeypatch):
    file = tmp_path / "plans" / "moe.json"
    made = full_size.plans_for("moe", moe, file)
    monkeypatch.setattr(full_size, "plans_of", None)
    assert full_size.plans_for("moe", moe, file) == made
    assert made[True].fast > 0 == made[False].fast and made[True].flops_mdlm == made[False].flops_mdlm


def test_weights_in_4_bit_are_those_of_from_pretrained(tmp_path):
    recipe = recipe_of("recipes/llada2_mini.yaml", 4, ["lora.enabled=false"], small=True)
    ours = random_model(recipe)
    bare = recipe_of("recipes/llada2_mini.yaml", 16, ["lora.enabled=false"], small=True)
    random_model(bare).save_pretrained(tmp_path)
    loaded = load_model(dataclasses.replace(recipe.model, path=str(tmp_path)), read_config(str(tmp_path)))
    expected = loaded.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, value in ours.state_dict().items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


def test_waits_of_the_host_are_counted_by_line(monkeypatch):
    """As torch tells of them; it also says, once, that this is a prototype."""
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with device.waits(torch.device("cuda")) as found:
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        for _ in range(3):
            warnings.warn(device.WAITED, stacklevel=1)
    ((line, times),) = found.items()
    assert line.startswith("tests/test_bench.py:") and times == 3
    assert modes == ["default", "warn", "default"]


def test_full_size_asks_for_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        full_size.main([])
    assert exit.value.code == 2 and "expected a CUDA device" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("memory", [steps.PLAIN, MemoryConfig(), MemoryConfig(steps=3)], ids=["plain", "K2", "K3"])
def test_weights_are_read_as_often_as_layers_are_passed(memory, checkpointing, bench):
    backbone = staged_backbone(bench.model)
    if checkpointing:
        bench.model.gradient_checkpointing_enable({"use_reentrant": False})
    passes = dict.fromkeys(range(len(backbone.layers)), 0)

    def count(number: int) -> Any:
        def hook(*_: Any) -> None:
            passes[number] += 1

        return backbone.layers[number].register_forward_pre_hook(hook)  # recomputation may end early

    hooks = [count(number) for number in passes]
    try:
        bench.ours(memory)()
    finally:
        for hook in hooks:
            hook.remove()
        bench.model.gradient_checkpointing_disable()
    boundary = adapted_layers(len(passes), memory).start if memory.enabled else len(passes)
    backward = {number: 1 if number < boundary else memory.steps + 1 for number in passes}
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in backbone.layers]
    expected = sum(sizes[number] * (passes[number] + backward[number]) for number in passes)
    expected += backbone.lm_head.weight.nbytes * 2 * (memory.steps + 1 if memory.enabled else 1)
    assert full_size.weights_read(bench.model, memory, checkpointing) == expected
