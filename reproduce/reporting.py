"""Training logs to numbers, a table, a plain-words reading and a figure. Nothing here trains or needs torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.table import Table

from .charts import DISCARDED, Line, Lines, draw_lines, spread

#: Baselines are named after the recipe they are compared with: tiny_llada2_mdlm.yaml is plain MDLM of tiny_llada2.yaml.
MDLM_SUFFIX = "_mdlm"
BACKBONES = {"tiny_llada_moe": "LLaDA-MoE", "tiny_llada2": "LLaDA2.1"}  #: by recipe; others are called as it is

#: What is drawn of each run, and its name in the logs.
SPLITS = {"train": "loss", "eval": "eval_loss"}

#: Losses nearer to each other than this share of MDLM's are called equal in the reading.
SAME = 0.005


@dataclass(frozen=True)
class Run:
    """One training run as its trainer state tells it. `log_history` rows are dicts with `step` and what was logged."""

    recipe: str
    path: Path
    log_history: list[dict[str, Any]]
    title: str | None = None  #: of the backbone; by default after the recipe

    @property
    def is_mdlm(self) -> bool:
        return self.recipe.endswith(MDLM_SUFFIX)

    @property
    def method(self) -> str:
        return "MDLM" if self.is_mdlm else "MemDLM"

    @property
    def backbone(self) -> str:
        stem = self.recipe.removesuffix(MDLM_SUFFIX)
        return self.title or BACKBONES.get(stem, stem)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one logged quantity."""
        rows = [(row["step"], row[key]) for row in self.log_history if key in row]
        return [step for step, _ in rows], [value for _, value in rows]


