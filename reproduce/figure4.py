"""Figure 4: train and eval loss of MDLM and MemDLM over the steps, with the curve that the paper leaves out.

MemDLM's loss is computed with fast weights that have just been fitted to the tokens being scored. The third curve has
the same slow weights with the fast weights discarded, and is the fair one to compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .charts import DISCARDED, Line, Lines, draw_lines, spread
from .commands import Command
from .curves import Series, final, first_step_at
from .page import Grid, Page
from .reporting import MDLM_SUFFIX, Run, draw_curves, load_run, tail_mean
from .scales import MDLM, MEMDLM, Backbone, Scale

#: The curves: the method that was trained, and the name of the losses in its logs.
CURVES = {"MDLM": (MDLM, "loss"), "MemDLM": (MEMDLM, "loss"), DISCARDED: (MEMDLM, "loss_memory_off")}

#: What the paper shows, in words; it prints no numbers beside its curves.
PAPER = {
    "MDLM": "higher throughout",
    "MemDLM": "falls faster, stays lower",
    DISCARDED: "not shown",
}


def stages(scale: Scale) -> list[list[Command]]:
    """What has to be run."""
    return [*scale.bases(scale.backbones), scale.pairs(scale.backbones)]


def page(scale: Scale, folder: Path) -> Page:
    """Draw figure4.png, and put the numbers beside it."""
    runs = {
        (backbone, method, seed): _load(scale, backbone, method, seed)
        for backbone in scale.backbones
        for method in (MDLM, MEMDLM)
        for seed in scale.seeds
    }
    folder.mkdir(parents=True, exist_ok=True)
    draw_curves([*runs.values()], folder / "figure4.png")
    draw_lines([[_differences(scale, backbone, runs) for backbone in scale.backbones]], folder / "differences.png")
    rows = [row for backbone in scale.backbones for row in _rows(scale, backbone, runs)]
    columns = (
        *("backbone", "curve", "train loss, last tenth", "final eval loss", "− MDLM's, same seed"),
        *("steps to MDLM's final eval loss", "the paper"),
    )
    return Page(
        name="figure4",
        title="Training dynamics (figure 4)",
        scale=scale.name,
        seeds=scale.seeds,
        about=[scale.about, *_about(scale, runs)],
        points=[point for key, run in runs.items() for point in _points(*key, run)],
        pictures={
            "figure4.png": "Train and eval loss. Line: mean of the seeds; band: a standard deviation.",
            "differences.png": "Eval loss less MDLM's of the same seed. Line: mean; band: a standard deviation.",
        },
        tables=[Grid("Final losses (nats), mean ± standard deviation over the seeds", columns, rows)],
    ).made_by(command for stage in stages(scale) for command in stage)


def _load(scale: Scale, backbone: Backbone, method: str, seed: int) -> Run:
    recipe = backbone.key + (MDLM_SUFFIX if method == MDLM else "")
    return load_run(recipe, scale.run(backbone, method, seed).folder, backbone.title)


def _rows(scale: Scale, backbone: Backbone, runs: dict[Any, Run]) -> list[Sequence[str]]:
    baselines = {seed: final(runs[backbone, MDLM, seed], "eval_loss") for seed in scale.seeds}
    rows = []
    for label, (method, key) in CURVES.items():
        own = {seed: runs[backbone, method, seed] for seed in scale.seeds}
        train = spread([tail_mean(run.series(key)[1]) for run in own.values()])
        evals = spread([final(run, f"eval_{key}") for run in own.values()])
        against = spread([final(run, f"eval_{key}") - baselines[seed] for seed, run in own.items()])
        reached = [first_step_at(run.series(f"eval_{key}"), baselines[seed]) for seed, run in own.items()]
        rows.append(
            (
                *(backbone.title, label, train.text(), evals.text()),
                "-" if method == MDLM else against.text(digits=4, sign=True),
                "-" if method == MDLM else ", ".join("not reached" if s is None else f"{s:.0f}" for s in reached),
                PAPER[label],
            )
        )
    return rows


def _differences(scale: Scale, backbone: Backbone, runs: dict[Any, Run]) -> Lines:
    """The eval loss of both of MemDLM's curves less MDLM's of the same seed, over the steps."""
    lines = []
    for label, (method, key) in CURVES.items():
        if method == MDLM:
            continue
        pairs = [(runs[backbone, method, s].series(f"eval_{key}"), _baseline(runs, backbone, s)) for s in scale.seeds]
        seeds = [[a - b for a, b in zip(own[1], base[1], strict=True)] for own, base in pairs]
        lines.append(Line(label, pairs[0][0][0], [spread(values) for values in zip(*seeds, strict=True)]))
    return Lines(backbone.title, "optimizer step", "eval loss − MDLM's (nats)", lines, zero=True)


def _baseline(runs: dict[Any, Run], backbone: Backbone, seed: int) -> Series:
    return runs[backbone, MDLM, seed].series("eval_loss")


def _points(backbone: Backbone, method: str, seed: int, run: Run) -> list[dict[str, Any]]:
    """Every logged loss, each with where it is from."""
    keys = [f"{split}{key}" for _, (own, key) in CURVES.items() if own == method for split in ("", "eval_")]
    head = {"backbone": backbone.title, "method": method, "seed": seed, "run": str(run.path)}
    return [
        {**head, "loss": key, "step": step, "value": value}
        for key in keys
        for step, value in zip(*run.series(key), strict=True)
    ]


def _about(scale: Scale, runs: dict[Any, Run]) -> list[str]:
    sentences = []
    for backbone in scale.backbones:
        base = fmean(final(runs[backbone, MDLM, seed], "eval_loss") for seed in scale.seeds)
        on, off = (
            [final(runs[backbone, MEMDLM, s], key) - final(runs[backbone, MDLM, s], "eval_loss") for s in scale.seeds]
            for key in ("eval_loss", "eval_loss_memory_off")
        )
        sentences.append(
            f"{backbone.title}: MDLM ends at an eval loss of {base:.3f}. With its fast weights MemDLM ends "
            f"{_against(on)}; with them discarded, {_against(off)}."
        )
    return [
        "MDLM and MemDLM start from the same weights and see the same examples under the same masks, in the same "
        "order. The seed decides order, masks and the LoRA's first weights.",
        "MemDLM's loss is computed with fast weights that have just been fitted to the tokens being scored, so part of "
        "its gap is the inner loop having seen the answer. The third curve, which the paper does not draw, has the "
        "same slow weights with the fast weights discarded: it is the one to compare with MDLM.",
        " ".join(sentences),
    ]


def _against(differences: Sequence[float]) -> str:
    """How far below or above MDLM's, in words, and whether every seed agrees."""
    mean, signs = fmean(differences), {difference < 0 for difference in differences}
    text = f"{abs(mean):.4f} {'lower' if mean < 0 else 'higher'}"
    if len(differences) == 1:
        return text
    return f"{text}, in all {len(differences)} seeds" if len(signs) == 1 else f"{text}, though not in every seed"
