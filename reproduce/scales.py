"""The sizes to reproduce the paper at: which models are trained from what, with which seeds, and how.

`paper` trains the paper's backbones from the hub, with the recipes of its runs. `cpu` does the same with models of 0.6
and 0.7 million parameters that it first trains itself, `small` with one of 135 million that a package ships. `demo`,
with one of half a million, has documents alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

from .steps import FOLDER, Step

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

#: The two methods, by the name of their runs.
MDLM, MEMDLM = "mdlm", "memdlm"

#: The models that are compared: the method they were trained with, and whose memory they have when they are asked.
MODELS = {"MDLM": (MDLM, "none"), "MemDLM, memory off": (MEMDLM, "none"), "MemDLM, memory on": (MEMDLM, "own")}
#: With the control, where it can be had: what the memory of another text does as well is not remembered.
CONTROLLED = MODELS | {"MemDLM, another text's memory": (MEMDLM, "other")}
#: The paper's inner learning rate.
PAPER_RATE = 0.1


class Backbone(NamedTuple):
    """A model that is fine-tuned with and without memory."""

    title: str
    recipe: str  #: MemDLM's, in the recipe folder, without .yaml; plain MDLM's is called the same with _mdlm
    base: tuple[str, ...] = ()  #: recipes that train the weights to start from, in turn; none takes what `recipe` names
    convert: str | None = None  #: the module that writes the weights which the first starts from; none is from scratch

    @property
    def key(self) -> str:
        """A short name, for folders."""
        return Path(self.recipe).name


class Model(NamedTuple):
    """A model to be scored."""

    pretrained: str  #: folder or hub name
    folder: Path  #: for its scores
    after: tuple[Step, ...]  #: the run that trains it; none where it is taken as it is

    @classmethod
    def of(cls, run: Step) -> Model:
        """Return what a run has trained."""
        return cls(str(run.folder), run.folder, (run,))


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What is run at one size, and where to."""

    name: str
    about: str  #: what it can show, and what it cannot
    backbones: tuple[Backbone, ...]
    seeds: tuple[int, ...]
    documents: Backbone | None = None  #: that is trained on documents longer than what it sees
    launch: tuple[str, ...]  #: what stands before a recipe on the command line
    jobs: int  #: commands at a time
    questions: int  #: held-out texts of each length, or examples, that our own evaluations score a model on
    harness: tuple[str, ...] = ("-m", "dllm_memdlm.evaluate", "run")  #: what stands before lm-eval's arguments
    model_args: tuple[str, ...] = ()  #: how a trained model is loaded, as lm-eval's model takes it
    env: Mapping[str, str] = field(default_factory=dict)
    settings: tuple[str, ...] = ()  #: overrides of every recipe
    shorter: Mapping[str, Any] = field(default_factory=dict)  #: what ablations change in all of their recipes
    runs: Path = Path("runs/reproduce")

    def step(self, name: str | Path, argv: Sequence[str], made_from: Any, after: tuple[Step, ...] = ()) -> Step:
        """A step in a folder of this scale."""
        return Step.of(self.runs / self.name / name, argv, made_from, self.runs, after=after, env=self.env)

    def base(self, backbone: Backbone, seed: int | None = None, case: str = "base", **changes: Any) -> Step:
        """Train the weights that fine-tuning starts from; with a seed and changes, from scratch in another way."""
        start, before = (), ()
        if backbone.convert:
            argv = ("-m", backbone.convert, "--output", f"{FOLDER}/model")
            before = (self.step(f"{backbone.key}/converted", argv, backbone.convert),)
            start = (f"model.path={before[0].folder / 'model'}",)
        for recipe in backbone.base:
            step = self._trained(f"{backbone.key}/{case}", recipe, start, changes, seed, before)
            start, before = (f"model.path={step.folder}",), (step,)
        return step

    def run(self, backbone: Backbone, method: str, seed: int, **changes: Any) -> Step:
        """Fine-tune: `method` is MDLM, MEMDLM, or the name of a variant of MemDLM, with changes in its recipe."""
        before = (self.base(backbone),) if backbone.base else ()
        start = tuple(f"model.path={step.folder}" for step in before)
        recipe = backbone.recipe + "_mdlm" * (method == MDLM)
        return self._trained(f"{backbone.key}/{method}", recipe, start, changes, seed, before)

    def cases(
        self, backbones: Sequence[Backbone], models: Mapping[str, tuple[str, str]] = MODELS
    ) -> Iterator[tuple[dict[str, Any], Model, str]]:
        """The models that are compared: labels, model, memory at inference. Seeds outermost: early on, whole sets."""
        for seed in self.seeds:
            for backbone in backbones:
                for label, (method, whose) in models.items():
                    labels = {"backbone": backbone.title, "model": label, "seed": seed}
                    yield labels, Model.of(self.run(backbone, method, seed)), whose

    def rates(self, backbone: Backbone) -> tuple[float, ...]:
        """The inner learning rates that MemDLM is trained with: the recipe's, and the paper's where it is another."""
        memory = settings_of(RECIPES / f"{backbone.recipe}.yaml", self.settings)["memory"]
        return tuple(dict.fromkeys((memory.get("inner_lr", PAPER_RATE), PAPER_RATE)))

    def untuned(self, backbone: Backbone) -> Model:
        """The model before fine-tuning."""
        if backbone.base:
            return Model.of(self.base(backbone))
        recipe = yaml.safe_load((RECIPES / f"{backbone.recipe}.yaml").read_text(encoding="utf-8"))
        return Model(recipe["model"]["path"], self.runs / self.name / backbone.key / "untuned", ())

    def evaluated(self, name: str, model: Model, module: str, arguments: Sequence[str]) -> Step:
        """Run one of our evaluations on a model; it writes `scores.json`."""
        argv = ("-m", module, "--model", model.pretrained, *self.model_args, *arguments)
        output = ("--output", f"{FOLDER}/scores.json")
        return Step.of(model.folder / name, (*argv, *output), argv, self.runs, after=model.after, env=self.env)

    def _trained(self, name, recipe, start, changes, seed, before) -> Step:
        changes = {**changes, **({} if seed is None else {"training.seed": seed})}
        overrides = (*start, *(f"{key}={one_line(value)}" for key, value in changes.items()), *self.settings)
        path = RECIPES / f"{recipe}.yaml"
        argv = (*self.launch, os.path.relpath(path), *overrides, f"training.output_dir={FOLDER}", "--resume")
        name = name if seed is None else f"{name}-{seed}"
        return self.step(name, argv, settings_of(path, overrides), before)


