"""Retrieval by context length: a model is asked for the needles in texts it has not seen, and what it finds counted."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import message_of, needle_rows
from small_run import RECIPE

from dllm_memdlm.config import DataConfig
from dllm_memdlm.data import load_rows
from dllm_memdlm.data.encoding import Encoder
from dllm_memdlm.inference.arguments import parse
from dllm_memdlm.inference.decoding import Decoder
from dllm_memdlm.machine import package_versions
from dllm_memdlm.training import run
from dllm_memdlm.training.recipe import load_recipe
from reproduce import needle
from reproduce.needle import Planted, found, held_out, plant, summary


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A model that was trained for two steps, on half of the rows; it evaluates on two of the others."""
    folder = tmp_path_factory.mktemp("needle")
    (folder / "rows.json").write_text(json.dumps(needle_rows()), encoding="utf-8")
    data = f"dataset: {folder / 'rows.json'}, eval_size: 2, eval_fraction: 0.5"
    (folder / "needle.yaml").write_text(RECIPE.replace("dataset: DATASET, eval_fraction: 0.2", data))
    run.train(load_recipe(folder / "needle.yaml", [f"training.output_dir={folder / 'run'}", "training.max_steps=2"]))
    return folder / "run"


@pytest.fixture
def data(run_dir) -> DataConfig:
    return load_recipe(run_dir / "recipe.yaml").data


def asked(data: DataConfig, questions: int) -> list[Planted]:
    return [plant(haystack, 40) for haystack in held_out(data, questions)]


def decoder_of(run_dir: Path, memory: bool = False) -> Decoder:
    return parse({"pretrained": str(run_dir), "memory": memory, "sampler": "mdlm"}).open()


def test_what_is_asked_was_neither_trained_nor_evaluated_on(data):
    trained, evaluated = ([text.split("\n") for text in source.rows["haystack"]] for source in load_rows(data))
    rest = held_out(data, 100)
    assert (len(trained), len(evaluated), len(rest)) == (10, 2, 8), "all that are left"
    assert len({text[0] for text in trained + evaluated + rest}) == 20
    whole = load_rows(replace(data, eval_size=None))[1].rows["haystack"][:]
    assert [text.split("\n") for text in whole] == evaluated + rest, "in their order"
    assert held_out(data, 3) == rest[:3]


def test_where_no_row_is_left_or_rows_have_no_text_it_is_said(data, tmp_path):
    for changes in ({"eval_size": 10}, {"eval_size": None}, {"eval_fraction": 0.0}):
        assert message_of(held_out, replace(data, **changes), 5).startswith("data.eval_size=")
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "?", "output": "!"}] * 20))
    assert "expected a haystack" in message_of(held_out, replace(data, dataset=str(tmp_path / "rows.json")), 5)


def test_an_answer_is_scored_by_key():
    example = plant(["Ann wrote a book."], 60, 3)
    (first, value), *rest = example.values.items()
    assert example.right(example.response) == example.values.keys() == example.planted_in(example.prompt)
    assert example.right(f"{first} {value}") == {first}
    assert example.right(f"Named: {first} {value}s {first} {value}") == set(), "the first value named counts"
    assert example.right(" ".join(f"{key} {value}" for key, _ in rest)) == example.right("") == set()


def answers_from(examples: list[Planted], kept: dict[int, str], monkeypatch) -> list[list[str]]:
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


@pytest.mark.parametrize(("batch_size", "sizes"), [(2, [2, 2, 1]), (25, [5])])
def test_right_answers_count_for_the_text_they_are_of(run_dir, data, monkeypatch, batch_size, sizes):
    examples = asked(data, 5)
    first_value = next(iter(examples[3].values.items()))
    batches = answers_from(examples, {0: examples[0].response, 3: " ".join(first_value)}, monkeypatch)
    assert [len(each.right) for each in found(decoder_of(run_dir), examples, batch_size)] == [8, 0, 0, 1, 0]
    assert [len(batch) for batch in batches] == sizes
    for example, text in zip(examples, itertools.chain(*batches), strict=True):
        assert text.startswith("<|user|>") and text.endswith("<|assistant|>") and example.prompt in text


@pytest.mark.parametrize("memory", [False, True])
def test_a_text_is_answered_with_the_memory_of_itself(run_dir, data, monkeypatch, memory):
    examples, seen, answers = asked(data, 2), [], Decoder.answers
    decoder, other, plain = (decoder_of(run_dir, given) for given in (memory, memory, False))

    def spy(self, prompts, new_tokens):
        with other.recalled(prompts):
            logits = [d.pretrained.model(torch.tensor(prompts)).logits for d in (self, other, plain)]
        seen.append((torch.equal(logits[0], logits[1]), torch.equal(logits[0], logits[2])))
        return answers(self, prompts, 4)

    monkeypatch.setattr(Decoder, "answers", spy)
    assert len(found(decoder, examples, 1)) == 2
    assert seen == [(True, not memory)] * 2


