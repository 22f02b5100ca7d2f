"""Retrieval by context length: a model is asked for the needles in texts it has not seen, and what it finds counted."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import fresh_python
import pytest
import torch
from data_files import HOTPOTQA_ROWS, message_of
from rich.console import Console
from small_run import RECIPE

from dllm_memdlm.config import DataConfig
from dllm_memdlm.data import load_rows
from dllm_memdlm.evaluation import needle
from dllm_memdlm.evaluation.needle import found, held_out
from dllm_memdlm.inference.arguments import parse
from dllm_memdlm.inference.decoding import Decoder
from dllm_memdlm.machine import package_versions
from dllm_memdlm.training import run
from dllm_memdlm.training.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("caches_of_runs")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, caches_of_runs) -> Path:
    """A model that was trained for two steps, on half of the rows; it evaluates on two of the others."""
    folder = tmp_path_factory.mktemp("needle")
    (folder / "rows.json").write_text(json.dumps(HOTPOTQA_ROWS), encoding="utf-8")
    data = "format: needle, needle_words: [20], needle_count: 3, eval_size: 2, eval_fraction: 0.5"
    text = RECIPE.replace("dataset: DATASET, eval_fraction: 0.2", f"dataset: {folder / 'rows.json'}, {data}")
    (folder / "needle.yaml").write_text(text, encoding="utf-8")
    torch.set_num_threads(1)
    run.train(load_recipe(folder / "needle.yaml", [f"training.output_dir={folder / 'run'}", "training.max_steps=2"]))
    return folder / "run"


@pytest.fixture
def data(run_dir) -> DataConfig:
    return load_recipe(run_dir / "recipe.yaml").data


def decoder_of(run_dir: Path, memory: bool = False) -> Decoder:
    return parse({"pretrained": str(run_dir), "memory": memory, "sampler": "mdlm"}).open()


# --- the questions -------------------------------------------------------------------------------------------------


def test_what_is_asked_was_neither_trained_nor_evaluated_on(data):
    def books_of(rows) -> list[str]:
        return [row["context"]["sentences"][0][0].rpartition(" ")[2] for row in rows]

    trained, evaluated = map(books_of, load_rows(data))
    asked = held_out(data, 40, 100)
    books = [example.prompt.partition("Ann wrote book ")[2].split()[0] for example in asked]
    assert (len(trained), len(evaluated), len(asked)) == (10, 2, 8), "all that are left"
    assert len({*trained, *evaluated, *books}) == 20
    assert books_of(load_rows(replace(data, eval_size=None))[1]) == evaluated + books, "in their order"
    assert held_out(data, 40, 3) == asked[:3]


def test_only_the_text_grows_with_its_length(data):
    short, long = held_out(data, 15, 5), held_out(data, 45, 5)
    assert [(e.values, e.response) for e in short] == [(e.values, e.response) for e in long]
    for examples, words in ((short, 15), (long, 45)):
        assert {len(example.prompt.partition("\n\n")[0].split()) for example in examples} == {words}
        assert {len(example.values) for example in examples} == {3}


@pytest.mark.parametrize("changes", [{"eval_size": 10}, {"eval_size": None}, {"eval_fraction": 0.0}])
def test_where_no_row_is_left_it_is_said(data, changes):
    """Behind those that training evaluates on there is none."""
    assert message_of(held_out, replace(data, **changes), 40, 5).startswith("data.")


def test_rows_of_another_form_are_refused(data, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "?", "output": "!"}] * 20))
    assert "context" in message_of(held_out, replace(data, dataset=str(tmp_path / "rows.json")), 40, 5)


# --- the answers ---------------------------------------------------------------------------------------------------


def answers_from(examples: list, kept: dict[int, str], monkeypatch) -> list[list[str]]:
    """Decoding answers some of the examples, by number, with a text; the others with nothing. → the batches."""
    batches = []

    def answers(self, prompts, new_tokens):
        tokenizer = self.pretrained.tokenizer
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        numbers = [next((n for n, example in enumerate(examples) if example.prompt in t), None) for t in texts]
        batches.append(texts)
        tokens = [tokenizer(kept.get(number, ""))["input_ids"] for number in numbers]
        assert all(len(own) < new_tokens for own in tokens), "there is room for the end"
        return [[*own, tokenizer.eos_token_id] for own in tokens]

    monkeypatch.setattr(Decoder, "answers", answers)
    return batches


@pytest.mark.parametrize(("batch_size", "sizes"), [(2, [2, 2, 1]), (5, [5]), (25, [5])])
def test_right_answers_count_for_the_text_they_are_of(run_dir, data, monkeypatch, batch_size, sizes):
    examples = held_out(data, 20, 5)
    first_value = next(iter(examples[3].values.items()))
    kept = {0: examples[0].response, 3: " ".join(first_value), 4: examples[2].response}
    batches = answers_from(examples, kept, monkeypatch)
    expected = [3, 0, 0, 1, examples[4].right(examples[2].response)]
    assert expected[4] < 3
    assert found(decoder_of(run_dir), examples, batch_size) == expected
    assert [len(batch) for batch in batches] == sizes
    for example, text in zip(examples, itertools.chain(*batches), strict=True):
        assert text.startswith("<|user|>") and text.endswith("<|assistant|>") and example.prompt in text


@pytest.mark.parametrize("memory", [False, True])
def test_a_text_is_answered_with_the_memory_of_itself(run_dir, data, monkeypatch, memory):
    examples, seen, answers = held_out(data, 20, 3), [], Decoder.answers
    decoder, other, plain = (decoder_of(run_dir, given) for given in (memory, memory, False))

    def spy(self, prompts, new_tokens):
        with other.recalled(prompts):
            logits = [d.pretrained.model(torch.tensor(prompts)).logits for d in (self, other, plain)]
        seen.append((torch.equal(logits[0], logits[1]), torch.equal(logits[0], logits[2])))
        return answers(self, prompts, new_tokens)

    monkeypatch.setattr(Decoder, "answers", spy)
    assert len(found(decoder, examples, 1)) == 3
    assert seen == [(True, not memory)] * 3


# --- the command ---------------------------------------------------------------------------------------------------


def asked(run_dir: Path, output: Path, *arguments: str) -> dict[str, Any]:
    given = ["--model", str(run_dir), "--output", str(output), "--questions", "5", "--batch-size", "2"]
    assert needle.main([*given, *arguments]) == 0
    assert [path.name for path in output.parent.iterdir()] == [output.name], "nothing half-written is left"
    return json.loads(output.read_text())


def test_a_model_is_asked_with_and_without_memory(run_dir, tmp_path, capsys):
    for memory in (False, True):
        output = tmp_path / f"new{memory}" / "needle.json"
        report = asked(run_dir, output, *["--memory"] * memory, "--words", "15", "25")
        assert list(report) == ["model", "memory", "questions", "scores", *["memory_tally"] * memory, "versions"]
        assert report.get("memory_tally", {}).get("written") == (2 * 5 if memory else None)
        assert (report["model"], report["memory"], report["questions"]) == (str(run_dir), memory, 5)
        assert report["versions"] == package_versions()
        assert [(row["words"], row["asked"]) for row in report["scores"]] == [(15, 15), (25, 15)]
        assert all(0 <= row["right"] <= row["asked"] for row in report["scores"])
        out = capsys.readouterr().out
        assert "15 words" in out and "25 words" in out and out.rstrip().endswith(str(output))


def test_the_report_has_what_was_found(run_dir, data, tmp_path, monkeypatch, capsys):
    examples = held_out(data, 20, 5)
    answers_from(examples, {1: examples[1].response, 2: examples[2].response}, monkeypatch)
    report = asked(run_dir, tmp_path / "new" / "needle.json", "--words", "20")
    assert report["scores"] == [{"words": 20, "right": 6, "asked": 15}] and "40.0%" in capsys.readouterr().out
    report = asked(run_dir, tmp_path / "new" / "needle.json", "--words", "20", "--questions", "100")
    assert report["scores"] == [{"words": 20, "right": 6, "asked": 8 * 3}] and report["questions"] == 8, "what is left"


def test_settings_stand_before_the_lengths(run_dir, tmp_path):
    report = asked(run_dir, tmp_path / "a" / "needle.json", "memory_inner_lr=0.0", "--words", "15")
    assert report["memory"] is True, "a setting of the memory asks for it"


def test_the_table_has_a_column_a_length():
    console = Console(width=80, record=True)
    console.print(needle.table([{"words": 40, "right": 3, "asked": 8}, {"words": 320, "right": 8, "asked": 8}]))
    rows = [[cell.strip() for cell in line.split(bar)] for line in console.export_text().splitlines() for bar in "│┃"]
    assert ["", "40 words", "320 words", ""] in rows and ["", "37.5%", "100.0%", ""] in rows


def error_of(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    capsys.readouterr()
    assert needle.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: "), captured.err
    return captured.err.removeprefix("error: ").rstrip()


def test_what_the_user_can_correct_is_one_line(run_dir, tmp_path, capsys):
    output = tmp_path / "needle.json"
    given = ("--model", str(run_dir), "--output", str(output), "--words")
    assert error_of(capsys, *given, "11").startswith("data.needle_words=11: expected at least 12")
    assert error_of(capsys, "temprature=1", *given, "20").startswith(
        "unknown model argument 'temprature'; did you mean"
    )
    assert error_of(capsys, "--model", str(tmp_path / "none"), "--output", str(output), "--words", "20").startswith(
        f"{tmp_path}/none/recipe.yaml: no such recipe file"
    )
    assert error_of(capsys, "--model", str(run_dir), "--output", str(tmp_path), "--words", "20").startswith(
        f"--output {tmp_path}: a folder"
    )
    assert not output.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--words", "20", "--questions", "0"],
        ["--words", "20", "--batch-size", "0"],
        ["--words", "twenty"],
        ["--words"],
        ["--questions", "5"],
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        needle.main(["--model", "nowhere", "--output", "needle.json", *arguments])
    assert stopped.value.code == 2 and "usage: python -m dllm_memdlm.evaluation.needle " in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    code = "import json, sys; import dllm_memdlm.evaluation.needle; print(json.dumps('torch' in sys.modules))"
    assert fresh_python.printed(fresh_python.run("-c", code)) is False
