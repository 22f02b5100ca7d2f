"""The demo: numbers from logs, the reading of them, and which runs count as finished."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from reproduce import demo

RECIPES = ("tiny_llada2_mdlm", "tiny_llada2")


def write_run(folder: Path, eval_loss: float, off: float | None = None, seconds: float = 1.0, steps: int = 200) -> Path:
    """20 train logs with losses 20, 19, …, 1 and one evaluation; a MemDLM run where `off` is given."""
    logs = [{"step": 10 * (i + 1), "loss": 20.0 - i, "step_seconds": seconds} for i in range(20)]
    logs[0]["step_seconds"] = 100.0  # a slow first window moves a mean but not a median
    if off is not None:
        logs = [log | {"loss_memory_off": log["loss"] + 1} for log in logs]
    logs += [{"step": 100, "eval_loss": 9.0}, {"step": 200, "eval_loss": eval_loss}]
    logs[-1] |= {} if off is None else {"eval_loss_memory_off": off}
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": steps, "max_steps": 200, "log_history": logs}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


@pytest.fixture
def pair(tmp_path) -> list[pd.DataFrame]:
    write_run(tmp_path / RECIPES[0], 2.0)
    write_run(tmp_path / RECIPES[1], 1.5, off=1.9, seconds=1.25)
    return [demo.points_of(name, tmp_path / name) for name in RECIPES]


def test_the_summary_has_last_losses_and_median_seconds_against_the_own_baseline(pair, tmp_path):
    names = ("tiny_llada_moe_mdlm", "tiny_llada_moe")
    other = [demo.points_of(name, write_run(tmp_path / name, 2.0, seconds=4.0 + 4 * n)) for n, name in enumerate(names)]
    rows = demo.summarise(pair + other)
    assert [row["step_seconds_over_mdlm"] for row in rows] == [1.0, 1.25, 1.0, 2.0]
    assert [(row["method"], row["backbone"], row["steps"]) for row in rows[:2]] == [
        (method, "LLaDA2.1", 200) for method in ("mdlm", "memdlm")
    ]
    keys = ("loss", "loss_memory_off", "eval_loss", "eval_loss_memory_off", "step_seconds")
    assert [[row[key] for key in keys] for row in rows[:2]] == [[1.5, None, 2.0, None, 1.0], [1.5, 2.5, 1.5, 1.9, 1.25]]


@pytest.mark.parametrize(
    ("on", "off", "says"),
    [
        (1.5, 1.9, ["1.500 (0.500 better than MDLM's 2.000)", "1.900 (0.100 better"]),
        (2.5, 2.001, ["2.500 (0.500 worse than MDLM's 2.000)", "2.001 (the same as MDLM's 2.000"]),
    ],
)
def test_the_reading_follows_the_numbers(pair, tmp_path, on, off, says):
    own = demo.points_of(RECIPES[1], write_run(tmp_path / "other", on, off=off))
    text = demo.reading(demo.summarise([pair[0], own]))
    assert text.startswith("LLaDA2.1: ") and text.endswith(demo.CAUTION)
    assert all(phrase in text for phrase in says)
    assert "othing to compare" in demo.reading(demo.summarise([own]))


def test_mdlm_stands_in_the_column_without_fast_weights(pair):
    console = Console(width=120)
    with console.capture() as captured:
        console.print(demo.summary_table(demo.summarise(pair)))
    mdlm, memdlm = (line for line in captured.get().splitlines() if "LLaDA2.1" in line)
    assert [cell.strip() for cell in mdlm.split("│")[2:8]] == ["MDLM", "1.500", "-", "2.000", "1.00", "1.00"]
    assert [cell.strip() for cell in memdlm.split("│")[2:8]] == ["MemDLM", "1.500", "1.500", "1.900", "1.25", "1.25"]


@pytest.fixture
def trained(tmp_path, monkeypatch) -> list[list[str]]:
    """Commands the demo ran, on a recipe folder of two recipes; running one writes a finished run."""
    commands = []
    for name in RECIPES:
        (tmp_path / f"{name}.yaml").write_text("training:\n  max_steps: 200\n")

    def run(command: list[str], **_: object) -> None:
        overrides = dict(argument.removeprefix("training.").split("=") for argument in command if "=" in argument)
        commands.append(command)
        write_run(Path(overrides["output_dir"]), 2.0, steps=int(overrides.get("max_steps", 200)))

    monkeypatch.setattr(demo, "RECIPES", tmp_path)
    monkeypatch.setattr(demo.subprocess, "run", run)
    return commands


def test_the_demo_trains_what_is_missing_and_reports(trained, tmp_path, capsys, figures):
    output = tmp_path / "out"
    arguments = ["--recipes", *RECIPES, "--output", str(output)]
    assert demo.main([*arguments, "--steps", "50"]) == 0
    assert [command[-3:] for command in trained] == [
        [str(tmp_path / f"{name}.yaml"), f"training.output_dir={output / name}", "training.max_steps=50"]
        for name in RECIPES
    ]
    summary = json.loads((output / "summary.json").read_text())
    assert [row["method"] for row in summary["runs"]] == ["mdlm", "memdlm"] and summary["versions"]["torch"]
    assert str(output / "curves.png") in capsys.readouterr().out and len(figures) == 1
    for more, count in ((["--steps", "50"], 2), ([], 4), (["--force"], 6)):  # finished; the recipes ask for 200 steps
        demo.main([*arguments, *more])
        assert len(trained) == count
    (output / RECIPES[0] / "trainer_state.json").write_text('{"global_step": 2')  # cut short while it was written
    demo.main(arguments)
    assert len(trained) == 7


def test_a_failed_training_ends_the_demo_with_its_exit_code(trained, tmp_path, monkeypatch, capsys):
    def fail(command: list[str], **_: object) -> None:
        raise demo.subprocess.CalledProcessError(3, command)

    monkeypatch.setattr(demo.subprocess, "run", fail)
    run = write_run(tmp_path / "out" / "tiny_llada2", 2.0)
    assert demo.main(["--recipes", "tiny_llada2", "--output", str(tmp_path / "out"), "--force"]) == 3
    assert "failed with exit code 3" in capsys.readouterr().out
    assert not demo.is_finished(run, tmp_path / "tiny_llada2.yaml", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--recipes", "tiny_lada2"], "tiny_llada2, tiny_llada2_mdlm"), (["--steps", "0"], "at least 1")],
)
def test_mistakes_are_named_in_a_line(trained, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        demo.main(arguments)
    assert exit_.value.code == 2 and message in capsys.readouterr().err and trained == []
