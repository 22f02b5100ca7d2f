"""Retrieval by context length: a model is asked for the needles in texts it has not seen, and the scores summed up."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from small_run import RECIPE

from dllm_memdlm import run
from dllm_memdlm.data import load_rows, needle_examples
from dllm_memdlm.decoding import Decoder
from dllm_memdlm.evaluation import needle
from dllm_memdlm.evaluation.needle import Score
from dllm_memdlm.recipe import load_recipe

SENTENCES = ["It has two parts, and a preface.", "Bob read it twice.", "He liked the second part best."]
ROWS = [
    {
        "question": f"Who wrote book {i}?",
        "answer": "Ann",
        "supporting_facts": [["Ann", 0]],
        "context": [["Ann", [f"Ann wrote book {i}.", *SENTENCES]]],
    }
    for i in range(20)
]


@pytest.fixture
def run_dir(tmp_path, as_from_a_shell):
    """A model that was trained for two steps, on half of the rows; it evaluates on two of the others."""
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    data = "format: needle, needle_words: [20], needle_count: 3, eval_size: 2, eval_fraction: 0.5"
    text = RECIPE.replace("dataset: DATASET, eval_fraction: 0.2", f"dataset: {tmp_path / 'rows.json'}, {data}")
    (tmp_path / "needle.yaml").write_text(text, encoding="utf-8")
    folder = tmp_path / "run"
    run.train(load_recipe(tmp_path / "needle.yaml", [f"training.output_dir={folder}", "training.max_steps=2"]))
    return folder


def test_a_model_is_asked_with_and_without_memory(run_dir):
    scores = needle.score(run_dir, "MemDLM", 7, (15, 25), questions=5, batch_size=2)
    assert [(s.method, s.seed, s.memory, s.words) for s in scores] == [
        ("MemDLM", 7, False, 15),
        ("MemDLM", 7, True, 15),
        ("MemDLM", 7, False, 25),
        ("MemDLM", 7, True, 25),
    ]
    assert all(s.asked == 5 * 3 and 0 <= s.right <= s.asked for s in scores)
    assert [s.memory for s in needle.score(run_dir, "MDLM", 7, (15,), questions=5, batch_size=2)] == [False]


@pytest.fixture
def asked(monkeypatch):
    """The rows that examples are made of, and the examples."""
    rows, examples = [], []

    def record(given, words, count):
        rows.extend(given)
        examples.extend(needle_examples(given, words, count))
        return examples[-len(given) :]

    monkeypatch.setattr("dllm_memdlm.data.needle_examples", record)
    return rows, examples


def test_what_is_asked_was_neither_trained_nor_evaluated_on(run_dir, asked):
    needle.score(run_dir, "MDLM", 7, (15,), questions=100, batch_size=4)
    known = [row["context"] for rows in load_rows(load_recipe(run_dir / "recipe.yaml").data) for row in rows]
    assert len(asked[0]) == 20 - len(known) == 8
    assert not [row for row in asked[0] if row["context"] in known]


def test_right_answers_count(run_dir, asked, monkeypatch):
    def first_of_each_batch(self, prompts, new_tokens):
        tokenizer = self.pretrained.tokenizer
        text = tokenizer.decode(prompts[0])
        (response,) = {example.response for example in asked[1] if example.prompt in text}
        return [tokenizer(response)["input_ids"], *([] for _ in prompts[1:])]

    monkeypatch.setattr(Decoder, "answers", first_of_each_batch)
    (score,) = needle.score(run_dir, "MDLM", 7, (15,), questions=4, batch_size=2)
    assert (score.right, score.asked) == (2 * 3, 4 * 3)


def test_the_summary_is_of_the_seeds():
    scores = [
        Score("MDLM", 1, False, 40, 10, 20),
        Score("MDLM", 2, False, 40, 20, 20),
        Score("MemDLM", 1, True, 40, 5, 20),
    ]
    mdlm, memdlm = needle.summary(scores)
    assert (mdlm["mean"], mdlm["seeds"]) == (0.75, [0.5, 1.0])
    assert mdlm["stdev"] == pytest.approx(0.35355339)
    assert (memdlm["mean"], memdlm["stdev"], memdlm["memory"]) == (0.25, None, True)
    console = Console(width=120, record=True)
    console.print(needle.table([mdlm, memdlm]))
    text = console.export_text()
    assert "75.0 ± 35.4" in text and "MemDLM, memory on" in text and "25.0" in text