@cache
def settings_of(recipe: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The composed recipe, but for where it writes to. Raises ConfigError for what no recipe takes."""
    from dllm_memdlm.training.recipe import load_recipe  # seconds to import

    values = load_recipe(recipe, overrides).values
    return {**values, "training": {key: value for key, value in values["training"].items() if key != "output_dir"}}


def differences(recipe: Path) -> dict[str, Any]:
    """Return what a recipe that extends another says itself: {"memory.steps": 3}."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    sections = {section: values for section, values in content.items() if section != "extends"}
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def one_line(value: Any) -> str:
    """A value as the command line takes it, in YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]  # a line "..." may follow


_TRAIN = ("-m", "dllm_memdlm.train")
#: A process for each GPU. Quiet, as the training itself says what is wrong.
_LAUNCH = ("-m", "accelerate.commands.launch", "--quiet")
_ON_GPUS: dict[str, Any] = {
    "launch": (*_LAUNCH, *_TRAIN),
    "harness": (*_LAUNCH, "-m", "dllm_memdlm.evaluate", "run", "--batch_size", "auto"),
    "seeds": (42,),
    "jobs": 1,
    # The loss without fast weights is logged for one batch, the other as the mean since the last log
    "settings": ("training.logging_steps=1",),
}

CPU = Scale(
    name="cpu",
    about="Models of 0.7 (LLaDA-MoE) and 0.6 million parameters (LLaDA2.1), trained here to find eight words planted "
    "in a short text and to denoise texts, and then fine-tuned to find the words in longer ones. This shows that the "
    "method runs as described and which way it moves such models. It cannot say how models of billions of parameters "
    "fare, on natural tasks, or at the paper's lengths.",
    backbones=(
        Backbone("LLaDA-MoE", "cpu/llada_moe", ("cpu/llada_moe_words", "cpu/llada_moe_base")),
        Backbone("LLaDA2.1", "cpu/llada2", ("cpu/llada2_words", "cpu/llada2_base")),
    ),
    documents=Backbone("LLaDA-MoE", "documents/llada_moe", ("cpu/llada_moe_words", "documents/llada_moe_base")),
    seeds=(42, 43, 44),
    launch=_TRAIN,
    # One thread each, as more bring little at this size; and the same numbers for any count of them.
    jobs=max(1, min(os.cpu_count() or 1, psutil.virtual_memory().available // 2**31)),
    questions=40,
    # Eighty-one runs: half as many steps, and one evaluation, at the end.
    shorter={"training.max_steps": 50, "training.eval_steps": 50, "training.eval_on_start": False},
    env={"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
)
DEMO = replace(
    CPU,
    name="demo",
    about="A model of half a million parameters, in minutes.",
    backbones=(),
    documents=Backbone(
        "A LLaDA-MoE of two layers", "documents/llada_moe", ("documents/demo_words", "documents/demo_base")
    ),
    seeds=(42,),
)
SMALL = Scale(
    name="small",
    about="SmolLM2-135M, a causal model, adapted to masked diffusion, then fine-tuned on HotpotQA with all ten "
    "paragraphs of a question (1,500 tokens on average). A real pretrained model and real text, but fifty times "
    "smaller than the paper's, and adapted for minutes only.",
    backbones=(Backbone("SmolLM2-135M", "small/smollm2", ("small/smollm2_base",), "reproduce.smollm2"),),
    documents=Backbone("SmolLM2-135M", "small/documents", ("small/documents_base",), "reproduce.smollm2"),
    questions=200,
    **_ON_GPUS,
)
PAPER = Scale(
    name="paper",
    about="The paper's models, data and settings.",
    backbones=(Backbone("LLaDA-MoE", "llada_moe"), Backbone("LLaDA2.1", "llada2_mini")),
    model_args=("load_in_4bit=true",),
    questions=500,
    **_ON_GPUS,
)
SCALES = {scale.name: scale for scale in (DEMO, CPU, SMALL, PAPER)}
