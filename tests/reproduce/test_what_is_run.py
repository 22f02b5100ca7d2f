"""What is run and scored at each scale: variants and their recipes, commands and their folders, the paper's tables."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from data_files import message_of

from dllm_memdlm.training.recipe import load_recipe, resolve
from reproduce.cases import PAPER, variants
from reproduce.figures import FIGURES
from reproduce.scales import MDLM, MEMDLM, RECIPES, SCALES, Model, differences
from reproduce.scores import ABLATED, ANCHORED, RETRIEVAL, RULER_OFFLINE, TABLES, Harness, PlantedWords, without_memory
from reproduce.steps import Step, in_order

VARIANTS = [variant for group in PAPER["ablations"].values() for variant in group]
FILES = sorted((RECIPES / "ablations").glob("*.yaml"))
GROUPS = (*RETRIEVAL.values(), *ANCHORED.values(), *TABLES.values(), RULER_OFFLINE.values(), ABLATED.values())
TASKS = dict.fromkeys(itertools.chain(*GROUPS))
CPU = replace(SCALES["cpu"], seeds=(1, 2))
EVERYWHERE = [(name, size) for name, figure in FIGURES.items() for size in figure.scales]


@functools.cache
def steps_of(target: str, size: str) -> list[Step]:
    return in_order(case.step for case in FIGURES[target].cases(replace(SCALES[size], seeds=(1,))))


def settings(path: Path, *overrides: str) -> dict:
    values = yaml.safe_load(load_recipe(path, overrides).to_yaml())
    values["training"].pop("output_dir", None)
    return {f"{section}.{key}": value for section, own in values.items() for key, value in own.items()}


def test_every_variant_has_a_recipe_and_the_default_is_in_every_group():
    assert [path.stem for path in FILES] == sorted({method for _, method, _ in VARIANTS} - {MDLM, MEMDLM})
    assert list(variants()) == list(dict.fromkeys(method for _, method, _ in VARIANTS))
    assert {score for _, method, score in VARIANTS if method == MEMDLM} == {68.4, None}
    for title, group in PAPER["ablations"].items():
        labels, methods, scores = zip(*group, strict=True)
        assert len({score is not None for score in scores}) == 1, f"{title}: either the paper's or ours"
        assert methods.count(MEMDLM) == 1 and len(set(labels)) == len(group)


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_variant_is_memdlm_but_for_what_its_file_says(path):
    said, default = differences(path), settings(RECIPES / "llada_moe.yaml")
    assert said == variants()[path.stem] and any(default[key] != value for key, value in said.items())
    assert settings(path) == default | said
    scale = SCALES["paper"]
    argv = scale.run(scale.backbones[0], path.stem, 7, **said).argv
    recipe = next(word for word in argv if word.endswith(".yaml"))
    overrides = [word for word in argv[argv.index(recipe) + 1 :] if "=" in word]
    assert settings(recipe, *overrides) == default | said | {"training.seed": 7, "training.logging_steps": 1}


@pytest.mark.parametrize("recipe", ["cpu/llada_moe", "cpu/llada2", "small/smollm2"])
def test_before_and_after_fine_tuning_a_model_is_asked_the_same(recipe):
    """Questions come from the rows behind those that a run evaluates on; those must be the same ones."""
    tuned, base = (resolve(RECIPES / f"{name}.yaml")["data"] for name in (recipe, f"{recipe}_base"))
    for name in ("eval_split", "eval_fraction", "eval_size"):
        assert base.get(name) == tuned.get(name), name


@pytest.mark.parametrize(("target", "size"), EVERYWHERE)
def test_a_command_comes_after_those_whose_folders_it_reads(target, size):
    made: dict[str, Step] = {}
    for step in steps_of(target, size):
        words = {word for argument in step.argv for word in re.split("[=,]", argument)}
        read = {folder for folder in made if words & {folder, f"{folder}/model"}}
        assert {made[folder] for folder in read} == set(step.after)
        assert str(step.folder) not in made
        assert any(str(step.folder) in word for word in step.argv)
        made[str(step.folder)] = step


@pytest.mark.parametrize("size", FIGURES["figure3"].scales)
def test_figures_share_their_commands(size):
    """What figure 7 has for the default ratio is figure 3's, and both score the models of figure 4."""
    shown, ratios, trained = (set(steps_of(f"figure{n}", size)) for n in (3, 7, 4))
    rates = {own for own in trained if "paper_rate" in own.folder.name}
    assert trained - rates < shown
    default = {own for own in ratios - trained if "memory_anchor_ratio" not in own.line}
    assert default < shown and len(default) == len(ANCHORED[size]) * (2 if size == "cpu" else 1)
    for backbone in SCALES[size].backbones:
        assert load_recipe(RECIPES / f"{backbone.recipe}.yaml").memory.anchor_ratio == PAPER["anchor_ratios"][0]


