"""What is run and scored at each scale: variants and their recipes, commands and their folders, the paper's tables."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path

import pytest
import yaml
from data_files import message_of

from dllm_memdlm.backbones.sites import adapted_layers
from dllm_memdlm.training.recipe import load_recipe, resolve
from reproduce import ablations, paper
from reproduce.commands import Command
from reproduce.demo import RECIPE_FOLDER
from reproduce.paper import ABLATIONS, ANCHOR_RATIOS
from reproduce.scales import MDLM, MEMDLM, SCALES, Model, differences, flat
from reproduce.scores import (
    ABLATED,
    ANCHORED,
    RETRIEVAL,
    RULER_OFFLINE,
    TABLES,
    Harness,
    PlantedWords,
    mean_score,
    without_memory,
)

VARIANTS = [variant for group in ABLATIONS.values() for variant in group]
FILES = sorted((RECIPE_FOLDER / "ablations").glob("*.yaml"))
EVALUATED = dict.fromkeys(
    itertools.chain(*RETRIEVAL.values(), *ANCHORED.values(), *TABLES.values(), RULER_OFFLINE.values(), ABLATED.values())
)
HARNESSES = [task for task in EVALUATED if isinstance(task, Harness)]


def plain(path: Path) -> dict:
    """Every key of a recipe with its value, but for the folder that it writes to."""
    values = dict(flat(yaml.safe_load(load_recipe(path).to_yaml())))
    values.pop("training.output_dir", None)
    return values


# --- recipes -------------------------------------------------------------------------------------------------------


def test_every_variant_has_a_recipe_and_every_recipe_a_variant():
    methods = {variant.method for variant in VARIANTS} - {MDLM, MEMDLM}
    assert [path.stem for path in FILES] == sorted(methods)
    assert list(ablations.methods()) == list(dict.fromkeys(variant.method for variant in VARIANTS))
    assert ablations.methods()[MDLM] == ablations.methods()[MEMDLM] == {}


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_variant_is_memdlm_but_for_what_its_file_says(path):
    own, default = plain(path), plain(RECIPE_FOLDER / "llada_moe.yaml")
    said = differences(path)
    assert said == ablations.methods()[path.stem]
    assert {key: value for key, value in own.items() if value != default.get(key)} | said == said
    assert own == default | said, "and nothing is gone"
    changed = {key for key, value in said.items() if value != default[key]}
    assert changed and changed | {"memory.start_ratio", "memory.anchor_ratio"} >= set(said)
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# accelerate launch -m dllm_memdlm.train recipes/ablations/{path.name}\n")


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_variants_command_trains_its_recipe(path):
    scale = SCALES["paper"]
    command = scale.run(scale.backbones[0], path.stem, 7, ablations.methods()[path.stem])
    expected = dict(flat(resolve(path, scale.settings)))
    expected |= {"training.seed": 7, "training.output_dir": str(command.folder)}
    assert dict(command.made_from) == expected
    assert command.folder == Path("runs/reproduce/paper/llada_moe") / f"{path.stem}-7"


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_variants_differ_in_what_they_train_unless_the_model_is_too_shallow(scale):
    """Where layers are the same in a model of few, the page says so."""
    layers = {"cpu": 4, "small": 30, "paper": 16}[scale.name]
    found: dict[str, list[str]] = {}
    for method, changes in ablations.methods().items():
        made_from = dict(scale.run(scale.backbones[0], method, 1, changes).made_from)
        made_from.pop("training.output_dir")
        memory = load_recipe(RECIPE_FOLDER / f"{scale.backbones[0].recipe}.yaml").memory
        fraction = made_from.pop("memory.layer_fraction", memory.layer_fraction)
        made_from["layers"] = str(adapted_layers(layers, dataclasses.replace(memory, layer_fraction=fraction)))
        for key in [key for key in made_from if key.startswith("memory.")]:
            if made_from[key] == getattr(memory, key.removeprefix("memory.")):
                made_from.pop(key)  # said, and no other than it would be
        found.setdefault(json.dumps(made_from, sort_keys=True), []).append(method)
    same = [methods for methods in found.values() if len(methods) > 1]
    assert same == ([[MEMDLM, "ffn_5", "ffn_25"]] if scale.name == "cpu" else [])


@pytest.mark.parametrize(
    "recipe", [b.recipe for scale in SCALES.values() for b in scale.backbones if scale.name != "paper"]
)
def test_before_and_after_fine_tuning_a_model_is_asked_the_same(recipe):
    """Questions come from the rows behind those that a run evaluates on; those must be the same ones."""
    tuned, base = (load_recipe(RECIPE_FOLDER / f"{name}.yaml").data for name in (recipe, f"{recipe}_base"))
    for name in ("split", "eval_split", "eval_fraction", "eval_size"):
        assert getattr(base, name) == getattr(tuned, name), name


def test_the_first_anchor_ratio_of_figure_7_is_the_default():
    for backbone in (backbone for scale in SCALES.values() for backbone in scale.backbones):
        assert load_recipe(RECIPE_FOLDER / f"{backbone.recipe}.yaml").memory.anchor_ratio == ANCHOR_RATIOS[0]


# --- the paper's numbers -------------------------------------------------------------------------------------------


def test_the_default_has_one_score_and_names_every_group():
    scores = {variant.score for variant in VARIANTS if variant.method == MEMDLM}
    assert scores == {68.4, None}
    for title, group in ABLATIONS.items():
        rated = {variant.score is not None for variant in group}
        assert len(rated) == 1, f"{title}: either the paper's or ours"
        assert [variant.method for variant in group].count(MEMDLM) == 1
        assert len({variant.label for variant in group}) == len(group)
    assert all(0 < variant.score < 100 for variant in VARIANTS if variant.score is not None)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_table_has_a_number_for_every_column(number):
    columns, printed = getattr(paper, f"TABLE_{number}_COLUMNS"), getattr(paper, f"TABLE_{number}")
    assert len(set(columns)) == len(columns)
    assert printed.keys() <= {backbone.title for backbone in SCALES["paper"].backbones}
    for rows in printed.values():
        assert [len(row) for row in rows] == [len(columns)] * len(paper.ROWS)
        assert all(0 < score <= 100 for row in rows for score in row)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_our_columns_are_the_papers_in_its_order(number):
    assert tuple(column for task in TABLES[number] for column in task.columns) == getattr(
        paper, f"TABLE_{number}_COLUMNS"
    )


# --- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", HARNESSES, ids=lambda task: f"{task.config}-{task.lengths}")
def test_what_is_read_is_what_its_configuration_asks(task):
    config = yaml.safe_load((RECIPE_FOLDER / "eval" / f"{task.config}.yaml").read_text(encoding="utf-8"))
    assert {name for _, name, _ in task.cells} == set(config["tasks"])
    metrics = {metric for _, _, metric in task.cells}
    if task.config.startswith("ruler"):
        lengths = task.lengths or str(config["metadata"]["max_seq_lengths"])
        assert metrics == {str(length) for length in yaml.safe_load(lengths)}
    else:
        assert metrics == {"babilong": {"acc"}, "longbench": {"score"}}[task.config]


def results(folder: Path, name: str, age: float, **scores: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"results_{name}.json"
    found = {f"{key},none": value for key, value in scores.items()}
    path.write_text(json.dumps({"results": {"ruler_vt": found}, "config": {}}))
    os.utime(path, (1e9 - age, 1e9 - age))


def test_the_newest_results_of_lm_eval_are_read(tmp_path):
    task = Harness("ruler", (("VT 4K", "ruler_vt", "4096"), ("VT 8K", "ruler_vt", "8192")))
    command = Command(tmp_path / "scores", ("-m", "x"))
    assert message_of(task.read, command) == f"{tmp_path / 'scores'}: lm-eval has written no results_*.json there"
    results(tmp_path / "scores" / "a__model", "2026-02-01", 10, **{"4096": 0.5, "8192": 0.25})
    assert task.read(command) == {"VT 4K": 50.0, "VT 8K": 25.0} and mean_score(task.read(command)) == 37.5
    results(tmp_path / "scores" / "model", "2026-01-01", 5, **{"4096": 0.75, "8192": 1.0})
    assert task.read(command) == {"VT 4K": 75.0, "VT 8K": 100.0}, "the newest, whatever its name"
    mean = Harness("ruler", (("VT", "ruler_vt", "4096"), ("VT", "ruler_vt", "8192")))
    assert mean.columns == ["VT"] and mean.read(command) == {"VT": 87.5}, "a column of several cells is their mean"


def test_prompts_that_had_no_memory_are_told_of(tmp_path):
    ours, theirs, plain = (Command(tmp_path / name, ("-m", "x")) for name in ("ours", "theirs", "plain"))
    results(theirs.folder, "2026-01-01", 1, **{"4096": 0.5})
    for command, report in ((ours, {"memory_tally": {"written": 5, "out_of_memory": 2}}), (plain, {})):
        command.folder.mkdir()
        (command.folder / "scores.json").write_text(json.dumps(report))
    assert without_memory([plain, theirs]) == []
    (path,) = theirs.folder.glob("*.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "config": {"memory_tally": {"out_of_memory": 1, "hit_rate": 0.5}}}))
    (text,) = without_memory([ours, theirs, plain, ours])
    assert text.endswith("decoded without: 3 no room on the device.")


def test_words_found_are_shares_of_those_asked_for(tmp_path):
    rows = [{"words": 40, "right": 3, "asked": 8}, {"words": 80, "right": 0, "asked": 16}]
    (tmp_path / "scores.json").write_text(json.dumps({"scores": rows}))
    task = PlantedWords((40, 80))
    assert task.read(Command(tmp_path, ())) == {"40 words": 37.5, "80 words": 0.0}
    assert list(task.read(Command(tmp_path, ()))) == task.columns


def test_every_way_to_score_a_model_has_a_folder_of_its_own():
    scale, folders = SCALES["cpu"], {}
    tasks = {
        *EVALUATED,
        PlantedWords((40,)),
        PlantedWords((80, 40)),
        PlantedWords((4, 80)),
        Harness("ruler", (), "[4096]"),
    }
    settings = ([], ["memory_anchor_ratio=0.3"], ["memory_anchor_ratio=0.5"], ["temperature=0.3", "steps=4"])
    models = [Model.of(scale.run(scale.backbones[0], method, seed)) for method, seed in ((MDLM, 1), (MEMDLM, 1))]
    models += [scale.untuned(backbone) for backbone in scale.backbones]
    ways = list(itertools.product(models, tasks, (False, True), settings))
    for model, task, memory, chosen in ways:
        command = task.command(scale, model, memory, chosen)
        line = folders.setdefault(command.folder, command.line)
        assert line == command.line, command.folder
        assert command.folder.is_relative_to(model.scores) and str(command.folder) in command.line
        assert model.pretrained in command.line and all(setting in command.line for setting in chosen)
        assert memory == ("--memory" in command.argv or "memory=true" in command.line)
    # What is asked: columns that differ are read from one result
    asked = {(task.config, task.lengths) if isinstance(task, Harness) else task.words for task in tasks}
    assert len(folders) == len(models) * len(asked) * 2 * len(settings)
