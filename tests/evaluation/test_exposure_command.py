"""Exposure bias as a command: what it writes, and what it refuses (more of that is in bad_inference.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fresh_python
import pytest
from conftest import AMPLIFIED, ARCHITECTURES
from saved_models import byte_tokenizer, save_model
from steps import SMALL

from dllm_memdlm.data import load_rows
from dllm_memdlm.evaluation import exposure_bias as command
from dllm_memdlm.evaluation.exposure_bias import exposure_bias, held_out
from dllm_memdlm.inference.arguments import parse
from dllm_memdlm.machine import package_versions
from dllm_memdlm.training.recipe import load_recipe

ROWS = [{"instruction": f"Say {i} twice, please.", "output": f"{i} and {i}" + "." * (i % 7)} for i in range(20)]


@pytest.fixture
def folder(tmp_path, as_from_a_shell) -> str:
    """A model with its recipe, as a run leaves them, that holds 5 of 20 examples out."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    recipe = {
        "model": {"architecture": ARCHITECTURES["llada_moe"], "dtype": "float32"},
        "data": {"dataset": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.25},
        "memory": {**SMALL, **AMPLIFIED["llada_moe"]},
        "training": {"max_steps": 2, "bf16": False},
    }
    return save_model(tmp_path / "run", "llada_moe", byte_tokenizer(), recipe)


def measured(folder: str, *arguments: str) -> dict[str, Any]:
    output = Path(folder) / "new" / "eb.json"
    assert command.main(["--model", folder, "--steps", "5", "--output", str(output), *arguments]) == 0
    assert [path.name for path in output.parent.iterdir()] == ["eb.json"], "nothing half-written is left"
    return json.loads(output.read_text())


def test_held_out_examples_are_the_runs_own(folder):
    tokenizer, data = byte_tokenizer(), load_recipe(f"{folder}/recipe.yaml").data
    rows, examples = load_rows(data)[1].rows, held_out(data, tokenizer, 3)
    assert held_out(data, tokenizer, 100)[:3] == examples and len(held_out(data, tokenizer, 100)) == 5 == len(rows)
    for example, row in zip(examples, rows.select(range(3)), strict=True):
        assert tokenizer.decode(example.prompt) == f"<|user|>{row['instruction']}<|role_end|><|assistant|>"
        assert tokenizer.decode(example.response) == f"{row['output']}<|role_end|>"


def test_the_command_writes_what_the_function_finds(folder, tmp_path, capsys):
    without, with_memory = measured(folder), measured(folder, "--memory", "--batch-size", "2", "--seed", "3")
    for report, memory, seed in ((without, False, 0), (with_memory, True, 3)):
        decoder = parse({"pretrained": folder, "memory": memory, "seed": seed}).open()
        data = load_recipe(f"{folder}/recipe.yaml").data
        expected = exposure_bias(decoder, held_out(data, decoder.pretrained.tokenizer, 64), 5, 1, seed)
        tally = ["memory_tally"] * memory
        assert list(report) == ["model", "memory", "whose", "examples", "dropped", "seed", "steps", *tally, "versions"]
        assert (report["model"], report["memory"], report["seed"]) == (folder, memory, seed)
        assert (report["examples"], report["dropped"], report["versions"]) == (5, 0, package_versions())
        assert [step.pop("ratio") for step in report["steps"]] == pytest.approx([s.ratio for s in expected], rel=1e-4)
        assert report["steps"] == [pytest.approx(step._asdict(), rel=1e-4) for step in expected]
    assert without["steps"][0]["static"] != pytest.approx(with_memory["steps"][0]["static"], abs=0.01)
    examples = held_out(data, decoder.pretrained.tokenizer, 64)
    following = [own._replace(read=examples[n].prompt) for n, own in enumerate(examples, 1 - len(examples))]
    other = measured(folder, "--whose", "other", "--seed", "3")
    assert (other["memory"], other["whose"], with_memory["whose"], without["whose"]) == (True, "other", "own", "none")
    expected = [step.sequential for step in exposure_bias(decoder, following, 5, 1, seed)]
    assert [step["sequential"] for step in other["steps"]] == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx([step["sequential"] for step in with_memory["steps"]], rel=1e-3)
    output = ("--model", folder, "--output", str(tmp_path / "no.json"))
    for given, says in (
        (("--whose", "none", "--memory"), "--whose none: expected no setting of a memory beside it"),
        (
            ("--whose", "other", "--examples", "1"),
            "--whose other: expected at least two examples, of which there are 1",
        ),
    ):
        assert command.main([*output, *given]) == 2
        assert says in capsys.readouterr().err
    still = measured(folder, "memory_inner_lr=0.0", "seed=3")
    capsys.readouterr()
    plainly = measured(folder, "--seed", "3", "--examples", "5")
    assert still["memory"] and still["steps"] == [pytest.approx(step) for step in plainly["steps"]]
    shown = capsys.readouterr().out
    assert "R_EB" in shown and f"{plainly['steps'][4]['sequential']:.4f}" in shown and "5 examples, 0 dropped" in shown


def test_too_long_examples_are_dropped_and_counted_and_without_any_it_ends_in_one_line(folder, capsys):
    examples = held_out(load_recipe(f"{folder}/recipe.yaml").data, byte_tokenizer(), 9)
    lengths = sorted(example.length for example in examples)
    report = measured(folder, f"max_length={lengths[2]}")
    assert report["dropped"] == sum(length > lengths[2] for length in lengths) == 5 - report["examples"] > 0
    assert f"{report['dropped']} dropped as too long" in capsys.readouterr().out
    assert measured(folder, "--examples", "2")["examples"] == 2
    recipe = Path(folder) / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("eval_fraction: 0.25", "eval_fraction: 0.0"))
    capsys.readouterr()
    assert command.main(["--model", folder, "--output", f"{folder}/none.json"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: data.eval_fraction=0.0: ") and captured.err.count("\n") == 1
    assert captured.out == "" and not (Path(folder) / "none.json").exists()


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--examples", "0"]])
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--model", "nowhere", "--output", "eb.json", *arguments])
    assert stop.value.code == 2 and "usage: python -m dllm_memdlm.evaluation.exposure_bias" in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    heavy = '{"torch", "transformers", "datasets", "lm_eval", "numpy"} & sys.modules.keys()'
    code = f"import json, sys; import dllm_memdlm.evaluation.exposure_bias; print(json.dumps(sorted({heavy})))"
    assert fresh_python.printed(fresh_python.run("-c", code)) == []
