"""Three sizes to reproduce the paper at: which models are trained from what, with which seeds, and how.

`paper` trains the paper's backbones from the hub, with the recipes of its runs. `cpu` does the same with models of 0.6
and 0.7 million parameters that it first trains itself, `small` with one of 135 million that a package ships.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

from dllm_memdlm.training.recipe import load_recipe, resolve

from .commands import Command
from .demo import RECIPE_FOLDER
from .reporting import MDLM_SUFFIX

#: The two methods, by the name of their runs.
MDLM, MEMDLM = "mdlm", "memdlm"

#: The models that are compared: the method they were trained with, and whether they adapt to what they are asked.
CASES = {"MDLM": (MDLM, False), "MemDLM, memory off": (MEMDLM, False), "MemDLM, memory on": (MEMDLM, True)}


@dataclass(frozen=True)
class Backbone:
    """A model that is fine-tuned with and without memory."""

    title: str
    recipe: str  #: MemDLM's, in the recipe folder, without .yaml
    base: str | None = None  #: the recipe that trains the weights to start from; none takes what `recipe` names
    convert: str | None = None  #: the module that writes the weights which `base` starts from; none is from scratch

    @property
    def key(self) -> str:
        """A short name, for folders."""
        return Path(self.recipe).name


class Model(NamedTuple):
    """A model to be scored."""

    pretrained: str  #: folder or hub name
    scores: Path  #: the folder for its scores
    made_by: tuple[Command, ...]  #: the run that trains it; none where it is taken as it is

    @classmethod
    def of(cls, run: Command) -> Model:
        """What a run has trained."""
        return cls(str(run.folder), run.folder.parent / "scores" / run.folder.name, (run,))


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What is run at one size, and where to."""

    name: str
    about: str  #: what it can show, and what it cannot
    backbones: tuple[Backbone, ...]
    seeds: tuple[int, ...]
    launch: tuple[str, ...]  #: what stands before a recipe on the command line
    at_once: int  #: commands at a time
    questions: int  #: held-out texts of each length, or examples, that our own evaluations score a model on
    harness: tuple[str, ...] = ("-m", "dllm_memdlm.evaluate", "run")  #: what stands before lm-eval's arguments
    model_args: tuple[str, ...] = ()  #: how a trained model is loaded, as lm-eval's model takes it
    env: Mapping[str, str] = field(default_factory=dict)
    settings: tuple[str, ...] = ()  #: overrides of every recipe
    shorter: Mapping[str, Any] = field(default_factory=dict)  #: what ablations change in all of their recipes
    runs: Path = Path("runs/reproduce")

    def bases(self, backbones: Sequence[Backbone]) -> list[list[Command]]:
        """The stages that make the weights to start from."""
        converted = [self._converted(b) for b in backbones if b.convert]
        trained = [self.base(b) for b in backbones if b.base]
        return [stage for stage in (converted, trained) if stage]

    def base(self, backbone: Backbone) -> Command:
        """Train the weights that fine-tuning starts from."""
        before = (self._converted(backbone),) if backbone.convert else ()
        start = [f"model.path={command.folder / 'model'}" for command in before]
        return self._trained(f"{backbone.key}/base", backbone.base, [*start, *self.settings], before)

    def run(
        self, backbone: Backbone, method: str, seed: int, changes: Mapping[str, Any] | None = None, prefix: str = ""
    ) -> Command:
        """Fine-tune: `method` is MDLM, MEMDLM, or the name of a variant of MemDLM, with `changes` in its recipe.

        `prefix` keeps runs of one method apart that differ in their changes.
        """
        before = (self.base(backbone),) if backbone.base else ()
        start = [f"model.path={command.folder}" for command in before]
        recipe = backbone.recipe + (MDLM_SUFFIX if method == MDLM else "")
        overrides = [*start, *_overrides(changes or {}), *self.settings, f"training.seed={seed}"]
        return self._trained(f"{backbone.key}/{prefix}{method}-{seed}", recipe, overrides, before)

    def pairs(self, backbones: Sequence[Backbone]) -> list[Command]:
        """Both methods on each backbone, seeds outermost, so that what is there early is a whole set."""
        return [self.run(b, method, seed) for seed in self.seeds for b in backbones for method in (MDLM, MEMDLM)]

    def cases(self, backbones: Sequence[Backbone]) -> Iterator[tuple[Backbone, str, int, Model, bool]]:
        """The models that are compared, in the order of `pairs`: backbone, label, seed, model, memory at inference."""
        for seed in self.seeds:
            for backbone in backbones:
                for label, (method, memory) in CASES.items():
                    yield backbone, label, seed, Model.of(self.run(backbone, method, seed)), memory

    def scratch(self, backbone: Backbone, case: str, seed: int, changes: Mapping[str, Any]) -> Command:
        """Train the base anew, with `changes` in its recipe."""
        overrides = [*_overrides(changes), *self.settings, f"training.seed={seed}"]
        return self._trained(f"{backbone.key}/scratch-{case}-{seed}", backbone.base, overrides)

    def untuned(self, backbone: Backbone) -> Model:
        """The model before fine-tuning."""
        scores = self.runs / self.name / backbone.key / "scores" / "untuned"
        if backbone.base:
            return Model(str(self.base(backbone).folder), scores, (self.base(backbone),))
        return Model(resolve(RECIPE_FOLDER / f"{backbone.recipe}.yaml")["model"]["path"], scores, ())

    def evaluated(self, name: str, model: Model, module: str, arguments: Sequence[str]) -> Command:
        """Run one of our evaluations on a model; it writes `scores.json`."""
        output = ("--output", str(model.scores / name / "scores.json"))
        argv = ("-m", module, "--model", model.pretrained, *self.model_args, *arguments, *output)
        return Command(model.scores / name, argv, after=model.made_by, env=self.env)

    def _converted(self, backbone: Backbone) -> Command:
        folder = self.runs / self.name / backbone.key / "converted"
        return Command(folder, ("-m", backbone.convert, "--output", str(folder / "model")), env=self.env)

    def _trained(self, name: str, recipe: str, overrides: Sequence[str], before: tuple[Command, ...] = ()) -> Command:
        folder, path = self.runs / self.name / name, RECIPE_FOLDER / f"{recipe}.yaml"
        overrides = [*overrides, f"training.output_dir={folder}"]
        argv = (*self.launch, os.path.relpath(path), *overrides, "--resume")
        return Command(folder, argv, _keys_of(path, tuple(overrides)), before, self.env, resumes=True)


