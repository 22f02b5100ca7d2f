"""How each figure and table is drawn of its points; what is said beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.report import Section

from .cases import BEFORE, DENOISING_STEPS, EVALUATED, PAPER
from .logs import against, first_step_at, last, said, tail
from .plots import BLUE, DISCARDED, LIGHT, ORANGE, bars, grid, line, save
from .scales import MDLM, MEMDLM, Scale
from .scores import ABLATED, ANCHORED, RETRIEVAL, RULER_OFFLINE


class Drawn(NamedTuple):
    """What is said beside the picture."""

    notes: Sequence[str]
    tables: Sequence[Section]
    caption: str = ""  #: of the picture; none where there is no picture


#: The curves of figure 4: the method that was trained, and the name of the losses in its logs.
CURVES = {
    "MDLM": (MDLM, "loss"),
    "MemDLM": (MEMDLM, "loss"),
    DISCARDED: (MEMDLM, "loss_memory_off"),
    "MemDLM, φ of the prompt": (MEMDLM, "loss_memory_prompt"),
    "MemDLM, φ of another prompt": (MEMDLM, "loss_memory_other"),
}


def curves(row: Sequence[Any], title: str, points: pd.DataFrame) -> None:
    """Draw the losses of both methods: train, eval, and eval less MDLM's of the same seed."""
    evaluated = {
        label: points[(points.method == method) & (points.loss == f"eval_{key}")]
        for label, (method, key) in CURVES.items()
    }
    for ax, split in zip(row, ("train", "eval", "eval − MDLM's"), strict=True):
        ax.set(title=f"{title}, {split}", xlabel="optimizer step", ylabel="loss (nats)")
    for label, (method, key) in CURVES.items():
        own = points[(points.method == method) & (points.loss == key)]
        line(row[0], own, "step", "value", label, noisy=True)
        line(row[1], evaluated[label], "step", "value", label)
        if method != MDLM:
            line(row[2], against(evaluated[label], evaluated["MDLM"], "value", "step"), "step", "value", label)
    row[2].axhline(0, color="black", linewidth=0.8)


def dynamics(scale: Scale, points: pd.DataFrame, picture: Path) -> Drawn:
    panels = [(backbone.title, rate) for backbone in scale.backbones for rate in scale.rates(backbone)]
    figure, axes = grid(len(panels), 3)
    rows = []
    for row, (title, rate) in zip(axes, panels, strict=True):
        own = points[(points.backbone == title) & (points.rate.isna() | (points.rate == rate))]
        title = f"{title}, inner lr {rate:g}"
        curves(row, title, own)
        mdlms, prompts = last(own[own.method == MDLM], "eval_loss"), last(own, "eval_prompt_nll")
        for label, (method, key) in CURVES.items():
            of_method = own[own.method == method]
            ends, trained, more = last(of_method, f"eval_{key}"), tail(of_method, key), ("-", "-")
            if method != MDLM:
                evals = of_method[of_method.loss == f"eval_{key}"]
                found = [first_step_at(c.set_index("step").value, mdlms[seed]) for seed, c in evals.groupby("seed")]
                reached = ", ".join("not reached" if step is None else f"{step:.0f}" for step in found)
                more = (said(ends - mdlms, 4, sign=True), reached)
            rows.append([title, label, said(trained) if len(trained) else "-", said(ends), *more])
        rows.append([title, "prompt NLL, without φ (nats)", "-", said(prompts), "-", "-"])
    save(figure, picture)
    columns = ("backbone", "curve", "train loss, last tenth", "final eval loss", "− MDLM's", "steps to MDLM's end")
    return Drawn(
        [
            "MDLM and MemDLM start from the same weights and see the same examples under the same masks, in the same "
            "order. The seed decides order, masks and the LoRA's first weights.",
            "MemDLM's loss is computed with fast weights that have just been fitted to the tokens being scored. The "
            "other curves, which the paper does not draw, are of the same slow weights: with the fast weights "
            "discarded, the one to compare with MDLM; with fast weights written on the prompt alone, as in use; and on "
            "another example's prompt, the control.",
            PAPER["finds"]["figure4"],
        ],
        [Section("Losses (nats), mean ± standard deviation over the seeds", [*columns], rows=rows)],
        "Train and eval loss, and the eval loss less MDLM's of the same seed. Line: mean of the seeds; band: a "
        "standard deviation.",
    )


