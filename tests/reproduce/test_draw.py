"""From logs and scores to figures and pages: numbers made by hand, and what is drawn and tabled of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from data_files import message_of
from matplotlib.figure import Figure

from reproduce import __main__ as command
from reproduce import draw, plots
from reproduce.cases import BEFORE, DENOISING_STEPS, PAPER, points_of
from reproduce.figures import FIGURES
from reproduce.logs import first_step_at, last, logged, tail
from reproduce.needle import PLACES
from reproduce.plots import DISCARDED
from reproduce.scales import CONTROLLED, MDLM, MEMDLM, SCALES
from reproduce.scores import TABLES
from reproduce.steps import in_order

CPU = replace(SCALES["cpu"], seeds=(1, 2))
MOE = replace(CPU, backbones=CPU.backbones[:1])


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Those that are saved, which must not be blank."""
    saved, save = [], Figure.savefig

    def savefig(figure, path, **settings):
        saved.append(figure)
        save(figure, path, **settings)
        assert matplotlib.image.imread(path)[..., :3].var() > 1e-3

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def lines_of(ax) -> dict[str, list[list[float]]]:
    """By label, the points of each line."""
    return {line.get_label(): line.get_xydata().round(6).tolist() for line in ax.get_lines()}


def logs(seed: int, method: str, **series: list[float]) -> list[dict]:
    """Values logged at steps 10, 20, …"""
    head = {"backbone": "LLaDA-MoE", "method": method, "seed": seed}
    steps = [(key, 10 * n, v) for key, values in series.items() for n, v in enumerate(values, 1)]
    return [{**head, "loss": key, "step": step, "value": v} for key, step, v in steps]


def test_numbers_of_what_was_logged(tmp_path):
    falls, jumps = [4.0, 3.0, 2.0], [4.0, 2.0, 5.0, 3.0]
    found = [(falls, 1.9, None), (falls, 5.0, 10.0), (falls, 3.25, 17.5), (jumps, 2.0, 20.0), ([], 1.0, None)]
    for values, loss, step in found:  # on a straight line between two points; the first time counts
        assert first_step_at(pd.Series(values, range(10, 10 * len(values) + 1, 10), dtype=float), loss) == step
    points = pd.DataFrame(logs(1, MDLM, loss=[float(n) for n in range(20)], eval_loss=[3.0, 4.0]))
    assert (last(points, "eval_loss").to_dict(), tail(points, "loss").to_dict()) == ({1: 4.0}, {1: 18.5})
    assert message_of(last, points, "eval_nll").startswith("no eval_nll was logged")
    assert "did not finish" in message_of(lambda: list(logged(tmp_path, ["loss"])))


def test_lines_are_means_in_a_band_where_all_seeds_are(figures, tmp_path):
    figure, ((ax,),) = plots.grid(1, 1)
    two = pd.DataFrame(logs(1, MDLM, loss=[4.0, 2.0, 1.0]) + logs(2, MDLM, loss=[5.0, 2.0]))
    plots.line(ax, two, "step", "value", "MDLM")
    plots.line(ax, two[two.seed == 2], "step", "value", "one")
    plots.line(ax, two[two.seed == 3], "step", "value", "nothing")
    plots.save(figure, tmp_path / "lines.png")
    assert lines_of(ax) == {"MDLM": [[10, 4.5], [20, 2.0]], "one": [[10, 5.0], [20, 2.0]]}
    (band,) = ax.collections
    corners = set(map(tuple, band.get_paths()[0].vertices.round(3).tolist()))
    assert corners == {(10, 3.793), (10, 5.207), (20, 2)}
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["MDLM", "one"]


def test_a_noisy_line_is_smoothed_seed_by_seed_over_its_own_faint_mean():
    _, ((ax,),) = plots.grid(1, 1)
    train = [[float(n % 7) + seed for n in range(40)] for seed in (0, 2)]
    points = pd.DataFrame([point for seed, own in enumerate(train) for point in logs(seed, MDLM, loss=own)])
    plots.line(ax, points, "step", "value", "MDLM", noisy=True)
    bold, faint = ax.get_lines()
    assert faint.get_alpha() < 0.5 and faint.get_ydata() == pytest.approx([n % 7 + 1 for n in range(40)])
    mean = [np.mean(train[0][max(0, n - 2) : n + 3]) + 1 for n in range(40)]  # a tenth: two to each side
    assert bold.get_ydata() == pytest.approx(mean)


