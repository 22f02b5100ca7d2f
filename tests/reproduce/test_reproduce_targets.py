"""Every figure and table: commands in an order that works, and pages whose numbers are those of the right models."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pkgutil
import re

import matplotlib.image
import pytest

from reproduce import figure11, paper
from reproduce.__main__ import TARGETS
from reproduce.commands import Command
from reproduce.page import read_page
from reproduce.report import write_page
from reproduce.scales import MDLM, SCALES, Model
from reproduce.scores import ABLATED, ANCHORED, RETRIEVAL, RULER_OFFLINE, TABLES, Harness

GROUPS = (*RETRIEVAL.values(), *ANCHORED.values(), *TABLES.values(), RULER_OFFLINE.values(), ABLATED.values())
CELLS = [cell for task in itertools.chain(*GROUPS) if isinstance(task, Harness) for cell in task.cells]

#: Dropout is tried from scratch, on the CPU alone.
EVERYWHERE = [(name, size) for size in SCALES for name in TARGETS if name != "dropout" or size == "cpu"]


def stages_of(target: str, size: str) -> list[list[Command]]:
    return pkgutil.resolve_name(TARGETS[target]).stages(dataclasses.replace(SCALES[size], seeds=(1, 2)))


# --- commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "size"), EVERYWHERE)
def test_a_command_comes_after_those_whose_folders_it_reads(target, size):
    stages = stages_of(target, size)
    made: dict[str, Command] = {}
    for stage in stages:
        for command in stage:
            words = {word for argument in command.argv for word in re.split("[=,]", argument)}
            read = {folder for folder in made if words & {folder, f"{folder}/model"}}
            assert {made[folder] for folder in read} == set(command.after)
            assert str(command.folder) not in made
        made |= {str(command.folder): command for command in stage}
    assert any(command.after for command in made.values()) or size == "paper" or target == "dropout"


@pytest.mark.parametrize("size", SCALES)
def test_figures_share_their_commands(size):
    """What figure 7 has for the default ratio is figure 3's, and both score the models of figure 4."""
    shown, ratios, trained = (set(itertools.chain(*stages_of(f"figure{n}", size))) for n in (3, 7, 4))
    assert trained < shown
    default = {own for own in ratios - trained if "memory_anchor_ratio" not in own.line}
    assert default < shown and len(default) == 2 * len(ANCHORED[size])


def test_a_score_depends_on_its_configuration():
    model = Model.of(SCALES["paper"].run(SCALES["paper"].backbones[0], MDLM, 1))
    made_from = TABLES[1][0].command(SCALES["paper"], model, memory=False).made_from
    assert made_from["num_fewshot"] == 0 and made_from["metadata.max_seq_lengths"] == [4096, 8192, 16384, 32768]


# --- pages from results made by hand -------------------------------------------------------------------------------


#: Right answers by model, and the labels that figure 3 and the tables have for it.
RIGHT = {"untuned": 0.125, "mdlm": 0.25, "memdlm": 0.5, "memory": 0.75}
LABELS = dict(zip(("before fine-tuning", "MDLM", "MemDLM, memory off", "MemDLM, memory on"), RIGHT, strict=True))
ROWS = dict(zip(paper.ROWS, [*RIGHT][1:], strict=True))


def finish(commands: list[Command]) -> None:
    """What the commands would leave."""
    logs = [
        {"step": 10, "loss": 2.0, "loss_memory_off": 2.5},
        {"step": 10, "eval_loss": 1.0, "eval_loss_memory_off": 2.0},
        {"step": 10, "inner_grad_norm_1": 0.5, "inner_grad_norm_2": 0.25},
    ]
    for command in commands:
        scored = command.folder.parent.name.rpartition("-")[0] or command.folder.parent.name
        with_memory = "memory=true" in command.line or "--memory" in command.argv
        share = RIGHT["memory"] if with_memory else RIGHT.get(scored, 0.5)
        found = {name: {} for _, name, _ in CELLS}
        for _, name, metric in CELLS:
            found[name][f"{metric},none"] = share
        rows = [{"words": words, "right": 16 * share, "asked": 16} for words in (40, 80, 160, 320)]
        steps = [{"step": n, "ratio": share + n, "static": 1.0, "sequential": share + n} for n in range(48)]
        command.folder.mkdir(parents=True, exist_ok=True)
        command.write_record(60.0)
        for file, content in (
            ("trainer_state.json", {"log_history": logs}),
            ("results_1.json", {"results": found}),
            ("scores.json", {"scores": rows, "steps": steps, "examples": 7, "memory_tally": {"not_finite": 1}}),
        ):
            (command.folder / file).write_text(json.dumps(content))


#: Every target at the scale of the paper, and some where there is another one.
PAGES = [(target, "paper") for target in TARGETS if target != "dropout"]
PAGES += [("dropout", "cpu"), ("figure3", "cpu"), ("figure11", "cpu"), ("table1", "cpu"), ("ablations", "small")]


@pytest.mark.parametrize(("target", "size"), PAGES)
def test_every_target_has_a_page(target, size, tmp_path):
    scale = dataclasses.replace(SCALES[size], runs=tmp_path / "runs", seeds=SCALES[size].seeds[:2])
    what = pkgutil.resolve_name(TARGETS[target])
    stages = what.stages(scale)
    commands = list(dict.fromkeys(command for stage in stages for command in stage))
    finish(commands)
    folder = tmp_path / target
    page = what.page(scale, folder)
    assert read_page(page.write(folder)).name == target
    assert write_page(folder, page).stat().st_size > 1000
    assert len(page.commands) == len(commands) and page.points
    assert {point["run"] for point in page.points} <= {str(command.folder) for command in commands}
    for picture in page.pictures:
        assert matplotlib.image.imread(folder / picture)[..., :3].var() > 1e-3
    for table in page.tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}
    if target.startswith("table") and size == "paper":
        printed = getattr(paper, f"TABLE_{target[-1]}")
        columns = getattr(paper, f"TABLE_{target[-1]}_COLUMNS")
        theirs = [dict(zip(page.tables[0].columns, row, strict=True)) for row in page.tables[0].rows if not row[0]]
        assert [[float(row[column]) for column in columns] for row in theirs] == [
            list(scores) for rows in printed.values() for scores in rows
        ]
        assert len(theirs) == len(page.tables[0].rows) / 2
    if target in ("figure3", "table1", "table2", "table3"):
        labels, digits = (LABELS, 1) if target == "figure3" else (ROWS, 2)
        for _, label, *cells in (row for row in page.tables[0].rows if row[0]):
            assert {cell.split()[0] for cell in cells} == {f"{100 * RIGHT[labels[label]]:.{digits}f}"}
        for point in page.points:
            assert point["score"] == 100 * RIGHT[labels[point["model"]]]
    if target == "figure11":
        last = figure11.STEPS[size] - 1
        for title, label, *cells in page.tables[0].rows:
            assert cells[-1].split()[0] == f"{RIGHT[LABELS[label]] + last:.2f}", title
        assert "7 held-out examples" in " ".join(page.about)
    told = [text for text in page.about if "decoded without" in text]
    assert len(told) == (target not in ("figure4", "dropout"))
    if target in ("figure7", "ablations"):
        for point in page.points:
            assert point["score"] == (25 if point.get("method") == MDLM else 75), "trained with memory, asked with it"