def by_length(scale: Scale, points: pd.DataFrame, picture: Path) -> Drawn:
    figure, axes = grid(2, len(scale.backbones))
    rows, columns = [], list(points.column.unique())
    for backbone, above, below in zip(scale.backbones, *axes, strict=True):
        own = points[points.backbone == backbone.title]
        above.set(title=backbone.title, xlabel="length of the text", ylabel="right answers (%)")
        below.set(xlabel="length of the text", ylabel="right answers − MDLM's (points)")
        below.axhline(0, color="black", linewidth=0.8)
        for label in own.model.unique():
            of_model = own[own.model == label]
            line(above, of_model, "column", "score", label)
            if label not in (BEFORE, "MDLM"):
                less = against(of_model, own[own.model == "MDLM"], "score", "column")
                line(below, less, "column", "score", label)
            rows.append([backbone.title, label, *(said(of_model[of_model.column == c].score, 1) for c in columns)])
    save(figure, picture)
    return Drawn(
        [
            f"Asked: {RETRIEVAL[scale.name][0].asked(scale)}, at each length. The model before fine-tuning is one for "
            "all seeds.",
            PAPER["finds"]["figure3"],
        ],
        [Section("%, mean ± standard deviation over the seeds", ["backbone", "model", *columns], rows=rows)],
        "Share of right answers, and how far MemDLM's is from MDLM's of the same seed. Band: a standard deviation.",
    )


def by_ratio(scale: Scale, points: pd.DataFrame, picture: Path) -> Drawn:
    models, columns, rows = points.model.unique(), list(points.column.unique()), []
    figure, (row,) = grid(1, len(models), sharey=True)
    for ax, model in zip(row, models, strict=True):
        ax.set(title=model, xlabel="masked ratio of the anchor", ylabel="right answers (%)")
        for column in columns:
            line(ax, points[(points.column == column) & (points.model == model)], "ratio", "score", column)
    save(figure, picture)
    means = points[points.model == models[0]].groupby(["column", "ratio"]).score.mean().unstack()
    moved = (means.max(axis=1) - means.min(axis=1)).sort_values()
    for (model, ratio), own in points.groupby(["model", "ratio"], sort=False):
        rows.append([model, f"{ratio:g}", *(said(own[own.column == column].score, 1) for column in columns)])
    return Drawn(
        [
            f"{scale.backbones[0].title}, trained with memory; asked: "
            f"{ANCHORED[scale.name][0].asked(scale)}, at each length.",
            f"{PAPER['finds']['figure7']} Ours differ by at most {moved.iloc[-1]:.1f} points, at {moved.index[-1]}.",
        ],
        [Section("%, mean ± standard deviation over the seeds", ["model", "ratio", *columns], rows=rows)],
        "Share of right answers. Band: a standard deviation over the seeds.",
    )


#: What is drawn of each step, with the axis' label.
MEASURES = {
    "ratio": "$L_{seq} / L_{static}$",
    "static": "$L_{static}$ (nats a token)",
    "sequential": "$L_{seq}$ (nats a token)",
}


