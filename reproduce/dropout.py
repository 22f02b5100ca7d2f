"""Memory dropout (ours): what fast weights that are always there do to a model that is trained from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.report import Section

from .cases import Case
from .draw import Drawn
from .logs import last, logged, said
from .plots import grid, line, save
from .scales import MDLM, Scale

#: What is trained, its label, and the settings that differ from the base's recipe, which is plain MDLM.
DROPOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    MDLM: ("MDLM", {}),
    **{f"dropout-{p:g}": (f"dropout {p:g}", {"memory.enabled": True, "memory.dropout": p}) for p in (0.0, 0.25, 0.5)},
}
#: Enough for the losses to part.
SHORTER = {"training.max_steps": 300, "training.eval_steps": 50, "training.save_steps": 150}


def cases(scale: Scale) -> Iterator[Case]:
    first = scale.backbones[0]._replace(base=scale.backbones[0].base[:1])
    for seed in scale.seeds:
        for case, (_, changes) in DROPOUTS.items():
            run = scale.base(first, seed, f"scratch-{case}", **SHORTER, **changes)
            yield Case({"case": case, "seed": seed}, run, partial(logged, keys=("eval_loss", "eval_loss_memory_off")))


def draw(scale: Scale, points: pd.DataFrame, picture: Path) -> Drawn:
    figure, axes = grid(1, 2)
    rows: dict[str, list[str]] = {label: [label] for label, _ in DROPOUTS.values()}
    for ax, key in zip(axes[0], ("eval_loss", "eval_loss_memory_off"), strict=True):
        title = f"fast weights {'in place' if key == 'eval_loss' else 'discarded'}"
        ax.set(title=title, xlabel="optimizer step", ylabel="eval loss (nats)")
        for case, (label, _) in DROPOUTS.items():
            own = points[points.case == case]
            if case == MDLM and key == "eval_loss":  # it has one loss, without fast weights
                rows[label].append("-")
                continue
            own_key = "eval_loss" if case == MDLM else key
            line(ax, own[own.loss == own_key], "step", "value", label)
            rows[label].append(said(last(own, own_key)))
    save(figure, picture)
    columns = ["training", "fast weights in place", "fast weights discarded"]
    return Drawn(
        [
            f"{scale.backbones[0].title} of 0.7 million parameters from scratch, {SHORTER['training.max_steps']} steps "
            "on the task that the base of the other figures learns, with the paper's inner loop. The paper fine-tunes "
            "pretrained models and has no memory dropout; this asks what its default, 0, does to a model that knows "
            "nothing yet."
        ],
        [Section("Final eval loss (nats), mean ± standard deviation over the seeds", columns, rows=[*rows.values()])],
        "Eval loss. Line: mean of the seeds; band: a standard deviation.",
    )
