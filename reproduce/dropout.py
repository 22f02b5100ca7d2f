"""Memory dropout, which is ours: training from scratch while a share of the examples goes without fast weights.

A model that never goes without its memory can come to depend on it: its loss with the fast weights discarded then rises
while the other falls. Fine-tuning a pretrained model is among the ablations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllm_memdlm.config import ConfigError

from .charts import Line, Lines, draw_lines, spread
from .commands import Command
from .curves import final
from .page import Grid, Page
from .reporting import Run, load_run
from .scales import MDLM, Scale

#: What is trained, and the settings that differ from the base's recipe, which is plain MDLM.
CASES: dict[str, dict[str, Any]] = {
    MDLM: {},
    **{f"dropout-{p:g}": {"memory.enabled": True, "memory.dropout": p} for p in (0.0, 0.25, 0.5)},
}
LABELS = {MDLM: "MDLM", "dropout-0": "dropout 0", "dropout-0.25": "dropout 0.25", "dropout-0.5": "dropout 0.5"}

#: Enough for the losses to part.
SHORTER = {"training.max_steps": 300, "training.eval_steps": 50, "training.save_steps": 150}


def stages(scale: Scale) -> list[list[Command]]:
    """What has to be run. Raises ConfigError at a scale that trains nothing from scratch."""
    return [[_run(scale, case, seed) for seed in scale.seeds for case in CASES]]


def page(scale: Scale, folder: Path) -> Page:
    """Draw dropout.png, and put the numbers beside it."""
    runs = {(c, seed): load_run(c, _run(scale, c, seed).folder) for c in CASES for seed in scale.seeds}
    folder.mkdir(parents=True, exist_ok=True)
    charts = [
        _chart("fast weights in place", "eval_loss", [case for case in CASES if case != MDLM], runs),
        _chart("fast weights discarded", "eval_loss_memory_off", [*CASES], runs),
    ]
    draw_lines([charts], folder / "dropout.png")
    rows = [
        (
            LABELS[case],
            "-" if case == MDLM else spread([final(run, "eval_loss") for run in _seeds(runs, case)]).text(),
            spread([final(run, _key(case, "eval_loss_memory_off")) for run in _seeds(runs, case)]).text(),
        )
        for case in CASES
    ]
    return Page(
        name="dropout",
        title="Memory dropout, from scratch (ours)",
        scale=scale.name,
        seeds=scale.seeds,
        about=[
            f"{scale.backbones[0].title} of 0.7 million parameters from scratch, {SHORTER['training.max_steps']} "
            "steps on the task that the base of the other figures learns, with the paper's inner loop. The paper "
            "fine-tunes pretrained models and has no memory dropout; this asks what its default, 0, does to a model "
            "that knows nothing yet.",
        ],
        points=[
            {"case": case, "seed": seed, "run": str(run.path), "loss": key, "step": step, "value": value}
            for (case, seed), run in runs.items()
            for key in ("eval_loss", "eval_loss_memory_off")
            for step, value in zip(*run.series(key), strict=True)
        ],
        pictures={"dropout.png": "Eval loss. Line: mean of the seeds; band: a standard deviation."},
        tables=[
            Grid(
                "Final eval loss (nats), mean ± standard deviation over the seeds",
                ("training", "fast weights in place", "fast weights discarded"),
                rows,
            )
        ],
    ).made_by(command for stage in stages(scale) for command in stage)


def _run(scale: Scale, case: str, seed: int) -> Command:
    if scale.backbones[0].convert or not scale.backbones[0].base:
        raise ConfigError(f"--scale {scale.name}: starts from pretrained weights; expected cpu for dropout")
    return scale.scratch(scale.backbones[0], case, seed, SHORTER | CASES[case])


def _key(case: str, key: str) -> str:
    """MDLM has one loss, without fast weights."""
    return "eval_loss" if case == MDLM else key


def _seeds(runs: dict[tuple[str, int], Run], case: str) -> list[Run]:
    return [run for (own, _), run in runs.items() if own == case]


def _chart(title: str, key: str, cases: Sequence[str], runs: dict[tuple[str, int], Run]) -> Lines:
    lines = []
    for case in cases:
        series = [run.series(_key(case, key)) for run in _seeds(runs, case)]
        values = [spread(at_step) for at_step in zip(*(values for _, values in series), strict=True)]
        lines.append(Line(LABELS[case], series[0][0], values))
    return Lines(title, "optimizer step", "eval loss (nats)", lines)
