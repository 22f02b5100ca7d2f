"""From logs and scores to figures: the numbers of runs made by hand, and what is drawn of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from data_files import message_of
from drawings import bands_of, run_of
from matplotlib.colors import to_hex

from reproduce import ablations, figure3, figure4
from reproduce.charts import DISCARDED, draw_bars, draw_lines, spread
from reproduce.curves import final, first_step_at
from reproduce.paper import ABLATIONS, Variant
from reproduce.scales import MDLM, MEMDLM, SCALES

CPU = dataclasses.replace(SCALES["cpu"], seeds=(1, 2))
MOE = CPU.backbones[0]
VARIANTS = [variant for group in ABLATIONS.values() for variant in group]


# --- curves --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "loss", "step"),
    [
        ([4.0, 3.0, 2.0], 1.9, None),  # never
        ([4.0, 3.0, 2.0], 5.0, 10.0),  # from the first point on
        ([4.0, 3.0, 2.0], 4.0, 10.0),
        ([4.0, 3.0, 2.0], 3.0, 20.0),
        ([4.0, 3.0, 2.0], 3.25, 17.5),
        ([4.0, 3.0, 1.0], 2.5, 22.5),
        ([4.0, 2.0, 3.0, 1.0], 2.0, 20.0),  # the first time counts
        ([4.0, 5.0, 3.0], 3.5, 27.5),
        ([3.0, 3.0, 2.0], 3.0, 10.0),
        ([], 1.0, None),
    ],
)
def test_the_first_step_at_a_loss_is_between_two_points(values, loss, step):
    assert first_step_at((list(range(10, 10 * len(values) + 1, 10)), values), loss) == step


def test_the_final_value_is_the_last_one():
    run = run_of("a", loss=[3.0, 2.0], eval_loss=[3.0, 4.0])
    assert (final(run, "loss"), final(run, "eval_loss")) == (2.0, 4.0)
    assert message_of(final, run, "eval_nll").startswith("runs/a: no eval_nll was logged")


# --- figure 4 and the ablations on numbers made by hand ------------------------------------------------------------


def dynamics(off: tuple[float, float]) -> dict:
    """Two seeds of both methods on one backbone; `off` are MemDLM's final eval losses without fast weights."""
    runs = {}
    for seed, last in zip(CPU.seeds, off, strict=True):
        train = [float(n) for n in range(20, 0, -1)]
        base = {"loss": train, "eval_loss": [4.0, 3.0, 2.0 + seed / 10]}
        own = {"loss": [v - 1 for v in train], "loss_memory_off": [v + 1 for v in train], "eval_loss": [3.0, 2.0, 1.0]}
        runs[MOE, MDLM, seed] = run_of("llada_moe_mdlm", **base)
        runs[MOE, MEMDLM, seed] = run_of("llada_moe", **own, eval_loss_memory_off=[4.0, 3.5, last])
    return runs


def test_figure_4_tables_the_losses_and_the_steps_to_mdlms():
    assert figure4._rows(CPU, MOE, dynamics((2.0, 2.4))) == [
        ("LLaDA-MoE", "MDLM", "1.500 ± 0.000", "2.150 ± 0.071", "-", "-", figure4.PAPER["MDLM"]),
        *[
            (
                "LLaDA-MoE",
                "MemDLM",
                "0.500 ± 0.000",
                "1.000 ± 0.000",
                "-1.1500 ± 0.0707",
                "19, 18",
                "falls faster, stays lower",
            )
        ],
        ("LLaDA-MoE", DISCARDED, "2.500 ± 0.000", "2.200 ± 0.283", "+0.0500 ± 0.2121", "29, not reached", "not shown"),
    ]


