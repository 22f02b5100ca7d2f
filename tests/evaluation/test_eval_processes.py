"""Two processes answer the requests of an evaluation as one does, whoever gets which document."""

from __future__ import annotations

import json
from typing import Any

import pytest
from processes import launch
from saved_models import byte_tokenizer, save_model

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'dllm-memdlm[eval]'")

import evaluate_in_processes
from local_tasks import ROWS, data_in, write_tasks

pytestmark = pytest.mark.slow  # both processes import lm-eval

MEMORY = {"rank": 4, "alpha": 8.0, "layer_fraction": 0.4, "inner_lr": 1.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same evaluations in this process, and in two as torchrun starts them (gloo)."""
    folder = tmp_path_factory.mktemp("processes")
    model = save_model(folder / "model", "llama", byte_tokenizer(), {"memory": MEMORY})
    (folder / "tasks").mkdir()
    tasks = write_tasks(folder / "tasks")
    launch(2, folder, evaluate_in_processes.write_all, model, tasks, folder / "results.json")
    with data_in(folder / "datasets"):
        one = evaluate_in_processes.evaluate_all(model, tasks)
    return json.loads(json.dumps(one)), json.loads((folder / "results.json").read_text())


def same(found: Any, expected: Any) -> bool:
    """Answers, or likelihoods with whether they are greedy; numbers up to rounding."""
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == (pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("run", ["off", "prompt"])
def test_two_processes_answer_and_score_as_one(run, runs):
    for one, two in zip(*(found[run]["answers"] for found in runs), strict=True):
        assert len(two) == len(ROWS), "every document once, though they do not divide by two"
        # the process with fewer documents answers its last one twice, so that both work on as many
        answers, expected = ([[request[0] for request in document] for document in found] for found in (two, one))
        assert same(answers, expected)
    for one, two in zip(*(found[run]["scores"] for found in runs), strict=True):
        assert two["sample_len"] == len(ROWS) and one.keys() == two.keys()
        numbers = {name: value for name, value in one.items() if isinstance(value, float)}
        assert numbers == pytest.approx({name: two[name] for name in numbers}, rel=1e-5)


def test_memories_make_a_difference_and_prefixes_are_shared_within_a_process(runs):
    off, prompt, prefix = (runs[0][run]["answers"][0] for run in ("off", "prompt", "prefix"))
    assert off != prompt != prefix and len(runs[1]["prefix"]["answers"][0]) == len(ROWS)
    assert runs[1]["prefix"]["tally"]["written"] < runs[1]["prompt"]["tally"]["written"]
    one, two = ([document[0][0] for document in found["sampled"]["answers"][0]] for found in runs)
    assert one == two and len(set(one)) == len(ROWS), "the same prompt is sampled anew in every process"
