"""A document longer than what the model sees (ours): trained in three ways, and asked with three memories."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.report import Section

from .cases import EVALUATED, Case, scored
from .draw import Drawn
from .logs import last, logged, said
from .needle import PLACES
from .plots import BLUE, bars, columns, grid, line, save
from .scales import MDLM, MEMDLM, Model, Scale
from .scores import DOCUMENTS, PlantedWords

#: Ways to train for documents that are longer than what a model sees: the recipe, and what differs in it.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "MDLM": (MDLM, {}),
    "MemDLM, φ on the response": (
        "response",
        {"memory.source": "response", "memory.strategy": "anchor_consistent", "memory.steps": 2},
    ),
    "MemDLM, φ on the prompt": (MEMDLM, {}),
}
#: The memory in place when a model is asked.
WHOSE = {"none": "none", "other": "another text's", "own": "its own"}


def cases(scale: Scale) -> Iterator[Case]:
    read = partial(logged, keys=(*EVALUATED, "eval_prompt_nll"))
    for seed in scale.seeds:
        for way, (method, changes) in reversed(WAYS.items()):  # the last trains longest
            run, labels = scale.run(scale.documents, method, seed, **changes), {"way": way, "seed": seed}
            yield Case(labels, run, read)
            for whose in WHOSE:
                yield scored(DOCUMENTS[scale.name], scale, {**labels, "whose": whose}, Model.of(run), whose)


class Variant(NamedTuple):
    """A memory of prompts that differs from the recipe's."""

    backbone: str  #: by its recipe
    asked: PlantedWords  #: of texts as it is trained on
    changes: dict[str, Any]

    @classmethod
    def of(cls, **memory: Any) -> Variant:
        return cls("llada_moe", PlantedWords((40,)), {f"memory.{key}": value for key, value in memory.items()})

    @classmethod
    def longer(cls, words: int, tokens: int) -> Variant:
        """Texts of so many words, for which the longest example has room."""
        changes = {"data.dataset": f"data/needles-{words}.jsonl", "data.max_length": tokens}
        return cls("llada_moe", PlantedWords((words,)), changes)

    @classmethod
    def fewer(cls, planted: int, visible: int) -> Variant:
        """So many words planted. The question is shorter by two tokens a word, so less is seen in all."""
        changes = {"data.dataset": f"data/needles-40-{planted}.jsonl", "data.visible": visible}
        return cls("llada_moe", PlantedWords((40,), planted), changes)


#: How far it goes; the same numbers of tokens are seen of all texts.
FURTHER = {
    "the recipe: three windows of 30": Variant.of(),
    "texts twice as long: six windows": Variant.longer(80, 256),
    "texts four times as long: eleven windows": Variant.longer(160, 512),
    "texts 5.5 times as long: sixteen windows": Variant.longer(220, 768),
    "four words planted": Variant.fewer(4, 48),
    "two words planted": Variant.fewer(2, 44),
    "two windows of 45": Variant.of(window=45),
    "six windows of 15": Variant.of(window=15),
    "K = 2, half of the tokens masked": Variant.of(steps=2),
    "anchor_consistent: not every token": Variant.of(strategy="anchor_consistent"),
    "inner lr 0.3": Variant.of(inner_lr=0.3),
    "inner lr 3": Variant.of(inner_lr=3.0),
    "fast weights in all layers": Variant.of(layer_fraction=1.0),
    "no loss of prompts": Variant.of(prompt_loss=0.0),
    "LLaDA2.1": Variant("llada2", PlantedWords((40,)), {}),
}
#: Of a variant: one evaluation, at the end.
ONCE = {"training.eval_on_start": False, "training.eval_steps": 250}


def further(scale: Scale) -> Iterator[Case]:
    read = partial(logged, keys=(*EVALUATED, "eval_prompt_nll"))
    for seed in scale.seeds:
        for label, (backbone, asked, changes) in FURTHER.items():
            bases = f"cpu/{backbone}_words", f"documents/{backbone}_base"
            model = scale.documents._replace(recipe=f"documents/{backbone}", base=bases)
            changed = {**changes, **ONCE} if changes else {}
            run = scale.run(model, "variant" if changes else MEMDLM, seed, **changed)
            yield Case({"variant": label, "seed": seed}, run, read)
            for whose in ("other", "own"):
                labels = {"variant": label, "seed": seed, "whose": whose}
                yield scored(asked, scale, labels, Model.of(run), whose)