def exposed(scale: Scale, points: pd.DataFrame, picture: Path) -> Drawn:
    figure, axes = grid(len(scale.backbones), len(MEASURES))
    steps = DENOISING_STEPS[scale.name]
    rows, shown = [], [steps // 4, steps // 2, 3 * steps // 4, steps - 1]
    for row, backbone in zip(axes, scale.backbones, strict=True):
        for label in points.model.unique():
            own = points[(points.backbone == backbone.title) & (points.model == label)]
            for ax, (measure, name) in zip(row, MEASURES.items(), strict=True):
                line(ax, own, "step", measure, label)
                ax.set(title=backbone.title, xlabel="denoising step", ylabel=name)
            rows.append([backbone.title, label, *(said(own[own.step == step].ratio, 2) for step in shown)])
    save(figure, picture)
    examples = " or ".join(map(str, sorted(points.examples.unique())))
    return Drawn(
        [
            f"{examples} held-out examples, {steps} steps. L_static: nats a token on the true text with that share of "
            "the response masked; L_seq: on the text that the model has unmasked itself, most confident tokens first. "
            "Both score the true tokens at the positions still masked.",
            "With the memory on, it is in place in both. The authors' script has it in L_seq alone, and takes the mean "
            "of each example's mean where we count all tokens alike; the paper's text settles neither.",
            PAPER["finds"]["figure11"],
        ],
        [
            Section(
                "R_EB, mean ± standard deviation over the seeds",
                ["backbone", "model", *(f"step {s}" for s in shown)],
                rows=rows,
            )
        ],
        "Exposure bias and its two losses. Band: a standard deviation over the seeds.",
    )


def ablated(scale: Scale, points: pd.DataFrame, picture: Path) -> Drawn:
    groups, task = PAPER["ablations"], ABLATED[scale.name]
    by_method = dict(list(points.groupby("method")))
    mdlm_loss = last(by_method[MDLM], "eval_loss")
    losses = {}  # in the order of the panels: less MDLM's, which has none with fast weights; less the control's
    for method, own in by_method.items():
        ends = {key: mdlm_loss if method == MDLM else last(own, key) for key in EVALUATED}
        on, off, prompt, other = ends.values()
        losses[method] = [off - mdlm_loss, on - mdlm_loss, prompt - other]
    scores = {method: own.groupby("seed").score.mean() for method, own in by_method.items()}
    printed = {method: score for group in groups.values() for _, method, score in group if score is not None}
    heights = [len(group) + 1.6 for group in groups.values()]
    figure, axes = grid(len(groups), 5, (2.9, 0.3 * sum(heights) / len(groups)), height_ratios=heights)
    rows = []
    for row, (title, group) in zip(axes, groups.items(), strict=True):
        names, methods = [label for label, *_ in group], [method for _, method, _ in group]
        papers = [[] if score is None else [score - printed[MDLM]] for *_, score in group]
        panels = [
            ("the paper: BABILong-1K − MDLM's (points)" if any(papers) else "not in the paper", LIGHT, papers),
            (f"ours: {', '.join(task.columns)} − MDLM's (points)", BLUE, [scores[m] - scores[MDLM] for m in methods]),
            ("loss − MDLM's, φ discarded (10⁻³ nats)", ORANGE, [1e3 * losses[m][0] for m in methods]),
            ("loss − MDLM's, φ in place (10⁻³ nats)", BLUE, [1e3 * losses[m][1] for m in methods]),
            ("φ of prompt − of another (10⁻³ nats)", ORANGE, [1e3 * losses[m][2] for m in methods]),
        ]
        for ax, (axis, color, values) in zip(row, panels, strict=True):
            bars(ax, names if ax is row[0] else [""] * len(names), values, color)
            ax.set_xlabel(axis, fontsize=9)
        row[0].set_title(title, fontsize=10, loc="left")
        for label, method, score in group:
            leads = scores[MEMDLM] - scores[method]
            same = "-"
            if score is not None and method != MEMDLM:
                same = f"{(leads * (printed[MEMDLM] - score) > 0).sum()} of {len(leads)}"
            less = ["-"] * 3 if method == MDLM else [said(values, 4, sign=True) for values in losses[method]]
            rows.append([title, label, "-" if score is None else f"{score:.1f}", said(scores[method], 1), same, *less])
    save(figure, picture)
    norms = points[points.loss.isin(["inner_grad_norm_1", "inner_grad_norm_2"])].value
    steps = f" in {scale.shorter['training.max_steps']} steps" if scale.shorter else ""
    columns = ["ablation", "variant", "the paper: BABILong-1K, %", "ours: retrieval, %", "seeds with the paper's order"]
    columns += ["eval loss, φ discarded, − MDLM's", "eval loss, φ in place, − MDLM's"]
    columns += ["eval loss, φ of the prompt − of another prompt"]
    return Drawn(
        [
            f"{scale.backbones[0].title}, fine-tuned{steps} from the same weights for each variant and seed; scored on "
            f"{task.asked(scale)} ({', '.join(task.columns)}), those trained with memory with it on, and by the loss "
            "on held-out examples, compared with MDLM's of the same seed, which saw the same examples under the same "
            "masks. The last column is the memory as it is used, against its control. The paper's order: whether the "
            "default (MemDLM) is above or below the variant.",
            f"The gradients of MemDLM's inner steps have a norm of {norms.median():.2g} in the median and at most "
            f"{norms.max():.2g}, all fast weights of a sample together, in the mean of a batch. Only what is above a "
            "clip is clipped.",
            *["The models have four layers, so 5, 10 and 25 % of them are all the last one."] * (scale.name == "cpu"),
        ],
        [Section("Mean ± standard deviation over the seeds; losses in nats, paired by seed", columns, rows=rows)],
        "How far the paper's scores, ours, and the eval losses are from MDLM's of the same seed. Whiskers: a standard "
        "deviation.",
    )


def table(name: str, scale: Scale, points: pd.DataFrame, picture: Path) -> Drawn:
    """Our scores, with the paper's beside them where they are of the same columns, and below where not."""
    theirs, columns = PAPER[name], list(points.column.unique())
    papers = {
        (backbone, row): [f"{score:.2f}" for score in scores]
        for backbone, printed in theirs.items()
        if backbone not in ("title", "columns")
        for row, scores in zip(PAPER["rows"], printed, strict=True)
    }
    rows = []
    for (backbone, row), own in points.groupby(["backbone", "model"], sort=False):
        rows.append([backbone, row, *(said(own[own.column == column].score, 2) for column in columns)])
        if scale.name == "paper":
            found = dict(zip(theirs["columns"], papers[backbone, row], strict=True))
            rows.append(["", "the paper", *(found[column] for column in columns)])
    tables = [Section("Ours, %", ["backbone", "method", *columns], rows=rows)]
    notes = ["The tasks, lengths and decoding of the paper, through lm-eval."]
    if scale.name != "paper":
        rows = [[*key, *cells] for key, cells in papers.items()]
        tables.append(Section("The paper's, %", ["backbone", "method", *theirs["columns"]], rows=rows))
        notes = [
            f"RULER that reads no files, the same for tables 1, 2 and 3: {RULER_OFFLINE[scale.name].asked(scale)}. "
            "`SCALE=paper` runs the paper's tasks; its numbers stand below.",
            *["Four questions of each measure nothing; they show the way from a recipe to a table."]
            * (scale.name == "cpu"),
        ]
    if name == "table3":
        notes.append("The paper does not say which backbone its table 3 is of; we take it to be LLaDA-MoE.")
    return Drawn(notes, tables)
