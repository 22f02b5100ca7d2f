"""Charts: what is drawn of numbers made by hand."""

from __future__ import annotations

from statistics import fmean, stdev

import pytest
from drawings import bands_of, run_of
from matplotlib.colors import to_hex

from reproduce.charts import (
    BLUE,
    DISCARDED,
    GREY,
    STYLES,
    Bar,
    Bars,
    Line,
    Lines,
    Spread,
    draw_bars,
    draw_lines,
    spread,
)
from reproduce.reporting import draw_curves, smooth


def test_a_spread_is_the_mean_and_the_standard_deviation_of_a_sample():
    assert spread([1.0, 2.0, 6.0]) == (3.0, stdev([1, 2, 6]))
    assert spread([2.5]) == (2.5, None)
    assert (spread([1, 2, 6]).text(1), spread([2.5]).text(), spread([0.5]).text(2, sign=True)) == (
        "3.0 ± 2.6",
        "2.500",
        "+0.50",
    )


def test_bars_stand_where_they_belong(figures, tmp_path):
    bars = [Bar("first", Spread(30.0, 2.0), BLUE), Bar("none", None), Bar("last", Spread(-10.0, None), GREY)]
    panel = Bars("One", "score (%)", bars)
    draw_bars([[panel, panel._replace(title="")], [Bars("Two", "nats", bars[:1])]], tmp_path / "bars.png")
    one, other, two, empty = figures[0].axes
    assert [ax.get_title(loc="left") for ax in (one, other, two)] == ["One", "", "Two"]
    assert [ax.get_xlabel() for ax in (one, two)] == ["score (%)", "nats"] and not empty.axison
    assert [label.get_text() for label in one.get_yticklabels()] == ["first", "none", "last"]
    assert [label.get_text() for label in other.get_yticklabels()] == ["", "", ""], "named once a row"
    assert [
        (bar.get_y() + bar.get_height() / 2, bar.get_width(), to_hex(bar.get_facecolor())) for bar in one.patches
    ] == [
        (0, 30.0, BLUE),
        (2, -10.0, GREY),
    ]
    assert one.get_ylim()[0] > one.get_ylim()[1], "the first is on top"
    (error,) = [part for part in one.collections if part.get_segments()[0].shape == (2, 2)]
    assert error.get_segments()[0][:, 0].tolist() == [28.0, 32.0]
    assert one.get_xlim()[0] < -10 < 32 < one.get_xlim()[1]


def test_a_panel_may_have_nothing_to_show(figures, tmp_path):
    """The paper has no score for an ablation of ours."""
    nothing = [Bar("a", None), Bar("b", None)]
    draw_bars([[Bars("t", "x", nothing)]], tmp_path / "bars.png")
    assert len(figures[0].axes[0].patches) == 0


def test_lines_have_bands_over_the_seeds(figures, tmp_path):
    two, alone = [Spread(3.0, 0.5), Spread(2.0, 1.0)], [Spread(1.0, None), Spread(2.0, None)]
    lines = [Line("MDLM", [1, 4], two), Line("one", [1, 4], alone), Line("two", [1, 4], alone)]
    named = [Line("MDLM", ["40 words", "80 words"], two)]
    draw_lines([[Lines("A", "x", "y", lines), Lines("B", "x", "y", named)]], tmp_path / "lines.png")
    first, second = figures[0].axes
    assert [(line.get_label(), line.get_xydata().tolist()) for line in first.get_lines()] == [
        ("MDLM", [[1, 3], [4, 2]]),
        ("one", [[1, 1], [4, 2]]),
        ("two", [[1, 1], [4, 2]]),
    ]
    assert bands_of(first) == {"#6b6b6b": [(1, 2.5), (1, 3.5), (4, 1), (4, 3)]}, "none for a single seed"
    assert len({to_hex(line.get_color()) for line in first.get_lines()}) == 3
    assert (first.get_title(), first.get_xlabel(), first.get_ylabel()) == ("A", "x", "y")
    assert [label.get_text() for label in second.get_xticklabels()] == ["40 words", "80 words"]
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["MDLM", "one", "two"], "once each"


def test_curves_of_several_seeds_are_their_mean_in_a_band(figures, tmp_path):
    train = [[float(n % 7) + seed for n in range(40)] for seed in (0, 2)]
    runs = [run_of("a_mdlm", loss=own, eval_loss=[4.0 + seed, 2.0, 1.0][: 3 - seed]) for seed, own in enumerate(train)]
    runs += [run_of("a", loss=[1.0], loss_memory_off=[2.0], eval_loss=[3.0]), run_of("b", "Other", loss=[1.0])]
    draw_curves(runs, tmp_path / "curves.png")
    left, right, other, _ = figures[0].axes
    assert [ax.get_title() for ax in (left, right, other)] == ["LLaDA-MoE, train", "LLaDA-MoE, eval", "Other, train"]
    drawn = {line.get_label(): line.get_ydata() for line in left.get_lines()}
    assert drawn["MDLM"] == pytest.approx([fmean(pair) for pair in zip(*map(smooth, train), strict=True)])
    assert (list(drawn["MemDLM"]), list(drawn[DISCARDED])) == ([1.0], [2.0])
    faint = left.get_lines()[1]
    assert faint.get_alpha() < 0.5 and faint.get_ydata() == pytest.approx([v + 1 for v in train[0]])
    (mdlm, _) = right.get_lines()
    assert mdlm.get_xydata().tolist() == [[10, 4.5], [20, 2.0]], "where all seeds have been evaluated"
    wide = stdev([4, 5])
    assert bands_of(right) == {
        STYLES["MDLM"]["color"]: [(10, round(4.5 - wide, 6)), (10, round(4.5 + wide, 6)), (20, 2)]
    }
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["MDLM", "MemDLM", DISCARDED]
