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
FOLDER = ROOT / "recipes" / "eval"
FILES = sorted(FOLDER.glob("*.yaml"))
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


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def settings(name: str) -> dict[str, Any]:
    return yaml.safe_load(text_of(name))


@pytest.fixture(scope="module")
def manager():
    """Knows the tasks of these benchmarks only: indexing all of lm-eval's takes seconds. Reads no data."""
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs lm-eval: pip install 'dllm-memdlm[eval]'")
    folder = Path(tasks.__file__).parent
    return tasks.TaskManager(include_defaults=False, include_path=[folder / name for name in BENCHMARKS])


every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@every_file
def test_lm_eval_takes_every_key(path):
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'dllm-memdlm[eval]'")
    from lm_eval.config.evaluate_config import EvaluatorConfig

    given = settings(path.stem)
    loaded = dataclasses.asdict(EvaluatorConfig.from_config(path))
    assert {key: loaded[key] for key in given} == given
    assert given["model"] == "memdlm"
    assert given["output_path"] == f"runs/eval/{path.stem}"
    # --model_args replaces those of the file as a whole, so that any would be lost without a word
    assert "model_args" not in given
    first, _, rest = text_of(path.stem).partition("\n")  # its command
    assert re.findall(r"^# .*lm_eval run --config (\S+).*pretrained=", first) == [str(path.relative_to(ROOT))]
    assert rest.startswith("#\n")


@every_file
def test_lm_eval_knows_every_task(path, manager):
    given = settings(path.stem)
    for task in given["tasks"]:
        assert manager.match_tasks([task]) == [task]
    assert set(given.get("samples", given["tasks"])) == set(given["tasks"])
    for asked in given.get("samples", {}).values():
        # out of order, lm-eval logs the answers under each other's numbers
        assert asked == sorted(set(asked))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_papers_subset_is_complete(name):
    assert set(settings(name)["tasks"]) == SUBSET[name]
    assert len(settings(name)["tasks"]) == len(SUBSET[name])


def test_the_papers_settings():
    ruler, babilong, longbench = (settings(name) for name in BENCHMARKS)
    assert ruler["metadata"] == {"max_seq_lengths": [4096, 8192, 16384, 32768]}
    assert babilong["metadata"] == {"max_seq_lengths": "1k"}  # one length a run, and 0k without
    assert [given["num_fewshot"] for given in (ruler, babilong, longbench)] == [0, 2, 0]
    for given in (ruler, babilong, longbench):
        # every question, and answers of the length that the task sets
        assert not {"limit", "samples"} & set(given) and "max_gen_toks" not in given["gen_kwargs"]
    for name in BENCHMARKS:
        # a prompt that is cut gets no memory, and LLaDA-MoE alone would cut at 8,192
        assert "memory=true,max_length=65536" in text_of(name).partition("\n")[0]


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize(("new_tokens", "steps"), [(16, 16), (30, 30), (32, 32), (128, 32)])
def test_the_papers_decoding_of_llada21(name, new_tokens, steps):
    """Its code edits no token and takes min(32, max_gen_toks) steps a block; the sampler's own defaults are dllm's."""
    decoder = decoder_with(None, tiny("llada2"))
    encode = {"encode": lambda text: [3], "sampler": "llada21", "default_new_tokens": 1, "max_length": 999, "seed": 0}
    asked = {"max_gen_toks": new_tokens, "until": [], **settings(name)["gen_kwargs"]}
    (prompt,) = read_prompts([("", asked)], [None], **encode)
    config = decoder.config_for(prompt.new_tokens, **prompt.changes)
    assert (config.editing_threshold, config.block_size, config.threshold) == (None, 32, 0.95)
    rows = Rows([1], config, torch.device("cpu"))
    shares = []
    for _ in range(steps):
        shares.append(int(rows.quota()))
        rows.steps += 1
    assert sum(shares) == 32 and max(shares) - min(shares) <= 1
    assert decoder.config_for(new_tokens).editing_threshold == 0.9


def test_babilong_runs_every_length_and_the_tasks_that_come_at_each(manager):
    first = text_of("babilong").partition("\n")[0]
    assert "for n in 1k 2k 4k 8k 16k 32k; do " in first and "--metadata max_seq_lengths=$n " in first
    group = manager.task_index["babilong_longctx"].cfg
    assert group["task"] == [f"babilong_qa{number}" for number in range(1, 6)]


def test_the_offline_tasks_read_no_files(manager):
    """The others need essays or questions from the network."""
    needy = {"niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multiquery", "niah_multivalue"}
    needy |= {"ruler_qa_squad", "ruler_qa_hotpot"}
    group = set(manager.task_index["ruler"].cfg["task"])
    assert needy < group
    assert set(settings("ruler_offline")["tasks"]) == group - needy
