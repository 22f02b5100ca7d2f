"""The demo's report: numbers from logs, the reading of them, the figure, and which runs count as finished."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console

from reproduce import demo
from reproduce.reporting import Run, draw_curves, is_finished, load_run, reading, smooth, summarise, summary_table


def make_run(recipe: str, eval_loss: float, off: float | None = None, seconds: float = 1.0) -> Run:
    """20 train logs with losses 20, 19, …, 1 and one evaluation; a MemDLM run where `off` is given."""
    logs = [{"step": 10 * (i + 1), "loss": 20.0 - i, "step_seconds": seconds} for i in range(20)]
    logs.append({"step": 200, "eval_loss": eval_loss})
    if off is not None:
        logs = [log | ({"loss_memory_off": log["loss"] + 1} if "loss" in log else {}) for log in logs]
        logs[-1]["eval_loss_memory_off"] = off
    logs.append({"step": 200, "train_runtime": 12.5, "train_loss": 10.5})
    return Run(recipe, Path("runs", recipe), logs)


@pytest.fixture
def pair() -> list[Run]:
    return [make_run("tiny_llada2_mdlm", 2.0, seconds=1.0), make_run("tiny_llada2", 1.5, off=1.9, seconds=1.25)]


def test_summary_is_exact(pair):
    assert summarise(pair) == [
        {
            "recipe": "tiny_llada2_mdlm",
            "backbone": "LLaDA2.1",
            "method": "MDLM",
            "loss": 1.5,
            "loss_memory_off": None,
            "eval_loss": 2.0,
            "eval_loss_memory_off": None,
            "step_seconds": 1.0,
            "step_seconds_over_mdlm": 1.0,
            "steps": 200,
            "path": "runs/tiny_llada2_mdlm",
        },
        {
            "recipe": "tiny_llada2",
            "backbone": "LLaDA2.1",
            "method": "MemDLM",
            "loss": 1.5,
            "loss_memory_off": 2.5,
            "eval_loss": 1.5,
            "eval_loss_memory_off": 1.9,
            "step_seconds": 1.25,
            "step_seconds_over_mdlm": 1.25,
            "steps": 200,
            "path": "runs/tiny_llada2",
        },
    ]


def test_the_last_evaluation_and_the_median_step_count():
    run = make_run("tiny_llada2", 3.0, off=3.0)
    run.log_history[0]["step_seconds"] = 100.0  # a slow first window, with its warm-up, moves a mean but not a median
    run.log_history.append({"step": 200, "eval_loss": 2.5})
    row = summarise([run])[0]
    assert (row["eval_loss"], row["step_seconds"], row["step_seconds_over_mdlm"]) == (2.5, 1.0, None)


def test_backbones_are_compared_with_their_own_baseline(pair):
    other = [make_run("tiny_llada_moe_mdlm", 2.0, seconds=4.0), make_run("tiny_llada_moe", 2.0, off=2.0, seconds=8.0)]
    assert [row["step_seconds_over_mdlm"] for row in summarise(pair + other)] == [1.0, 1.25, 1.0, 2.0]


@pytest.mark.parametrize(
    ("on", "off", "says"),
    [
        (1.5, 1.9, ["0.500 better than MDLM's 2.000", "1.900, 0.100 better", "training with the memory helped"]),
        (1.5, 4.0, ["0.500 better", "4.000, 2.000 worse", "have come to rely on the memory"]),
        (2.5, 2.001, ["2.500, 0.500 worse", "the same as MDLM's 2.000", "made no difference"]),
    ],
)
def test_the_reading_follows_the_numbers(on, off, says):
    runs = [make_run("tiny_llada2_mdlm", 2.0), make_run("tiny_llada2", on, off=off, seconds=1.25)]
    text = reading(summarise(runs))
    assert text.startswith("LLaDA2.1: ")
    for phrase in [*says, "1.25 times as long"]:
        assert phrase in text


def test_without_a_baseline_the_reading_compares_nothing(pair):
    assert "nothing to compare" in reading(summarise(pair[1:]))


def test_mdlm_stands_in_the_column_without_fast_weights(pair):
    console = Console(width=120)
    with console.capture() as captured:
        console.print(summary_table(summarise(pair)))
    mdlm, memdlm = (line for line in captured.get().splitlines() if "LLaDA2.1" in line)
    assert [cell.strip() for cell in mdlm.split("│")[3:8]] == ["1.500", "-", "2.000", "1.00", "1.00"]
    assert [cell.strip() for cell in memdlm.split("│")[3:8]] == ["1.500", "1.500", "1.900", "1.25", "1.25"]


def test_smoothing_averages_a_tenth_of_the_series():
    assert smooth([2.0] * 60) == [2.0] * 60
    assert smooth([0.0, 3.0, 6.0, 3.0] * 5)[:3] == [1.5, 3.0, 4.0]  # windows of 2, 3 and 3 values
    assert smooth([1.0, 5.0]) == [1.0, 5.0]


def test_the_figure_shows_every_curve(pair, tmp_path):
    path = tmp_path / "curves.png"
    draw_curves(pair, path)
    pixels = matplotlib.image.imread(path)[..., :3]
    assert pixels.shape[1] >= 1200
    assert pixels.var() > 1e-3
    for color in ("#6b6b6b", "#0072b2", "#d55e00"):
        rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels - rgb).max(axis=-1) < 0.01).sum() > 100, f"{color} is not drawn"


def write_state(run_dir: Path, global_step: int, max_steps: int = 200) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    state = {"global_step": global_step, "max_steps": max_steps, "log_history": [{"step": 1, "loss": math.pi}]}
    (run_dir / "trainer_state.json").write_text(json.dumps(state))


def test_finished_runs_are_told_from_unfinished_ones(tmp_path):
    assert not is_finished(tmp_path)
    write_state(tmp_path, global_step=100)
    assert not is_finished(tmp_path)
    assert is_finished(tmp_path, max_steps=100)
    write_state(tmp_path, global_step=200)
    assert is_finished(tmp_path)
    assert not is_finished(tmp_path, max_steps=201)
    assert load_run("tiny_llada2", tmp_path).series("loss") == ([1], [math.pi])
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2')  # cut short while it was written
    assert not is_finished(tmp_path)
    with pytest.raises(FileNotFoundError, match="did not finish"):
        load_run("tiny_llada2", tmp_path)


@pytest.fixture
def trained(tmp_path, monkeypatch) -> list[list[str]]:
    """Commands the demo ran, on a recipe folder of two recipes; running one writes a finished run."""
    commands = []
    for name in ("tiny_llada2_mdlm", "tiny_llada2"):
        (tmp_path / f"{name}.yaml").write_text("training:\n  max_steps: 200\n")

    def run(command: list[str], **_: object) -> None:
        overrides = dict(argument.removeprefix("training.").split("=") for argument in command if "=" in argument)
        commands.append(command)
        write_state(Path(overrides["output_dir"]), int(overrides.get("max_steps", 200)))

    monkeypatch.setattr(demo, "RECIPE_FOLDER", tmp_path)
    monkeypatch.setattr(demo.subprocess, "run", run)
    return commands


def test_the_demo_trains_what_is_missing_and_reports(trained, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--recipes", "tiny_llada2_mdlm", "tiny_llada2", "--output", str(output)]
    assert demo.main([*arguments, "--steps", "50"]) == 0
    assert [command[-3:] for command in trained] == [
        [str(tmp_path / f"{name}.yaml"), f"training.output_dir={output / name}", "training.max_steps=50"]
        for name in ("tiny_llada2_mdlm", "tiny_llada2")
    ]
    summary = json.loads((output / "summary.json").read_text())
    assert [row["method"] for row in summary["runs"]] == ["MDLM", "MemDLM"]
    assert summary["versions"]["torch"] and summary["cpu_count"] >= 1
    assert str(output / "curves.png") in capsys.readouterr().out

    trained.clear()
    demo.main([*arguments, "--steps", "50"])
    assert trained == []  # both have finished
    demo.main(arguments)
    assert len(trained) == 2  # the recipes ask for 200 steps
    demo.main([*arguments, "--force"])
    assert len(trained) == 4


def test_a_failed_training_ends_the_demo_with_its_exit_code(trained, tmp_path, monkeypatch, capsys):
    def fail(command: list[str], **_: object) -> None:
        raise demo.subprocess.CalledProcessError(3, command)

    monkeypatch.setattr(demo.subprocess, "run", fail)
    write_state(tmp_path / "out" / "tiny_llada2", global_step=200)
    assert demo.main(["--recipes", "tiny_llada2", "--output", str(tmp_path / "out"), "--force"]) == 3
    assert "failed with exit code 3" in capsys.readouterr().out
    assert not is_finished(tmp_path / "out" / "tiny_llada2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--recipes", "tiny_lada2"], "tiny_llada2, tiny_llada2_mdlm"), (["--steps", "0"], "at least 1")],
)
def test_mistakes_are_named_in_a_line(trained, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        demo.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert trained == []