def draw_further(scale: Scale, points: pd.DataFrame, picture: Path) -> Drawn:
    figure, ((ax,),) = grid(1, 1, (5.5, 3.6))
    scores = {key: own for key, own in points[points.place.notna()].groupby(["variant", "whose", "place"])}
    rows, shown = [], []
    for label in FURTHER:
        own, other = scores[label, "own", "hidden"], scores[label, "other", "hidden"]
        shown.append(own.score)
        seen, nll = scores[label, "own", "visible"].score, last(points[points.variant == label], "eval_prompt_nll")
        rows.append([label, said(own.score, 1), said(other.score, 1), said(own.nll, 2), said(seen, 1), said(nll, 2)])
    bars(ax, [*FURTHER], shown, BLUE)
    ax.set(xlabel="right answers about what the model does not see (%)", xlim=(0, 100))
    save(figure, picture)
    titles = ["trained with", "not seen, % right", "by another text's memory", "not seen, nats a word", "seen, % right"]
    return Drawn(
        [
            "The first row is the last one of the documents' table. Every other changes what it names, in training and "
            f"in use. Asked: {DOCUMENTS[scale.name].asked(scale)}, of the kind that it was trained on. "
            "A guess is right in 8.3 %, at 2.48 nats.",
        ],
        [Section("Mean ± standard deviation over the seeds", [*titles, "prompt NLL"], rows=rows)],
        "Right answers about what the model does not see, from its own memory. Whiskers: a standard deviation.",
    )


#: The curves of the picture of documents: of the model that writes on prompts, and of plain MDLM.
OF_DOCUMENTS = {
    "MDLM": ("MDLM", "eval_loss"),
    "φ discarded": ("MemDLM, φ on the prompt", "eval_loss_memory_off"),
    "φ of another text": ("MemDLM, φ on the prompt", "eval_loss_memory_other"),
    "φ of its own text": ("MemDLM, φ on the prompt", "eval_loss_memory_prompt"),
}


def draw(scale: Scale, points: pd.DataFrame, picture: Path) -> Drawn:
    figure, axes = grid(1, 3)
    asked, rows = points[points.place.notna()], []
    for ax, place in zip(axes[0], PLACES, strict=False):
        title = "what the model sees" if place == "visible" else "what it does not see"
        ax.set(title=f"Words of {title}", ylabel="right answers (%)", ylim=(0, 105))
        scores = {key: own.score for key, own in asked[asked.place == place].groupby(["way", "whose"])}
        columns(ax, {way: {f"memory: {name}": scores[way, key] for key, name in WHOSE.items()} for way in WAYS})
    for label, (way, key) in OF_DOCUMENTS.items():
        line(axes[0][2], points[(points.way == way) & (points.loss == key)], "step", "value", label)
    axes[0][2].set(title="Eval loss of responses", xlabel="optimizer step", ylabel="loss (nats)")
    save(figure, picture)
    for way in WAYS:
        trained = points[points.way == way]
        for whose, name in WHOSE.items():
            scores = trained[trained.whose == whose]
            cells = [(scores[scores.place == place], value) for value in ("score", "nll") for place in PLACES]
            prompt = said(last(trained, "eval_prompt_nll"), 2) if whose == "none" else ""
            rows.append([way, name, *(said(own[value], 1 if value == "score" else 2) for own, value in cells), prompt])
    titles = ["trained", "memory", "seen, % right", "not seen, % right", "seen, nats a word", "not seen, nats a word"]
    return Drawn(
        [
            f"{scale.documents.title}, fine-tuned on texts of which it sees about half, and the question. A memory is "
            "written on three windows, together the whole prompt, and is in place while the answer is decoded. "
            "All three have the loss of prompts, and are asked with the memory of their own recipe.",
            f"Asked: {DOCUMENTS[scale.name].asked(scale)}. A word has twelve values: who guesses is right in 8.3 %, at "
            "2.48 nats. A memory of another text is the control: what it gains is not remembered.",
        ],
        [Section("Mean ± standard deviation over the seeds", [*titles, "prompt NLL"], rows=rows)],
        "Right answers about what the model sees and what it does not, by the memory in place; and the loss of "
        "responses while training. Whiskers and band: a standard deviation over the seeds.",
    )
