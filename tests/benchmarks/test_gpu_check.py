"""The check of a GPU machine: all of it cut down on the CPU; parts that fail, hang or find no time; wheels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.parts import Check, Part

TIMED = [f"{recipe}_{bits}bit" for recipe in ("llada_moe", "llada2_mini") for bits in (16, 4)]
#: Each recipe and each number of bits once, which is half of what a GPU runs.
HALF = [TIMED[0], TIMED[3]]
CHOSEN = ["equality", "commands", "unit_tests", *HALF]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, warm_python) -> Path:
    """What the check has written, on a CPU."""
    folder = tmp_path_factory.mktemp("reports")
    settings = ["--cpu", "--output", str(folder), "--commit", "abc1234", "--seconds", "1200"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python)
        code = gpu_check.main([*settings, "--only", *CHOSEN])
    assert code == 0, (folder / "gpu-check.md").read_text()
    return folder


@pytest.mark.slow
def test_all_that_was_measured_is_in_one_report(folder):
    facts, page = json.loads((folder / "gpu-check.json").read_text()), (folder / "gpu-check.md").read_text()
    assert facts["card"].startswith("cpu: ") and facts["torch"] and facts["commit"] == "abc1234"
    tables = {table["title"]: table["rows"] for table in facts["sections"]}
    assert all(f"## {title}" in page for title in tables)
    parts, found = [row[0] for row in tables["Parts"]], {row[0]: row[-1] for row in tables["Parts"]}
    assert {row[1] for row in tables["Parts"]} == {"well"}
    assert parts[-2:] == HALF, "one after the other, after all else"
    commands = [name for name in parts if name.startswith("commands_")]
    plans = [f"plan_{name}" for name in HALF]
    assert sorted(parts) == sorted(["machine", "equality", "unit_tests", *commands, *plans, *HALF])
    assert len(commands) == 7 and commands.index("commands_train_llada2") < commands.index("commands_resume")
    assert found["commands_resume"].startswith("loss ") and "1024" in found["commands_lm_eval"]
    assert any(row[0].startswith("a_step_in_float32[llada2") for row in tables["A GPU against the CPU"])
    assert all(f"===== {name}" in (folder / "gpu-check.log").read_text() for name in parts)


def test_steps_and_decoding_at_full_size(folder):
    """Cut down. Nothing of a step is left out; plans are beside what was measured."""
    sections = {s["title"]: s for s in json.loads((folder / "gpu-check.json").read_text())["sections"]}
    assert all(len(row) == len(section["columns"]) for section in sections.values() for row in section["rows"])
    rows, names = sections["A training step at full size"]["rows"], ("llada_moe, 16 bit", "llada2_mini, 4 bit")
    assert [row[:2] for row in rows] == [[name, kind] for name in names for kind in ("MemDLM", "plain MDLM")]
    for row in rows:
        _, _, seconds, speed, _, flops, flop_limit, read, byte_limit, over, peak, planned, busy, waits = row
        assert speed == round(128 / seconds) and waits == 0 and 1 <= int(busy.rstrip("%")) <= 150
        assert over == pytest.approx(seconds / max(flop_limit, byte_limit)) and over > 1
        assert min(flops, read) > 0 and 0.5 < planned / peak < 2
    for memory, plain in (rows[:2], rows[2:]):
        assert plain[4] == 1 and memory[4] == pytest.approx(memory[2] / plain[2])
        assert memory[5] > plain[5] and memory[7] > plain[7]
    for row, host in zip(rows, sections["What the host does in a step, s"]["rows"], strict=True):
        assert sum(host[2:6]) == pytest.approx(row[2], rel=0.2)
    assert len(sections["The longest kernels of a step"]["rows"]) == 20 * len(rows)
    decoded = [row[:2] for row in sections["Decoding at full size"]["rows"]]
    assert len(decoded) == 7 and [names[0], "decoding 8 tokens with memory"] in decoded


@pytest.fixture
def check(tmp_path) -> Check:
    (tmp_path / "work").mkdir()
    about = {"card": "none", "torch": "none"}
    return Check(tmp_path / "work", tmp_path / "reports", time.monotonic() + 60, dict(os.environ), about)


def python(name: str, code: str, seconds: int = 30) -> Part:
    return Part(name, seconds, [sys.executable, "-c", code])


def test_what_fails_is_said_and_the_rest_goes_on(check, tmp_path):
    table = {"sections": [{"title": "Half", "columns": ["a"], "note": "", "rows": [["one"]]}]}
    (tmp_path / "work" / "bad").mkdir()
    written = f"open({str(tmp_path / 'work' / 'bad' / 'x.json')!r}, 'w').write({json.dumps(table)!r})"
    check.run(python("bad", f"{written}; print('what went wrong'); raise SystemExit(3)"))
    page = tmp_path / "reports" / "gpu-check.md"
    # the second part finds what the first has left
    check.run(python("good", f"assert '| bad | exit code 3 |' in open({str(page)!r}).read()"))
    check.deadline = time.monotonic() + 3
    check.run(python("late", "raise SystemExit(1)"))
    assert [row[:2] for row in check.ended] == [["bad", "exit code 3"], ["good", "well"], ["late", "no time left"]]
    assert check.failed == ["bad", "late"]
    assert "## What bad said last" in page.read_text() and "what went wrong" in page.read_text()
    sections = json.loads(page.with_suffix(".json").read_text())["sections"]
    assert [section["title"] for section in sections] == ["Parts", "Half"]


def test_what_takes_too_long_is_ended_with_all_that_it_has_started(check, tmp_path):
    child = "import time; time.sleep(100)"
    code = f"import subprocess as s, sys; print(s.Popen([sys.executable, '-c', {child!r}]).pid, flush=True); {child}"
    check.run(python("slow", code, seconds=5))
    (row,) = check.ended
    assert row[:2] == ["slow", "stopped at its limit of 5 s"] and 5 <= row[2] < 10
    state, end = Path(f"/proc/{int(row[-1])}/status"), time.monotonic() + 10
    while state.exists() and "zombie" not in state.read_text():
        assert time.monotonic() < end, "it lives on"
        time.sleep(0.1)


def test_wheels_are_put_in_front_and_need_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "wheels").mkdir()
    name = "a_wheel_of_this_test-1.0"
    with zipfile.ZipFile(tmp_path / "wheels" / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_wheel_of_this_test.py", "VALUE = 7\n")
        wheel.writestr("rich/__init__.py", "OURS = True\n")  # which is installed too
        about = {"METADATA": "Metadata-Version: 2.1\nName: a-wheel-of-this-test\nVersion: 1.0\n", "RECORD": ""}
        about["WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        for file, text in about.items():
            wheel.writestr(f"{name}.dist-info/{file}", text)
    gpu_check.install(tmp_path / "site", tmp_path / "wheels")
    environment = gpu_check.environment(tmp_path, tmp_path / "wheels")
    code = "import a_wheel_of_this_test, rich, benchmarks; print(a_wheel_of_this_test.VALUE, rich.OURS)"
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/")
    assert printed.stdout == "7 True\n", printed.stderr
    assert environment["HF_HUB_OFFLINE"] == "1" and not [k for k in environment if k.startswith("PYTEST_")]


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--only", "equalty", "expected the beginning of one of equality, commands"),
        ("--wheels", "/", "expected a folder with .whl files"),
    ],
)
def test_what_is_unknown_is_refused(option, value, says, capsys):
    with pytest.raises(SystemExit) as exit:
        gpu_check.main(["--cpu", option, value])
    assert exit.value.code == 2 and f"{option} {value}: {says}" in capsys.readouterr().err


def test_the_parts_of_a_gpu(tmp_path):
    """Plans are made before what is timed and only read there; the limits leave time for everything."""
    _, together, timed = gpu_check.parts(tmp_path, cpu=False)
    parts = [part for chain in together for part in chain]
    plans = [part for part in parts if part.name.startswith("plan_")]
    assert [part.name.removeprefix("plan_") for part in plans] == [part.name for part in timed] == TIMED
    assert {plan.command[-1] for plan in plans} == {"--plan-only"}
    assert all(part.command[-4:-2] == ["--plans", str(tmp_path / "plans")] for part in timed)
    assert sum(part.seconds for part in timed) < gpu_check.SECONDS
    paths = [path for part in parts for path in part.command if path.startswith("tests/")]
    assert paths and all((gpu_check.ROOT / path).is_file() for path in paths), "tests that are run there exist"


INTERRUPTED = """
import json, signal, sys
from benchmarks import gpu_check
from benchmarks.gpu_check import Part

def parts(folder, cpu):
    (folder / "long").mkdir()
    table = {"sections": [{"title": "Half", "columns": ["a"], "note": "", "rows": [["one"]]}]}
    (folder / "long" / "half.json").write_text(json.dumps(table))
    python = [sys.executable, "-c"]
    timed = [Part("long", 60, [*python, "import time; time.sleep(60)"]), Part("never", 60, [*python, ""])]
    return Part("machine", 60, [*python, ""]), [], timed

gpu_check.parts = parts
signal.signal(signal.SIGTERM, gpu_check._stop)
raise SystemExit(gpu_check.main(["--cpu", "--output", sys.argv[1]]))
"""


def test_an_interrupted_check_leaves_what_it_had(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    process = subprocess.Popen(command, cwd=gpu_check.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("machine: well")
    time.sleep(1)
    process.terminate()
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "long: stopped" in printed
    sections = json.loads((tmp_path / "gpu-check.json").read_text())["sections"]
    assert [row[:2] for row in sections[0]["rows"]] == [["machine", "well"], ["long", "stopped"]]
    assert sections[1]["title"] == "Half" and sections[1]["rows"] == [["one"]]