def test_every_setting_makes_another_run_and_nothing_else_does():
    base = CPU.backbones[0]
    runs = [CPU.run(base, method, seed) for method in (MDLM, MEMDLM) for seed in (1, 2)]
    runs += [CPU.run(base, MEMDLM, 1, **{"memory.rank": 3}), CPU.base(base), CPU.base(base, 1, "scratch")]
    runs += [replace(CPU, settings=("memory.inner_lr=1",)).run(base, MEMDLM, 1)]
    assert len({run.folder for run in runs}) == len(runs)
    again = replace(CPU, jobs=7, questions=3, runs=Path("elsewhere")).run(base, MDLM, 1)
    assert again.folder.name == runs[0].folder.name
    other = replace(CPU, settings=("model.dimensions.num_experts=8",))
    assert other.run(base, MDLM, 1).folder.name != runs[0].folder.name, "its base is another one"
    recipes = [next(word for word in run.argv if word.endswith(".yaml")) for run in (runs[0], runs[2])]
    assert [load_recipe(recipe).memory.enabled for recipe in recipes] == [False, True]


def test_every_way_to_score_a_model_has_a_folder_of_its_own():
    tasks = {*TASKS, PlantedWords((40,)), PlantedWords((40,), 4), Harness("ruler", (), "[4096]")}
    changes = ([], ["memory_anchor_ratio=0.3"], ["temperature=0.3", "steps=4"])
    models = [Model.of(CPU.run(CPU.backbones[0], method, 1)) for method in (MDLM, MEMDLM)]
    models += [CPU.untuned(backbone) for backbone in CPU.backbones]
    lines = {}
    for model, task, whose, chosen in itertools.product(models, tasks, ("none", "own"), changes):
        step = task.step(CPU, model, whose, *chosen)
        assert lines.setdefault(step.folder, step.line) == step.line
        assert step.folder.parent == model.folder and all(word in step.line for word in (model.pretrained, *chosen))
        assert (whose == "own") == ("own" in step.argv or "memory=true" in step.line)
    asked = {(task.config, task.lengths) if isinstance(task, Harness) else task for task in tasks}
    assert len(lines) == len(models) * len(asked) * 2 * len(changes)
    model = models[0]
    assert replace(CPU, questions=3).evaluated("x", model, "m", ["3"]) != CPU.evaluated("x", model, "m", ["40"])


@pytest.mark.parametrize("task", [t for t in TASKS if isinstance(t, Harness)], ids=lambda t: f"{t.config}-{t.lengths}")
def test_what_is_read_is_what_its_configuration_asks(task):
    config = yaml.safe_load((RECIPES / "eval" / f"{task.config}.yaml").read_text(encoding="utf-8"))
    assert {name for _, name, _ in task.cells} == set(config["tasks"])
    metrics = {metric for *_, metric in task.cells}
    lengths = (
        yaml.safe_load(task.lengths or str(config["metadata"]["max_seq_lengths"])) if "ruler" in task.config else []
    )
    assert metrics == {"babilong": {"acc"}, "longbench": {"score"}}.get(task.config, set(map(str, lengths)))


def results(folder: Path, age: float, config: dict | None = None, **scores: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"results_{age}.json"
    found = {f"{key},none": value for key, value in scores.items()}
    path.write_text(json.dumps({"results": {"ruler_vt": found}, "config": config or {}}))
    os.utime(path, (1e9 - age, 1e9 - age))


def test_the_newest_results_of_lm_eval_are_read(tmp_path):
    task = Harness("ruler", (("VT", "ruler_vt", "4096"), ("VT 8K", "ruler_vt", "8192"), ("VT", "ruler_vt", "8192")))
    assert "no results_*.json" in message_of(lambda: list(task.read(tmp_path / "scores")))
    results(tmp_path / "scores" / "z", 10, **{"4096": 0.5, "8192": 0.25})
    results(tmp_path / "scores" / "a", 5, **{"4096": 0.75, "8192": 1.0})
    assert list(task.read(tmp_path / "scores")) == [{"column": "VT", "score": 87.5}, {"column": "VT 8K", "score": 100}]


def test_prompts_that_had_no_memory_are_told_of(tmp_path):
    for name, report in (("ours", {"memory_tally": {"written": 5, "out_of_memory": 2}}), ("plain", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.json").write_text(json.dumps(report))
    results(tmp_path / "theirs", 1, {"memory_tally": {"out_of_memory": 1, "hit_rate": 0.5}})
    results(tmp_path / "run" / "scores" / "model", 1, {"memory_tally": {"out_of_memory": 1}})
    assert without_memory([tmp_path / "plain", tmp_path / "run"]) == []
    (text,) = without_memory([tmp_path / name for name in ("ours", "theirs", "plain", "ours")])
    assert text.endswith("decoded without: 3 no room on the device.")