@cache
def _keys_of(recipe: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Every setting of a run, by its dotted name. Raises ConfigError for one that no recipe takes."""
    load_recipe(recipe, overrides)
    return dict(flat(resolve(recipe, overrides)))


def differences(recipe: Path) -> dict[str, Any]:
    """What a recipe that extends another says itself: {"memory.steps": 3}."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return dict(flat({section: values for section, values in content.items() if section != "extends"}))


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as pairs of a dotted key and a value."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _overrides(changes: Mapping[str, Any]) -> list[str]:
    """Changes of a recipe as the command line takes them: values in one line of YAML."""
    written = {key: yaml.safe_dump(value, default_flow_style=True, width=1000) for key, value in changes.items()}
    return [
        f"{key}={text.splitlines()[0]}" for key, text in written.items()
    ]  # a plain value is followed by a line "..."


_TRAIN = ("-m", "dllm_memdlm.train")
#: A process for each GPU. Quiet, as the training itself says what is wrong.
_LAUNCH = ("-m", "accelerate.commands.launch", "--quiet")

SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="cpu",
            about="Models of 0.7 (LLaDA-MoE) and 0.6 million parameters (LLaDA2.1), trained here to find eight words "
            "planted in a short text, and then fine-tuned to find them in longer ones; the inner loop is the paper's. "
            "This shows that the method runs as described and which way it moves such models. It cannot say how models "
            "of billions of parameters fare, on natural tasks, or at the paper's lengths.",
            backbones=(
                Backbone("LLaDA-MoE", "cpu/llada_moe", "cpu/llada_moe_base"),
                Backbone("LLaDA2.1", "cpu/llada2", "cpu/llada2_base"),
            ),
            seeds=(42, 43, 44),
            launch=_TRAIN,
            # One thread each, as more bring little at this size; and the same numbers for any count of them.
            at_once=max(1, min(os.cpu_count() or 1, psutil.virtual_memory().available // 2**31)),
            questions=40,
            # Eighty-one runs: half as many steps, and one evaluation, at the end.
            shorter={"training.max_steps": 50, "training.eval_steps": 50, "training.eval_on_start": False},
            env={"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        ),
        Scale(
            name="small",
            about="SmolLM2-135M, a causal model, adapted to masked diffusion, then fine-tuned on HotpotQA with all ten "
            "paragraphs of a question (1,500 tokens on average). A real pretrained model and real text, but fifty "
            "times smaller than the paper's, and adapted for minutes only.",
            backbones=(Backbone("SmolLM2-135M", "small/smollm2", "small/smollm2_base", "reproduce.smollm2"),),
            seeds=(42,),
            launch=(*_LAUNCH, *_TRAIN),
            harness=(*_LAUNCH, "-m", "dllm_memdlm.evaluate", "run", "--batch_size", "auto"),
            at_once=1,
            # The loss without fast weights is logged for one batch, the other as the mean since the last log
            settings=("training.logging_steps=1",),
            questions=200,
        ),
        Scale(
            name="paper",
            about="The paper's models, data and settings.",
            model_args=("load_in_4bit=true",),
            backbones=(Backbone("LLaDA-MoE", "llada_moe"), Backbone("LLaDA2.1", "llada2_mini")),
            seeds=(42,),
            launch=(*_LAUNCH, *_TRAIN),
            harness=(*_LAUNCH, "-m", "dllm_memdlm.evaluate", "run", "--batch_size", "auto"),
            at_once=1,
            # The loss without fast weights is logged for one batch, the other as the mean since the last log
            settings=("training.logging_steps=1",),
            questions=500,
        ),
    )
}
