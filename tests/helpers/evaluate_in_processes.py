"""Runs in each of several processes: evaluations of the local tasks, whose results the first process writes down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from local_tasks import data_in, evaluate, responses

from dllm_memdlm.evaluation import plugin

TASKS = ("tiny_generate", "tiny_choose", "tiny_roll")
#: What is evaluated: arguments of the model, and tasks.
RUNS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "off": ({}, TASKS),
    "prompt": ({"memory": True}, TASKS),
    "prefix": ({"memory": True, "memory_scope": "prefix"}, ("tiny_generate",)),
    "sampled": ({}, ("tiny_sample",)),
}


def evaluate_all(model: str, tasks: Path) -> dict[str, Any]:
    """Answers and scores of every run, by name; empty on all processes but the first."""
    plugin.install()
    found = {}
    for name, (arguments, names) in RUNS.items():
        results = evaluate(tasks, list(names), {"pretrained": model, "mc_num": 4, **arguments}, batch_size=2)
        if results is not None:
            scores = [results["results"][task] for task in names]
            tally = results["config"].get("memory_tally")
            found[name] = {"answers": [responses(results, t) for t in names], "scores": scores, "tally": tally}
    return found


def write_all(model: str, tasks: Path, file: Path) -> None:
    """What `evaluate_all` has found, as JSON."""
    with data_in(file.parent / "datasets"):
        results = evaluate_all(model, tasks)
    if results:
        file.write_text(json.dumps(results), encoding="utf-8")