@pytest.mark.parametrize(
    ("off", "says"),
    [
        ((2.0, 2.1), "0.1000 lower, in all 2 seeds."),
        ((2.3, 2.4), "0.2000 higher, in all 2 seeds."),
        ((2.0, 2.5), "0.1000 higher, though not in every seed."),
    ],
)
def test_figure_4_says_how_the_methods_compare(off, says):
    scale = dataclasses.replace(CPU, backbones=CPU.backbones[:1])
    *_, last = figure4._about(scale, dynamics(off))
    assert last == (
        "LLaDA-MoE: MDLM ends at an eval loss of 2.150. With its fast weights MemDLM ends 1.1500 lower, in all 2 seeds"
        f"; with them discarded, {says}"
    )
    gap = off[0] - 2.1
    last = figure4._about(dataclasses.replace(scale, seeds=(1,)), dynamics(off))[-1]
    assert last.endswith(f"discarded, {abs(gap):.4f} {'lower' if gap < 0 else 'higher'}."), (
        "one seed agrees with itself"
    )
    run, points = dynamics(off)[MOE, MEMDLM, 1], figure4._points(MOE, MEMDLM, 1, dynamics(off)[MOE, MEMDLM, 1])
    assert len(points) == len(run.log_history) == 46
    for point in points:
        assert {"step": point["step"], point["loss"]: point["value"]} in run.log_history
        assert (point["backbone"], point["method"], point["seed"]) == ("LLaDA-MoE", MEMDLM, 1)


def test_figure_4_draws_the_gap_to_mdlm_seed_by_seed(figures, tmp_path):
    draw_lines([[figure4._differences(CPU, MOE, dynamics((2.0, 2.5)))]], tmp_path / "differences.png")
    (ax,) = figures[0].axes
    zero, on, off = ax.get_lines()
    assert list(zero.get_ydata()) == [0, 0] and [on.get_label(), off.get_label()] == ["MemDLM", DISCARDED]
    assert on.get_xydata() == pytest.approx(np.array([[10, -1], [20, -1], [30, -1.15]]))
    assert off.get_ydata() == pytest.approx([0, 0.5, 0.1]), "MDLM's end at 2.1 and 2.2"
    assert bands_of(ax)[to_hex(off.get_color())][-2:] == [(30, -0.182843), (30, 0.382843)]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["MemDLM", DISCARDED]


def scored(losses: dict[str, float] | None = None, **scores: list[float]) -> list[dict]:
    """Points of an ablation: a score for each seed, and an eval loss that differs by method unless it is given."""
    return [
        {"method": method, "seed": seed, "score": score, "eval_loss": (losses or {}).get(method, number) + seed / 10}
        for number, (method, values) in enumerate(scores.items())
        for seed, score in enumerate(values)
    ]


DEFAULT = Variant("default", MEMDLM, 68.4)


def test_figure_3_takes_mdlms_score_away_seed_by_seed():
    scores = {("MDLM", 1): 50, ("MDLM", 2): 70, ("MemDLM, memory off", 1): 51, ("MemDLM, memory off", 2): 73}
    scores |= {("MemDLM, memory on", 1): 50, ("MemDLM, memory on", 2): 66, (figure3.BEFORE, None): 10}
    points = [
        {"backbone": title, "model": model, "seed": seed, "column": "80 words", "score": score + title.count("2")}
        for title in (MOE.title, "LLaDA2.1")
        for (model, seed), score in scores.items()
    ]
    off, on = figure3._differences(MOE, ["80 words"], points).lines
    assert (off.label, off.values) == ("MemDLM, memory off", [spread([1, 3])])
    assert (on.label, on.values) == ("MemDLM, memory on", [spread([0, -4])])


@pytest.mark.parametrize(
    ("ours", "other", "score", "says"),
    [
        ([60, 62], [50, 54], 53.8, "+9.0 ± 1.4 (the paper +14.6), as in the paper in all 2 seeds"),
        ([50, 52], [60, 62], 53.8, "-10.0 ± 0.0 (the paper +14.6), unlike the paper in all 2 seeds"),
        ([50, 52], [60, 62], 69.4, "-10.0 ± 0.0 (the paper -1.0), as in the paper in all 2 seeds"),
        ([60, 62], [50, 52], 69.4, "+10.0 ± 0.0 (the paper -1.0), unlike the paper in all 2 seeds"),
        ([50, 70], [55, 57], 53.8, "+4.0 ± 12.7 (the paper +14.6), the seeds do not agree"),
        ([50, 70], [50, 57], 53.8, "+6.5 ± 9.2 (the paper +14.6), the seeds do not agree"),
        ([50, 70], [50, 70], 53.8, "+0.0 ± 0.0 (the paper +14.6), the seeds do not agree"),
        ([60], [50], 53.8, "+10.0 (the paper +14.6)"),
    ],
)
def test_the_papers_order_is_compared_with_ours(ours, other, score, says):
    group = (Variant("other", "other", score), DEFAULT, Variant("new", "new", None))
    points = scored(memdlm=ours, other=other, new=[1])
    assert ablations._agreement(group, points).startswith(f"default − other = {says}. By the loss")
    both = ablations._agreement((*group, Variant("more", "other", score)), points)
    assert both.startswith(f"default − other = {says}; default − more = {says}. ")
    assert ablations._agreement((DEFAULT._replace(score=None), group[2]), points) == "not in the paper."


