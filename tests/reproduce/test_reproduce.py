"""From the command to a page: models are trained and scored where they are missing, and every number has its run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import fresh_python
import matplotlib.image
import pytest
from conftest import LAUNCHED
from data_files import HOTPOTQA_ROWS

from reproduce import scales
from reproduce.__main__ import TARGETS, main
from reproduce.commands import DONE, LOG

#: A few steps on a few short texts, all of which is logged.
SETTINGS = (
    *("data.needle_words=[20]", "data.needle_count=3", "data.eval_size=2", "data.eval_fraction=0.5"),
    *("training.max_steps=4", "training.eval_steps=2", "training.logging_steps=1", "training.save_steps=4"),
    *("training.per_device_train_batch_size=4", "training.per_device_eval_batch_size=2", "lora.dropout=0"),
)


class Reproduced(NamedTuple):
    """Where it is done, what was printed for each target, and the files there were after it."""

    folder: Path
    printed: dict[str, list[str]]
    files: dict[str, dict[Path, int]]

    def page(self, target: str) -> dict[str, Any]:
        return json.loads((self.folder / "reports" / target / f"{target}.json").read_text(encoding="utf-8"))

    def logs(self, method: str) -> list[dict[str, Any]]:
        path = self.folder / "runs" / "cpu" / "llada_moe" / f"{method}-1" / "trainer_state.json"
        return json.loads(path.read_text())["log_history"]


def arguments(folder: Path, *targets: str, settings: tuple[str, ...] = SETTINGS) -> list[str]:
    own = [*targets, "--scale", "cpu", "--seeds", "1", "--questions", "2", "--jobs", "2"]
    own += ["--runs", str(folder / "runs"), "--reports", str(folder / "reports")]
    return [*own, "--set", f"data.dataset={folder / 'rows.json'}", *settings]


def times(folder: Path) -> dict[Path, int]:
    """When each file was last written, but for locks."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """With the rows; one backbone, as every command takes its seconds to start."""
    folder = tmp_path_factory.mktemp("reproduced")
    (folder / "rows.json").write_text(json.dumps(HOTPOTQA_ROWS), encoding="utf-8")
    cpu = scales.SCALES["cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "home"))
        for name in LAUNCHED:
            patch.delenv(name, raising=False)
        patch.setitem(scales.SCALES, "cpu", dataclasses.replace(cpu, backbones=cpu.backbones[:1]))
        yield folder


@pytest.fixture(scope="module")
def reproduced(here) -> Reproduced:
    """Figure 4, figure 4 once more, and figure 3."""
    found = Reproduced(here, {}, {})
    for name, target in (("figure4", "figure4"), ("again", "figure4"), ("figure3", "figure3")):
        with redirect_stdout(StringIO()) as out:
            assert main(arguments(here, target)) == 0
        found.printed[name] = out.getvalue().splitlines()
        found.files[name] = times(here / "runs")
    return found


@pytest.mark.slow
def test_a_figure_is_a_picture_its_numbers_and_a_page(reproduced):
    first, *_, last = reproduced.printed["figure4"]
    folder = reproduced.folder / "reports" / "figure4"
    assert (first, last) == ("0 commands done, 3 to run", str(folder / "index.html"))
    assert matplotlib.image.imread(folder / "figure4.png")[..., :3].var() > 1e-3
    html = (folder / "index.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in html and "LLaDA-MoE: MDLM ends at an eval loss of" in html
    assert "Changed in every recipe: data.dataset=" in html
    listed = (reproduced.folder / "reports" / "index.html").read_text(encoding="utf-8")
    assert 'href="figure4/index.html"' in listed and 'href="figure3/index.html"' in listed


@pytest.mark.slow
def test_every_point_is_in_the_logs_of_its_run_and_every_loss_is_a_point(reproduced):
    points = reproduced.page("figure4")["points"]
    for point in points:
        assert {"step": point["step"], point["loss"]: point["value"]}.items() <= next(
            log for log in reproduced.logs(point["method"]) if log["step"] == point["step"] and point["loss"] in log
        ).items()
        assert point["run"] == str(reproduced.folder / "runs" / "cpu" / "llada_moe" / f"{point['method']}-1")
    counts = {method: [point["method"] for point in points].count(method) for method in ("mdlm", "memdlm")}
    assert counts == {"mdlm": 4 + 3, "memdlm": 2 * (4 + 3)}, "4 steps, evaluated at the start, at 2 and at 4"
    rows = {row[1]: row for row in reproduced.page("figure4")["tables"][0]["rows"]}
    assert float(rows["MDLM"][3]) == pytest.approx(reproduced.logs("mdlm")[-1 - 2]["eval_loss"], abs=5e-4)


@pytest.mark.slow
def test_both_methods_see_the_same_data_under_the_same_masks(reproduced):
    """Before the first update, what MemDLM loses without its fast weights is MDLM's loss."""
    mdlm, memdlm = reproduced.logs("mdlm"), reproduced.logs("memdlm")
    assert mdlm[0]["step"] == memdlm[0]["step"] == 0
    assert mdlm[0]["eval_loss"] == memdlm[0]["eval_loss_memory_off"] != memdlm[0]["eval_loss"]
    first, other = (next(log for log in logs if log["step"] == 1 and "loss" in log) for logs in (mdlm, memdlm))
    # transformers 4.57 keeps four digits of a train loss
    assert round(first["loss"], 4) == round(other["loss_memory_off"], 4) != round(other["loss"], 4)


@pytest.mark.slow
def test_what_is_there_is_not_run_again(reproduced):
    assert reproduced.printed["again"][0] == "3 commands done, 0 to run"
    assert reproduced.files["again"] == reproduced.files["figure4"], "no file has changed"