def test_bars_stand_where_they_belong(figures, tmp_path):
    figure, ((ax, empty),) = plots.grid(1, 2)
    plots.bars(ax, ["first", "none", "last"], [[28.0, 32.0], [], [-10.0]], plots.BLUE)
    plots.bars(empty, ["a"], [[]], plots.BLUE)
    plots.save(figure, tmp_path / "bars.png")
    places = [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in ax.patches]
    assert places == [(0, 30.0), (2, -10.0)] and len(empty.patches) == 0
    assert [label.get_text() for label in ax.get_yticklabels()] == ["first", "none", "last"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first is on top"


def dynamics(off: tuple[float, float]) -> pd.DataFrame:
    """Two seeds of both methods on one backbone; `off` are MemDLM's final eval losses without fast weights."""
    points, train = [], [float(n) for n in range(20, 0, -1)]
    for seed, final in zip(CPU.seeds, off, strict=True):
        points += logs(seed, MDLM, loss=train, eval_loss=[4.0, 3.0, 2.0 + seed / 10])
        own = {"loss": [v - 1 for v in train], "loss_memory_off": [v + 1 for v in train], "eval_loss": [3.0, 2.0, 1.0]}
        own |= {"eval_loss_memory_prompt": [2.0], "eval_loss_memory_other": [3.0], "eval_prompt_nll": [5.0]}
        points += [p | {"rate": 0.1} for p in logs(seed, MEMDLM, **own, eval_loss_memory_off=[4.0, 3.5, final])]
        points += [p | {"rate": 7.0} for p in logs(seed, MEMDLM, loss=[9.0], eval_loss=[9.0])]
    return pd.DataFrame(points)


def test_figure_4_compares_with_mdlm_of_the_same_seed(figures, tmp_path):
    drawn = draw.dynamics(MOE, dynamics((2.0, 2.5)), tmp_path / "figure4.png")
    assert [row[1:] for row in drawn.tables[0].rows] == [
        ["MDLM", "1.500 ± 0.000", "2.150 ± 0.071", "-", "-"],
        ["MemDLM", "0.500 ± 0.000", "1.000 ± 0.000", "-1.1500 ± 0.0707", "19, 18"],
        [DISCARDED, "2.500 ± 0.000", "2.250 ± 0.354", "+0.1000 ± 0.2828", "29, not reached"],
        ["MemDLM, φ of the prompt", "-", "2.000 ± 0.000", "-0.1500 ± 0.0707", "10, 10"],
        ["MemDLM, φ of another prompt", "-", "3.000 ± 0.000", "+0.8500 ± 0.0707", "not reached, not reached"],
        ["prompt NLL, without φ (nats)", "-", "5.000 ± 0.000", "-", "-"],
    ]
    train, evals, less = figures[0].axes
    assert evals.get_title() == "LLaDA-MoE, inner lr 0.1, eval"
    assert {*lines_of(train)} - {"_raw"} == {"MDLM", "MemDLM", DISCARDED}
    assert [*lines_of(evals)] == [*draw.CURVES]
    assert lines_of(less)["MemDLM"] == [[10, -1], [20, -1], [30, -1.15]]
    assert lines_of(less)[DISCARDED] == [[10, 0], [20, 0.5], [30, 0.1]], "MDLM's end at 2.1 and 2.2"


def test_figure_3_takes_mdlms_score_away_seed_by_seed(figures, tmp_path):
    scores = {(BEFORE, None): 10, ("MDLM", 1): 50, ("MDLM", 2): 70}
    scores |= {("MemDLM, memory off", 1): 51, ("MemDLM, memory off", 2): 73}
    scores |= {("MemDLM, memory on", 1): 50, ("MemDLM, memory on", 2): 66}
    columns = ["backbone", "model", "seed", "column", "score"]
    points = [
        (b.title, model, seed, "80 words", score + b.title.count("2"))
        for b in CPU.backbones
        for (model, seed), score in scores.items()
    ]
    drawn = draw.by_length(CPU, pd.DataFrame(points, columns=columns), tmp_path / "figure3.png")
    assert [row[2] for row in drawn.tables[0].rows[:4]] == ["10.0", "60.0 ± 14.1", "62.0 ± 15.6", "58.0 ± 11.3"]
    for ax in figures[0].axes[2:]:
        shown = {label: [y for _, y in places] for label, places in lines_of(ax).items() if "MemDLM" in label}
        assert shown == {"MemDLM, memory off": [2], "MemDLM, memory on": [-2]}


def test_ablations_are_losses_against_mdlms_of_the_same_seed(figures, tmp_path, monkeypatch):
    first, *_, ours = PAPER["ablations"]
    groups = {title: PAPER["ablations"][title] for title in (first, ours)}  # as each takes a second to draw
    monkeypatch.setitem(PAPER, "ablations", groups)
    methods = {method: 1.0 + n for n, (_, method, _) in enumerate(v for group in groups.values() for v in group)}
    points = []
    for seed in (1, 2):
        for method, value in methods.items():
            own = {"eval_loss": [9.0, value + seed], "eval_loss_memory_off": [0.5 * seed]}
            own |= {"eval_loss_memory_prompt": [2.0], "eval_loss_memory_other": [2.0 + value]}
            points += logs(seed, method, **own, inner_grad_norm_1=[0.5, 0.25] if method == MEMDLM else [])
            score = 10 * value + 20 * (seed == 2 and method == "kl")
            points.append({"method": method, "seed": seed, "score": score})
    drawn = draw.ablated(CPU, pd.DataFrame(points), tmp_path / "ablations.png")
    rows = {row[1]: row[2:] for row in drawn.tables[0].rows}
    base, kl, memdlm = methods[MDLM], methods["kl"], methods[MEMDLM]
    assert rows["MDLM"] == ["53.8", f"{10 * base:.1f} ± 0.0", "2 of 2" if memdlm > base else "0 of 2", *"---"]
    off, on = f"{0.75 - base - 1.5:+.4f} ± 0.3536", f"{kl - base:+.4f} ± 0.0000"
    order = (memdlm > kl) + (memdlm > kl + 2)
    assert rows["logit KL"] == ["66.0", f"{10 * kl + 10:.1f} ± 14.1", f"{order} of 2", off, on, f"{-kl:+.4f} ± 0.0000"]
    assert "norm of 0.38 in the median and at most 0.5," in " ".join(drawn.notes)
    shown = {ax.get_xlabel(): [bar.get_width() for bar in ax.patches] for ax in figures[0].axes[:5]}
    assert shown["the paper: BABILong-1K − MDLM's (points)"] == [score - 53.8 for *_, score in groups[first]]
    assert shown["loss − MDLM's, φ in place (10⁻³ nats)"] == [1000 * (methods[m] - base) for _, m, _ in groups[first]]


#: Right answers by model, in results made by hand.
RIGHT = {"base": 0.125, "untuned": 0.125, "mdlm": 0.25, "memdlm": 0.5, "own": 0.75, "other": 0.375}
LABELS = dict(zip((BEFORE, *CONTROLLED), [*RIGHT.values()][1:], strict=True))
ROWS = dict(zip(PAPER["rows"], [*RIGHT.values()][2:5], strict=True))
CELLS = [cell for tasks in TABLES.values() for task in tasks for cell in task.cells]


def finish(target: str, scale) -> None:
    """What the commands would leave."""
    own = {"loss": 2.0, "eval_loss": 1.0, "inner_grad_norm_1": 0.5, "inner_grad_norm_2": 0.25}
    own |= {"eval_loss_memory_prompt": 0.5, "eval_loss_memory_other": 1.5, "eval_prompt_nll": 3.0}
    history = [{"step": 10, "loss_memory_off": 2.5, "eval_loss_memory_off": 2.0, **own}]
    for case in FIGURES[target].cases(scale):
        for step in in_order([case.step]):
            whose = "own" if "memory=true" in step.line else next((w for w in ("own", "other") if w in step.argv), "")
            share = RIGHT.get(whose) or RIGHT.get(step.folder.parent.name.partition("-")[0], 0.5)
            tasks = getattr(getattr(case.read, "__self__", None), "cells", CELLS)
            found = {name: {f"{metric},none": share for _, own, metric in tasks if own == name} for _, name, _ in tasks}
            score = {"right": 16 * share, "asked": 16, "nll": 2.0}
            apart = dict.fromkeys(PLACES, score) if target in ("documents", "further") else {}
            rows = [{"words": n, "whose": whose, **score, **apart} for n in (40, 80, 160, 320)]
            steps = [{"step": n, "ratio": share + n, "static": 1.0, "sequential": share + n} for n in range(48)]
            step.folder.mkdir(parents=True, exist_ok=True)
            step.done.write_text("60 s, 2026-01-01, commit abc\n")
            files = {"trainer_state.json": {"log_history": history}}
            if step == case.step and "dllm_memdlm.evaluate" in step.argv:
                files["results_1.json"] = {"results": found, "config": {"memory_tally": {"not_finite": 1}}}
            elif step == case.step and "dllm_memdlm.train" not in step.argv:
                own = {"scores": rows, "steps": steps, "examples": 7, "memory_tally": {"not_finite": 1}}
                files["scores.json"] = own
            for name, content in files.items():
                (step.folder / name).write_text(json.dumps(content))


#: Every target at the last scale that it has, and at a smaller one where that is drawn or read in another way.
PAGES = [*((target, figure.scales[-1]) for target, figure in FIGURES.items()), ("figure3", "cpu"), ("table1", "cpu")]


@pytest.mark.parametrize(("target", "size"), PAGES)
def test_every_target_has_a_page(target, size, tmp_path):
    scale = replace(SCALES[size], runs=tmp_path / "runs", seeds=SCALES[size].seeds[:2])
    assert "have not been run" in message_of(command.draw, target, scale, tmp_path)
    finish(target, scale)
    page = command.draw(target, scale, tmp_path)
    assert page.name == (f"{target}.md" if size == "cpu" else f"{target}-{size}.md")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# ") and "# 60 s, 2026-01-01, commit abc\n" in text and f"make reproduce-{target}" in text
    for picture in re.findall(r"\]\(([^)]+\.png)\)", text):
        assert matplotlib.image.imread(tmp_path / picture)[..., :3].var() > 1e-3
    cases = list(FIGURES[target].cases(scale))
    points = [json.loads(line) for line in (page.with_suffix(".jsonl")).read_text(encoding="utf-8").splitlines()]
    assert len(points) == len(points_of(cases)) > 0
    assert {Path(point["run"]) for point in points} <= {case.step.folder for case in cases}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    if target == "figure3" or target.startswith("table"):
        right, digits = (LABELS, 1) if target == "figure3" else (ROWS, 2)
        ours = [row for row in rows if row[0] in {b.title for b in scale.backbones}][: 5 if size == "cpu" else None]
        for _, label, *cells in ours:
            assert {cell.split()[0] for cell in cells} == {f"{100 * right[label]:.{digits}f}"}
        assert all(point["score"] == 100 * right[point["model"]] for point in points)
    if target.startswith("table") and size == "paper":
        theirs = [list(map(float, row[2:])) for row in rows if row[1] == "the paper"]
        printed = [value for key, value in PAPER[target].items() if key not in ("title", "columns")]
        assert theirs == [row for backbone in printed for row in backbone]
    if target == "figure11":
        end = DENOISING_STEPS[size] - 1
        assert {row[1]: row[-1].split()[0] for row in rows[2:]} == {m: f"{LABELS[m] + end:.2f}" for m in CONTROLLED}
        assert "7 held-out examples" in text
    if target in ("figure7", "ablations"):
        scores = [point for point in points if point.get("score") is not None]
        for point in scores:
            assert point["score"] == 100 * RIGHT["mdlm" if point.get("method") == MDLM else "own"]
        assert scores
    assert ("decoded without" in text) == (target not in ("figure4", "dropout"))