def read_state(run_dir: Path) -> dict[str, Any] | None:
    """The run's trainer_state.json, or None where there is no complete one."""
    try:
        return json.loads((run_dir / "trainer_state.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def is_finished(run_dir: Path, max_steps: int | None = None) -> bool:
    """Whether the run reached `max_steps`, by default the number it was started with."""
    state = read_state(run_dir)
    return state is not None and state["global_step"] >= (max_steps or state["max_steps"])


def load_run(recipe: str, run_dir: Path, title: str | None = None) -> Run:
    """The run of a recipe (its file name without .yaml) that was written to `run_dir`; `title` names its backbone."""
    state = read_state(run_dir)
    if state is None:
        raise FileNotFoundError(f"{run_dir}: no trainer_state.json, so the run did not finish")
    return Run(recipe, run_dir, state["log_history"], title)


def summarise(runs: list[Run]) -> list[dict[str, Any]]:
    """One row of numbers for each run; what a run did not log, or has no baseline for, is None. Losses in nats."""
    seconds = {run.recipe: _median(run.series("step_seconds")[1]) for run in runs}
    baselines = {run.backbone: seconds[run.recipe] for run in runs if run.is_mdlm}
    rows = []
    for run in runs:
        own, baseline = seconds[run.recipe], baselines.get(run.backbone)
        row = {"recipe": run.recipe, "backbone": run.backbone, "method": run.method}
        row |= {key: tail_mean(run.series(key)[1]) for key in ("loss", "loss_memory_off")}
        row |= {key: _last(run.series(key)[1]) for key in ("eval_loss", "eval_loss_memory_off")}
        row |= {"step_seconds": own, "step_seconds_over_mdlm": own / baseline if own and baseline else None}
        row |= {"steps": max((log["step"] for log in run.log_history), default=0), "path": str(run.path)}
        rows.append(row)
    return rows


def tail_mean(values: list[float]) -> float | None:
    """The mean of the last tenth, at least of one value: single training losses are noisy."""
    return fmean(values[-math.ceil(len(values) / 10) :]) if values else None


def _last(values: list[float]) -> float | None:
    return values[-1] if values else None


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def summary_table(rows: list[dict[str, Any]]) -> Table:
    """The summary for a terminal. MDLM has no fast weights: its eval loss stands in the column without them."""
    table = Table(title="Losses in nats", caption="φ: the fast weights. Compare methods in the column without φ.")
    for name in ("backbone", "method"):
        table.add_column(name)
    for name in ("train loss", "eval, φ", "eval, no φ", "s/step", "× MDLM"):
        table.add_column(name, justify="right")
    for row in rows:
        with_phi, without_phi = row["eval_loss"], row["eval_loss_memory_off"]
        if row["method"] == "MDLM":
            with_phi, without_phi = None, row["eval_loss"]
        numbers = (row["loss"], with_phi, without_phi, row["step_seconds"], row["step_seconds_over_mdlm"])
        cells = ("-" if n is None else f"{n:.{d}f}" for n, d in zip(numbers, (3, 3, 3, 2, 2), strict=True))
        table.add_row(row["backbone"], row["method"], *cells)
    return table


def reading(rows: list[dict[str, Any]]) -> str:
    """What the numbers say, in one paragraph; backbones without both methods are left out."""
    sentences = []
    for backbone in dict.fromkeys(row["backbone"] for row in rows):
        pair = {row["method"]: row for row in rows if row["backbone"] == backbone}
        if pair.keys() == {"MDLM", "MemDLM"} and None not in (pair["MDLM"]["eval_loss"], pair["MemDLM"]["eval_loss"]):
            sentences += _compare(backbone, pair["MDLM"], pair["MemDLM"])
    if not sentences:
        return "No backbone was trained with both methods and evaluated, so there is nothing to compare."
    caution = (
        "Fast weights are fitted to the very tokens that are then scored, so only the losses without them compare the "
        "methods. This is one run for each; other seeds will move these numbers."
    )
    return " ".join([*sentences, caution])


def _compare(backbone: str, mdlm: dict[str, Any], memdlm: dict[str, Any]) -> list[str]:
    base, on, off = mdlm["eval_loss"], memdlm["eval_loss"], memdlm["eval_loss_memory_off"]
    sentences = [f"{backbone}: with its fast weights MemDLM ends at an eval loss of {on:.3f}, {_against(on, base)}."]
    if off is not None:
        verdicts = {-1: "training with the memory helped", 0: "training with the memory made no difference"}
        verdict = verdicts.get(_sign(off, base), "the slow weights have come to rely on the memory")
        sentences.append(f"With the fast weights discarded it scores {off:.3f}, {_against(off, base)}: {verdict}.")
    if memdlm["step_seconds_over_mdlm"] is not None:
        sentences.append(f"A step takes {memdlm['step_seconds_over_mdlm']:.2f} times as long.")
    return sentences


def _sign(loss: float, base: float) -> int:
    """-1 where `loss` is lower than `base`, 1 where it is higher, 0 where the two are the same by SAME."""
    return 0 if abs(loss - base) <= SAME * base else (-1 if loss < base else 1)


def _against(loss: float, base: float) -> str:
    sign = _sign(loss, base)
    if sign == 0:
        return f"the same as MDLM's {base:.3f} within {SAME:.1%}"
    return f"{abs(loss - base):.3f} {'better' if sign < 0 else 'worse'} than MDLM's {base:.3f}"


def draw_curves(runs: list[Run], path: Path) -> None:
    """A PNG with a row for each backbone: train loss left, eval loss right; raw train losses faint, smoothed bold.

    Runs of one backbone and method are its seeds: their mean is drawn, in a band of a standard deviation to each side.
    """
    rows = []
    for backbone in dict.fromkeys(run.backbone for run in runs):
        own = [run for run in runs if run.backbone == backbone]
        rows.append([_losses(f"{backbone}, {name}", own, key) for name, key in SPLITS.items()])
    draw_lines(rows, path)


def _losses(title: str, runs: list[Run], key: str) -> Lines:
    """What `runs` of one backbone logged under `key` and, with the fast weights discarded, beside it."""
    mdlm, memdlm = ([run for run in runs if run.is_mdlm == which] for which in (True, False))
    curves = (("MDLM", mdlm, key), ("MemDLM", memdlm, key), (DISCARDED, memdlm, f"{key}_memory_off"))
    lines = [_line(label, [run.series(name) for run in own], noisy=key == "loss") for label, own, name in curves]
    return Lines(title, "optimizer step", "loss (nats)", [line for line in lines if line.places])


def _line(label: str, seeds: list[tuple[list[int], list[float]]], noisy: bool) -> Line:
    """The curve over the seeds, at the steps that all of them logged."""
    logged = [dict(zip(*series, strict=True)) for series in seeds]
    steps = [step for step in (logged[0] if logged else ()) if all(step in own for own in logged)]
    values = [[own[step] for step in steps] for own in logged]
    smoothed = [smooth(series) for series in values] if noisy else values
    raw = [fmean(at_step) for at_step in zip(*values, strict=True)] if noisy else []
    return Line(label, steps, [spread(at_step) for at_step in zip(*smoothed, strict=True)], raw)


def smooth(values: list[float]) -> list[float]:
    """The centred running mean over a tenth of the series; at its ends, over what is there."""
    half = len(values) // 20
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