@pytest.mark.slow
def test_another_figure_takes_the_runs_there_are(reproduced):
    assert reproduced.printed["figure3"][0] == "3 commands done, 4 to run"
    before, after = reproduced.files["again"], reproduced.files["figure3"]
    assert {path: after[path] for path in before} == before
    new = {path.relative_to(reproduced.folder / "runs" / "cpu" / "llada_moe") for path in after.keys() - before.keys()}
    assert {path.parts[:2] for path in new if path.name == DONE} == {
        ("scores", name) for name in ("untuned", "mdlm-1", "memdlm-1")
    }
    points, runs = reproduced.page("figure3")["points"], {}
    for point in points:
        scores = json.loads((Path(point["run"]) / "scores.json").read_text())
        assert scores["memory"] == (point["model"] == "MemDLM, memory on") and scores["questions"] == 2
        row = next(row for row in scores["scores"] if f"{row['words']} words" == point["column"])
        assert point["score"] == 100 * row["right"] / row["asked"] and row["asked"] == 2 * 3
        runs[point["model"]] = scores["model"].rpartition("/")[2]
    assert len(points) == 4 * 4 and runs == {
        "before fine-tuning": "base",
        "MDLM": "mdlm-1",
        "MemDLM, memory off": "memdlm-1",
        "MemDLM, memory on": "memdlm-1",
    }


@pytest.mark.slow
def test_the_page_names_every_command_and_its_seconds(reproduced):
    for target, count in (("figure4", 3), ("figure3", 7)):
        commands = reproduced.page(target)["commands"]
        assert len(commands) == count
        for entry in commands:
            record = json.loads((Path(entry["folder"]) / DONE).read_text())
            assert (entry["command"], entry["seconds"]) == (record["command"], record["seconds"])
            assert record["made_from"].get("training.max_steps", 4) == 4


def error_of(capsys: pytest.CaptureFixture, *given: str) -> str:
    """The one line on stderr, after `error: `."""
    assert main(list(given)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: "), captured.err
    return captured.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.slow
def test_other_settings_are_refused_for_the_same_folder(reproduced, capsys):
    before = times(reproduced.folder)
    settings = tuple(setting.replace("max_steps=4", "max_steps=5") for setting in SETTINGS)
    text = error_of(capsys, *arguments(reproduced.folder, "figure4", settings=settings))
    assert text.startswith(f"{reproduced.folder / 'runs' / 'cpu' / 'llada_moe' / 'base'}: made with ")
    assert text.endswith("; move it away, or give another folder with --runs")
    assert times(reproduced.folder) == before


@pytest.mark.slow
def test_what_a_command_refuses_is_told(here, tmp_path, capsys):
    text = error_of(capsys, *arguments(tmp_path, "figure4"))  # whose data is not there
    log = tmp_path / "runs" / "cpu" / "llada_moe" / "base" / LOG
    assert text.startswith(f"{log}: the command ended with 2: error: ")
    assert str(tmp_path / "rows.json") in text
    assert not (tmp_path / "reports").exists()


# --- without running anything --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["cpu", "small", "paper"])
def test_commands_are_shown_and_nothing_is_run(scale, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    targets = [target for target in TARGETS if scale == "cpu" or target != "dropout"]
    for target in targets:
        given = [
            target,
            "--scale",
            scale,
            "--runs",
            "somewhere",
            "--seeds",
            "7",
            "--set",
            "memory.rank=3",
            "--commands",
        ]
        assert main(given) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(set(lines)) > 1
        for line in lines:
            words = shlex.split(line)
            words = words[words.index("python") + 1 :]
            assert words[0] == "-m" and any(f"somewhere/{scale}/" in word for word in words), line
            if "dllm_memdlm.train" in words:
                assert "memory.rank=3" in words and words[-1] == "--resume"
                recipe = next(word for word in words if word.endswith(".yaml"))
                assert Path(recipe).is_file(), "as seen from here"
        trained = [line for line in lines if "dllm_memdlm.train" in line]
        assert trained and all("training.seed=7" in line or "_base.yaml" in line for line in trained)
    assert list(tmp_path.iterdir()) == []


def test_what_is_unknown_is_refused_in_a_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = error_of(capsys, "figure4", "--scale", "huge")
    assert text == "--scale huge: expected one of cpu, small, paper"
    for given, message in (
        (["figure5"], f"unknown target 'figure5'; known: {', '.join(TARGETS)}"),
        (["figure4", "table4"], f"unknown target 'table4'; known: {', '.join(TARGETS)}"),
        (["figure4", "--jobs", "0"], "--jobs 0: expected at least 1"),
        (["figure4", "--questions", "-1"], "--questions -1: expected at least 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(given)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"reproduce: error: {message}"
    assert "expected section.key=value" in error_of(capsys, "figure4", "--set", "training.max_steps")
    text = error_of(capsys, "figure4", "--set", "training.max_stepps=4")
    assert text.endswith("unknown key 'training.max_stepps'; did you mean training.max_steps?")
    assert "--scale paper" in error_of(capsys, "dropout", "--scale", "paper", "--commands")
    assert "lm-eval" in error_of(capsys, "table1", "--questions", "5")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert error_of(capsys, "table1").endswith("which is not installed: pip install '.[eval]'")
    assert list(tmp_path.iterdir()) == []


def test_help_does_not_wait_for_torch():
    code = "import json, sys; import reproduce.__main__; print(json.dumps('torch' in sys.modules))"
    assert fresh_python.printed(fresh_python.run("-c", code)) is False