def test_variants_that_train_the_same_are_said_to():
    points = scored({"memdlm": 2.0, "other": 2.0}, memdlm=[60, 62], other=[60, 62])
    found = ablations._agreement((DEFAULT, Variant("other", "other", 53.8)), points)
    assert found.startswith("default − other = +0.0 ± 0.0 (the paper +14.6), the very same in every run. ")


@pytest.mark.parametrize(
    ("ours", "other", "says"),
    [
        ([1.0, 4.0], [2.0, 5.0], "better than other; more in every seed"),
        ([1.0, 4.0], [0.5, 3.0], "worse than other; more in every seed"),
        ([1.0, 4.0], [2.0, 3.0], "neither better nor worse than any in every seed"),
        ([1.0, 4.0], [2.0, 4.0], "neither better nor worse than any in every seed"),
    ],
)
def test_variants_are_compared_by_the_loss_of_each_seed(ours, other, says):
    points = [
        {"method": method, "seed": seed, "score": 1.0, "eval_loss": loss}
        for method, losses in (("memdlm", ours), ("other", other))
        for seed, loss in enumerate(losses)
    ]
    group = (DEFAULT, Variant("other", "other", 60.0), Variant("more", "other", 60.0))
    assert ablations._agreement(group, points).endswith(f". By the loss with φ in place default is {says}.")


def test_ablations_are_losses_against_mdlms_of_the_same_seed(figures, tmp_path):
    methods = {variant.method: 1.0 + number for number, variant in enumerate(VARIANTS)}
    points = [
        {"method": method, "seed": seed, "score": 10 * value, "eval_loss": value + seed, "eval_loss_memory_off": seed}
        for method, value in methods.items()
        for seed in (1, 2)
    ]
    base, kl, dropout = methods["mdlm"], methods["kl"], methods["dropout_25"]
    row = (f"{10 * kl:.1f} ± 0.0", f"{-base:+.4f} ± 0.0000", f"{kl - base:+.4f} ± 0.0000")
    assert ablations._row(Variant("logit KL", "kl", 66.0), points) == ("logit KL", "66.0", *row)
    assert ablations._row(Variant("MDLM", "mdlm", 53.8), points) == ("MDLM", "53.8", f"{10 * base:.1f} ± 0.0", "-", "-")
    assert ablations._row(Variant("0.25", "dropout_25", None), points)[1:3] == ("-", f"{10 * dropout:.1f} ± 0.0")
    rows = [ablations._panels(CPU, title, group, points) for title, group in ABLATIONS.items()]
    draw_bars(rows, tmp_path / "ablations.png")
    assert [ax.get_title(loc="left") for ax in figures[0].axes[:: len(rows[0])]] == [*ABLATIONS]
    shown = {ax.get_xlabel(): [bar.get_width() for bar in ax.patches] for ax in figures[0].axes[: len(rows[0])]}
    group = next(iter(ABLATIONS.values()))
    assert shown["the paper: BABILong-1K − MDLM's (points)"] == [variant.score - 53.8 for variant in group]
    assert shown["ours: 160 words − MDLM's (points)"] == [10 * (methods[variant.method] - base) for variant in group]
    assert shown["eval loss − MDLM's, φ discarded (10⁻³ nats)"] == [-1000 * base] * len(group)
    assert shown["eval loss − MDLM's, φ in place (10⁻³ nats)"] == [1000 * (methods[v.method] - base) for v in group]
    assert figures[0].axes[-len(rows[0])].get_xlabel() == "not in the paper"
