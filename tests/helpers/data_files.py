"""Rows, and files of them, for the tests of the data."""

import json

import pytest

from dllm_memdlm.config import ConfigError, DataConfig

HOTPOTQA = "package:long_context_eval/data/synthetic/json/hotpotqa.json"


ROWS = [{"instruction": f"say {i}", "input": "", "output": "ab"[i % 2] * (i + 1)} for i in range(20)]


def write(path, rows, *, lines=False):
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return DataConfig(dataset=str(path), eval_fraction=0)


def message_of(call, *args):
    with pytest.raises(ConfigError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


#: Of HotpotQA, for texts of some length.
SENTENCES = ["It has two parts, and a preface.", "Bob read it twice.", "He liked the second part best."]
HOTPOTQA_ROWS = [
    {
        "question": f"Who wrote book {i}?",
        "answer": "Ann",
        "supporting_facts": [["Ann", 0]],
        "context": [["Ann", [f"Ann wrote book {i}.", *SENTENCES]]],
    }
    for i in range(20)
]
