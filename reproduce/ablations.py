"""The ablations of LLaDA-MoE (figures 5 to 10, and two settings of the text), and memory dropout, which is ours.

Every variant is MemDLM but for what its file in recipes/ablations says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from .charts import BLUE, LIGHT, ORANGE, Bar, Bars, Spread, draw_bars, spread
from .commands import Command
from .curves import final, over_seeds
from .demo import RECIPE_FOLDER
from .page import Grid, Page
from .paper import ABLATIONS, Variant
from .reporting import load_run
from .scales import MDLM, MEMDLM, Model, Scale, differences
from .scores import ABLATED, mean_score, without_memory

#: The score of MDLM in the paper, from which the others are drawn.
PAPERS_MDLM = next(v.score for group in ABLATIONS.values() for v in group if v.method == MDLM)


@cache
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
        about=[scale.about, *_about(scale, points), *without_memory(stages(scale)[-1])],
        points=points,
        pictures={
            "ablations.png": "How far the paper's scores, ours, and the eval losses are from MDLM's of the same seed. "
            "Whiskers: a standard deviation."
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


def _by_seed(points: list[dict[str, Any]], method: str, key: str) -> dict[int, float]:
    return {point["seed"]: point[key] for point in points if point["method"] == method}


def _less(points: list[dict[str, Any]], one: str, key: str, other: str, its_key: str) -> dict[int, float]:
    """A number of one variant less that of another, seed by seed."""
    base = _by_seed(points, other, its_key)
    return {seed: value - base[seed] for seed, value in _by_seed(points, one, key).items()}


def _against_mdlm(points: list[dict[str, Any]], method: str, key: str) -> Spread:
    return spread([*_less(points, method, key, MDLM, "eval_loss").values()])


def _panels(scale: Scale, title: str, group: tuple[Variant, ...], points: list[dict[str, Any]]) -> list[Bars]:
    """How far the paper's scores, ours, and the eval losses are from MDLM's."""

    def bars(color: str, value: Callable[[Variant], Spread | None]) -> list[Bar]:
        return [Bar(variant.label, value(variant), color) for variant in group]

    def papers(variant: Variant) -> Spread | None:
        return None if variant.score is None else Spread(variant.score - PAPERS_MDLM, None)

    def ours(key: str, mdlms: str, unit: float = 1.0) -> Callable[[Variant], Spread]:
        return lambda v: spread([value / unit for value in _less(points, v.method, key, MDLM, mdlms).values()])

    asked = ", ".join(ABLATED[scale.name].columns)
    off, in_place = (ours(key, "eval_loss", unit=1e-3) for key in ("eval_loss_memory_off", "eval_loss"))
    there = any(variant.score is not None for variant in group)
    return [
        Bars(title, "the paper: BABILong-1K − MDLM's (points)" if there else "not in the paper", bars(LIGHT, papers)),
        Bars("", f"ours: {asked} − MDLM's (points)", bars(BLUE, ours("score", "score"))),
        Bars("", "eval loss − MDLM's, φ discarded (10⁻³ nats)", bars(ORANGE, off)),
        Bars("", "eval loss − MDLM's, φ in place (10⁻³ nats)", bars(BLUE, in_place)),
    ]


def _row(variant: Variant, points: list[dict[str, Any]]) -> tuple[str, ...]:
    keys = ("eval_loss_memory_off", "eval_loss")
    losses = [_against_mdlm(points, variant.method, key).text(4, sign=True) for key in keys]
    if variant.method == MDLM:
        losses = ["-", "-"]
    paper = "-" if variant.score is None else f"{variant.score:.1f}"
    return variant.label, paper, over_seeds(points, "score", method=variant.method).text(1), *losses


def _about(scale: Scale, points: list[dict[str, Any]]) -> list[str]:
    """What was run, how far the clips bind, and for each group of variants whether the paper's order is seen."""
    task, backbone = ABLATED[scale.name], scale.backbones[0]
    steps = f" in {scale.shorter['training.max_steps']} steps" if scale.shorter else ""
    norms = [norm for seed in scale.seeds for norm in _inner_norms(scale, seed)]
    return [
        f"{backbone.title}, fine-tuned{steps} from the same weights for each variant and seed; scored on "
        f"{task.asked(scale)} ({', '.join(task.columns)}), those trained with memory with it on, and by the loss on "
        "held-out examples, compared with MDLM's of the same seed, which saw the same examples under the same masks.",
        f"The gradients of MemDLM's inner steps have a norm of {median(norms):.2g} in the median and at most "
        f"{max(norms):.2g}, all fast weights of a sample together, in the mean of a batch. Only what is above a clip "
        "is clipped.",
        *["The models have four layers, so 5, 10 and 25 % of them are all the last one."] * (scale.name == "cpu"),
        *(f"{title}: {_agreement(group, points)}" for title, group in ABLATIONS.items()),
    ]


def _inner_norms(scale: Scale, seed: int) -> list[float]:
    run = load_run(MEMDLM, _run(scale, MEMDLM, seed).folder)
    return [norm for step in (1, 2) for norm in run.series(f"inner_grad_norm_{step}")[1]]


def _agreement(group: tuple[Variant, ...], points: list[dict[str, Any]]) -> str:
    """Whether our scores put the variants on the same side of the default as the paper's do; and what the loss says."""
    rated = [variant for variant in group if variant.score is not None]
    default = next((variant for variant in rated if variant.method == MEMDLM), None)
    if default is None:
        return "not in the paper."
    others = [variant for variant in rated if variant is not default]
    scores = "; ".join(_verdict(default, variant, points) for variant in others)
    return f"{scores}. By the loss with φ in place {default.label} is {_by_loss(default, others, points)}."


def _by_loss(default: Variant, others: Sequence[Variant], points: list[dict[str, Any]]) -> str:
    """Which variants the default is better than in every seed, and than which it is worse in every seed."""
    found: dict[str, list[str]] = {"better than": [], "worse than": []}
    for variant in others:
        leads = _less(points, MEMDLM, "eval_loss", variant.method, "eval_loss").values()
        for word, sign in (("better than", -1), ("worse than", 1)):
            if all(sign * lead > 0 for lead in leads):
                found[word].append(variant.label)
    said = [f"{word} {'; '.join(labels)} in every seed" for word, labels in found.items() if labels]
    return " and ".join(said) or "neither better nor worse than any in every seed"


def _verdict(default: Variant, variant: Variant, points: list[dict[str, Any]]) -> str:
    """The default's lead over a variant, ours and the paper's, and whether the seeds agree on its sign."""
    leads = [*_less(points, MEMDLM, "score", variant.method, "score").values()]
    printed = default.score - variant.score
    text = f"{default.label} − {variant.label} = {spread(leads).text(1, sign=True)} (the paper {printed:+.1f})"
    if _by_seed(points, MEMDLM, "eval_loss") == _by_seed(points, variant.method, "eval_loss"):
        return f"{text}, the very same in every run"
    if len(leads) == 1:
        return text
    signs = {(lead > 0) - (lead < 0) for lead in leads}
    if len(signs) > 1 or 0 in signs:
        return f"{text}, the seeds do not agree"
    agrees = "as in the paper" if (leads[0] > 0) == (printed > 0) else "unlike the paper"
    return f"{text}, {agrees} in all {len(leads)} seeds"