def test_the_report_has_what_was_found(run_dir, data, tmp_path, monkeypatch, capsys):
    examples, path = asked(data, 5), tmp_path / "new" / "needle.json"
    answers_from(examples, {1: examples[1].response, 2: examples[2].response}, monkeypatch)

    def report_of(*arguments: str) -> dict[str, Any]:
        given = ["--model", str(run_dir), "--output", str(path), "--questions", "5", "--batch-size", "2"]
        assert needle.main([*given, *arguments]) == 0
        assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing half-written is left"
        return json.loads(path.read_text())

    (row,) = report_of("--words", "40", "--planted", "3")["scores"]
    assert row == {"words": 40, "whose": "none", "right": 0, "asked": 5 * 3}, "other texts and questions"
    report = report_of("--words", "40", "50")
    scores = [{"words": w, "whose": "none", "right": right, "asked": 40} for w, right in ((40, 16), (50, 0))]
    told = {"model": str(run_dir), "memory": False, "questions": 5}
    assert report == {**told, "scores": scores, "versions": package_versions()}
    out = capsys.readouterr().out
    assert "40 words" in out and "40.0%" in out and out.rstrip().endswith(str(path))
    report = report_of("memory_inner_lr=0.0", "--words", "40", "--questions", "100")
    assert (
        report["scores"] == [{"words": 40, "whose": "own", "right": 16, "asked": 8 * 8}] and report["questions"] == 8
    ), "what is left"
    assert report["memory"] is True, "a setting of the memory asks for it"
    assert report["memory_tally"]["written"] == 8


def test_words_that_the_model_does_not_see_are_counted_apart(run_dir, data, monkeypatch):
    """By what of the prompt it is given; with the control, a memory of the next text is in place."""
    examples, texts = asked(data, 3), []
    decoder = parse({"pretrained": str(run_dir), "memory": True, "memory_window": 40, "visible": 100}).open()
    recalled = Decoder.recalled
    monkeypatch.setattr(Decoder, "recalled", lambda self, given, *more: texts.append(given) or recalled(self, given))
    answers_from(examples, {}, monkeypatch)
    monkeypatch.setattr(Decoder, "answers", lambda self, prompts, new_tokens: [response[-new_tokens:]] * len(prompts))
    response = decoder.pretrained.tokenizer(examples[0].response)["input_ids"]
    own, others, _ = (found(decoder, examples, 25, whose) for whose in ("own", "other", "none"))
    assert others[0].right == own[0].right == examples[0].values.keys()
    row = summary(own)
    assert row["visible"]["asked"] + row["hidden"]["asked"] == row["asked"] == 24
    assert all(each.visible | each.hidden == example.values.keys() for example, each in zip(examples, own, strict=True))
    assert row["visible"]["right"] + row["hidden"]["right"] == row["right"] and 0 < row["visible"]["asked"] < 24
    for example, each in zip(examples, own, strict=True):
        end = example.prompt[-60:]
        assert {key for key, value in example.values.items() if f"{value}." in end} <= each.visible
    assert texts[2] == [*texts[0][1:], texts[0][0]] and all(len(text) > 100 for text in texts[0])
    assert texts[4] == [None] * 3
    # nats of the values alone: of the same masks as by hand
    ids, mask = examples[0].tokens(Encoder(decoder.pretrained.tokenizer), {"bird"} & examples[0].values.keys())
    assert decoder.pretrained.tokenizer.decode(torch.tensor(ids)[mask]).strip() in ("", examples[0].values.get("bird"))
    assert all(isinstance(value, float) and value >= 0 for each in own for value in each.nll.values())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["temprature=1"], "unknown model argument 'temprature'; did you mean"),
        (["--model", "nowhere"], "nowhere/recipe.yaml: no such recipe file"),
        (["--output", "."], "--output .: Is a directory"),
    ],
)
def test_what_the_user_can_correct_is_one_line(run_dir, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert needle.main(["--model", str(run_dir), "--words", "40", "--output", "needle.json", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"error: {says}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--words", "31"],
        ["--words", "40", "--questions", "0"],
        ["--words", "40", "--batch-size", "0"],
        ["--words", "80", "--planted", "11"],
        ["--words", "11", "--planted", "3"],
        [],
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        needle.main(["--model", "nowhere", "--output", "needle.json", *arguments])
    assert stopped.value.code == 2 and "usage: python -m reproduce.needle " in capsys.readouterr().err
