"""The lm-eval configurations of recipes/eval: what they ask is known to lm-eval, and complete."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny
from saved_models import decoder_with

from dllm_memdlm.evaluation.generation import read_prompts
from dllm_memdlm.inference.samplers.llada21 import Rows

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.stem: path for path in sorted((ROOT / "recipes" / "eval").glob("*.yaml"))}
SETTINGS: dict[str, dict[str, Any]] = {name: yaml.safe_load(path.read_text("utf-8")) for name, path in FILES.items()}
COMMANDS = {name: path.read_text("utf-8").partition("\n")[0] for name, path in FILES.items()}
BENCHMARKS = ("ruler", "babilong", "longbench")
# What the paper scores: its tables 1 to 3
SUBSET = {
    "ruler": {"niah_multivalue", "ruler_vt", "ruler_cwe"},
    "babilong": {"babilong_longctx"},
    "longbench": {
        f"longbench_{name}"
        for name in (
            *("triviaqa", "passage_retrieval_en", "passage_retrieval_zh", "multifieldqa_en", "multifieldqa_zh"),
            *("2wikimqa", "dureader", "multi_news", "trec", "samsum", "lcc", "repobench-p"),
        )
    },
}


@pytest.fixture(scope="module")
def manager():
    """Knows the tasks of these benchmarks only: indexing all of lm-eval's takes seconds. Reads no data."""
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs lm-eval: pip install 'dllm-memdlm[eval]'")
    folder = Path(tasks.__file__).parent
    return tasks.TaskManager(include_defaults=False, include_path=[folder / name for name in BENCHMARKS])


@pytest.mark.parametrize("name", FILES)
def test_lm_eval_takes_every_key_and_knows_every_task(name, manager):
    from lm_eval.config.evaluate_config import EvaluatorConfig

    given, path = SETTINGS[name], FILES[name]
    loaded = dataclasses.asdict(EvaluatorConfig.from_config(path))
    assert {key: loaded[key] for key in given} == given
    assert (given["model"], given["output_path"]) == ("memdlm", f"runs/eval/{name}")
    assert "model_args" not in given, "--model_args replaces them as a whole: they would be lost without a word"
    found = re.findall(r"^# .*lm_eval run --config (\S+).*pretrained=", COMMANDS[name])
    assert found == [str(path.relative_to(ROOT))]
    assert all(manager.match_tasks([task]) == [task] for task in given["tasks"])
    assert set(given.get("samples", given["tasks"])) == set(given["tasks"])
    for asked in given.get("samples", {}).values():
        assert asked == sorted(set(asked)), "out of order, lm-eval logs the answers under each other's numbers"


def test_the_papers_tasks_and_settings(manager):
    ruler, babilong, longbench = (SETTINGS[name] for name in BENCHMARKS)
    assert ruler["metadata"] == {"max_seq_lengths": [4096, 8192, 16384, 32768]}
    assert babilong["metadata"] == {"max_seq_lengths": "1k"}  # one length a run, and 0k without
    assert [given["num_fewshot"] for given in (ruler, babilong, longbench)] == [0, 2, 0]
    for name in BENCHMARKS:
        given = SETTINGS[name]
        assert sorted(given["tasks"]) == sorted(SUBSET[name])
        # every question, and answers of the length that the task sets
        assert not {"limit", "samples"} & set(given) and "max_gen_toks" not in given["gen_kwargs"]
        # a prompt that is cut gets no memory, and LLaDA-MoE alone would cut at 8,192
        assert "memory=true,max_length=65536" in COMMANDS[name]
    assert "for n in 1k 2k 4k 8k 16k 32k; do " in COMMANDS["babilong"]
    assert "--metadata max_seq_lengths=$n " in COMMANDS["babilong"]
    group = manager.task_index["babilong_longctx"].cfg  # those that come at each length
    assert group["task"] == [f"babilong_qa{number}" for number in range(1, 6)]


@pytest.mark.parametrize(("new_tokens", "steps"), [(16, 16), (30, 30), (32, 32), (128, 32)])
def test_the_papers_decoding_of_llada21(new_tokens, steps):
    """Its code edits no token and takes min(32, max_gen_toks) steps a block; the sampler's own defaults are dllm's."""
    decoder, (name, *others) = decoder_with(None, tiny("llada2")), BENCHMARKS
    assert all(SETTINGS[other]["gen_kwargs"] == SETTINGS[name]["gen_kwargs"] for other in others)
    asked = {"max_gen_toks": new_tokens, "until": [], **SETTINGS[name]["gen_kwargs"]}
    (prompt,) = read_prompts([("", asked)], [None], lambda text: [3], decoder, default_new_tokens=1, seed=0)
    config = decoder.config_for(prompt.new_tokens, **prompt.changes)
    assert (config.editing_threshold, config.block_size, config.threshold) == (None, 32, 0.95)
    rows = Rows([1], config, torch.device("cpu"))
    shares = []
    for _ in range(steps):
        shares.append(int(rows.quota()))
        rows.steps += 1
    assert sum(shares) == 32 and max(shares) - min(shares) <= 1
    assert decoder.config_for(new_tokens).editing_threshold == 0.9


def test_the_offline_tasks_read_no_files(manager):
    """The others need essays or questions from the network."""
    needy = {"niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multiquery", "niah_multivalue"}
    needy |= {"ruler_qa_squad", "ruler_qa_hotpot"}
    group = set(manager.task_index["ruler"].cfg["task"])
    assert needy < group
    assert set(SETTINGS["ruler_offline"]["tasks"]) == group - needy
