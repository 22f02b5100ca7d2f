"""The ablations of LLaDA-MoE (figures 5 to 10, and two settings of the text), and memory dropout, which is ours.

Every variant is MemDLM but for what its file in recipes/ablations says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..demo import RECIPE_FOLDER
from ..reporting import load_run
from .bars import BASELINE, OURS, PAPERS, Bar, Panel, draw_bars
from .commands import Command
from .curves import Spread, final, spread
from .page import Grid, Page
from .paper import ABLATIONS, Variant
from .scales import MDLM, MEMDLM, Model, Scale, differences
from .scores import ABLATED, mean_score


def methods() -> dict[str, dict[str, Any]]:
    """What is trained, in order, and what each changes in MemDLM's recipe."""
    names = dict.fromkeys(variant.method for group in ABLATIONS.values() for variant in group)
    folder = RECIPE_FOLDER / "ablations"
    return {name: {} if name in (MDLM, MEMDLM) else differences(folder / f"{name}.yaml") for name in names}


def stages(scale: Scale) -> list[list[Command]]:
    """What has to be run."""
    runs, scores = [], []
    for method, seed in _cases(scale):
        runs.append(_run(scale, method, seed))
        scores.append(_score(scale, method, seed))
    return [*scale.bases(scale.backbones[:1]), runs, scores]


def page(scale: Scale, folder: Path) -> Page:
    """Draw ablations.png, and put the numbers beside it."""
    points = [_point(scale, method, seed) for method, seed in _cases(scale)]
    folder.mkdir(parents=True, exist_ok=True)
    draw_bars([_panels(scale, title, group, points) for title, group in ABLATIONS.items()], folder / "ablations.png")
    rows = [(title, *_row(variant, points)) for title, group in ABLATIONS.items() for variant in group]
    columns = (
        *("ablation", "variant", "the paper: BABILong-1K, %", "ours: retrieval, %"),
        *("eval loss, φ discarded, − MDLM's", "eval loss, φ in place, − MDLM's"),
    )
    return Page(
        name="ablations",
        title="Ablations (figures 5 to 10)",
        scale=scale.name,
        seeds=scale.seeds,
        about=[scale.about, *_about(scale, points)],
        points=points,
        pictures={
            "ablations.png": "The paper's scores, ours, and the eval loss against MDLM's. Bars: a standard deviation."
        },
        tables=[Grid("Mean ± standard deviation over the seeds; losses in nats, paired by seed", columns, rows)],
    ).made_by(command for stage in stages(scale) for command in stage)


def _cases(scale: Scale) -> Iterator[tuple[str, int]]:
    """Seeds outermost, so that what is there early is a whole set."""
    return ((method, seed) for seed in scale.seeds for method in methods())


def _run(scale: Scale, method: str, seed: int) -> Command:
    prefix = "ablation-" if scale.shorter else ""
    return scale.run(scale.backbones[0], method, seed, {**scale.shorter, **methods()[method]}, prefix)


def _score(scale: Scale, method: str, seed: int) -> Command:
    """Scored as in the paper: what was trained with memory has it at inference too."""
    return ABLATED[scale.name].command(scale, Model.of(_run(scale, method, seed)), memory=method != MDLM)


def _point(scale: Scale, method: str, seed: int) -> dict[str, Any]:
    """One run with its score (%) and its last eval losses (nats)."""
    command = _run(scale, method, seed)
    run = load_run(method, command.folder)
    score = mean_score(ABLATED[scale.name].read(_score(scale, method, seed)))
    loss = final(run, "eval_loss")
    off = loss if method == MDLM else final(run, "eval_loss_memory_off")
    point = {"method": method, "seed": seed, "run": str(command.folder), "score": score}
    return point | {"eval_loss": loss, "eval_loss_memory_off": off}


def _over_seeds(points: list[dict[str, Any]], method: str, key: str, against: str | None = None) -> Spread:
    """A number of one variant over its seeds; less that of MDLM with the same seed, if asked for."""
    own = {point["seed"]: point[key] for point in points if point["method"] == method}
    if against is not None:
        base = {point["seed"]: point[against] for point in points if point["method"] == MDLM}
        own = {seed: value - base[seed] for seed, value in own.items()}
    return spread([*own.values()])


def _panels(scale: Scale, title: str, group: tuple[Variant, ...], points: list[dict[str, Any]]) -> list[Panel]:
    """The paper's scores, ours, and how far the eval loss without fast weights is from MDLM's."""

    def bars(color: str, value: Any) -> list[Bar]:
        return [Bar(v.label, value(v), BASELINE if v.method == MDLM and color == OURS else color) for v in group]

    ours = bars(OURS, lambda v: _over_seeds(points, v.method, "score"))
    off = bars(OURS, lambda v: _over_seeds(points, v.method, "eval_loss_memory_off", "eval_loss"))
    papers = bars(PAPERS, lambda v: None if v.score is None else Spread(v.score, None, 1))
    return [
        Panel(title, "the paper: BABILong-1K, %", papers, zero=False),
        Panel("", f"ours: {', '.join(ABLATED[scale.name].columns)}, %", ours, zero=False),
        Panel("", "eval loss − MDLM's, φ discarded (nats)", off),
    ]


def _row(variant: Variant, points: list[dict[str, Any]]) -> tuple[str, ...]:
    def against(key: str) -> str:
        return _over_seeds(points, variant.method, key, "eval_loss").text(4, sign=True)

    paper = "-" if variant.score is None else f"{variant.score:.1f}"
    losses = ("-", "-") if variant.method == MDLM else (against("eval_loss_memory_off"), against("eval_loss"))
    return variant.label, paper, _over_seeds(points, variant.method, "score").text(1), *losses


def _about(scale: Scale, points: list[dict[str, Any]]) -> list[str]:
    """What was run, and for each group of variants whether the paper's order is seen."""
    task = ", ".join(ABLATED[scale.name].columns)
    steps = f" in {scale.shorter['training.max_steps']} steps" if scale.shorter else ""
    return [
        f"{scale.backbones[0].title}, fine-tuned{steps} from the same weights for each variant and seed; scored on "
        f"{task} ({scale.questions} texts that training has not seen), memory on, and by the loss on held-out "
        "examples. A loss is compared with MDLM's of the same seed, which saw the same examples under the same masks.",
        *(f"{title}: {_agreement(group, points)}" for title, group in ABLATIONS.items()),
    ]


def _agreement(group: tuple[Variant, ...], points: list[dict[str, Any]]) -> str:
    """Whether our scores put the variants on the same side of the default as the paper's do."""
    rated = [variant for variant in group if variant.score is not None]
    default = next((variant for variant in rated if variant.method == MEMDLM), None)
    if default is None:
        return "not in the paper."
    return "; ".join(_verdict(default, variant, points) for variant in rated if variant is not default) + "."


def _verdict(default: Variant, variant: Variant, points: list[dict[str, Any]]) -> str:
    ours, other = (_over_seeds(points, method, "score") for method in (MEMDLM, variant.method))
    gap, printed = ours.mean - other.mean, default.score - variant.score
    text = f"{default.label} − {variant.label} = {gap:+.1f} (paper {printed:+.1f})"
    losses = [{p["seed"]: p["eval_loss"] for p in points if p["method"] == m} for m in (MEMDLM, variant.method)]
    if losses[0] == losses[1]:
        return f"{text}, the same layers in a model of this depth"
    if abs(gap) <= max(ours.stdev or 0, other.stdev or 0):
        return f"{text}, within the spread of the seeds"
    return f"{text}, {'the paper has the same sign' if gap * printed > 0 else 'the paper has the other sign'}"
