"""Rows, and files of them, for the tests of the data."""

import json

import pytest

from dllm_memdlm.config import ConfigError, DataConfig
from dllm_memdlm.data import choose_format, load_rows
from reproduce import prepare

ROWS = [{"instruction": f"say {i}", "input": "", "output": "ab"[i % 2] * (i + 1)} for i in range(20)]


def write(path, rows, *, lines=False):
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return DataConfig(dataset=str(path), eval_fraction=0)


def chats(config):
    rows = load_rows(config)[0].rows
    to_chat = choose_format(config, rows.column_names)
    return [to_chat(row, config).messages for row in rows]


def message_of(call, *args):
    with pytest.raises(ConfigError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def hotpotqa(sentences, **changes):
    """A row as in HotpotQA's released file, of one paragraph."""
    row = {"question": " Who? ", "answer": "Ann", "supporting_facts": [["Ann", 0]], "context": [["Ann", sentences]]}
    return row | changes


def needle_rows():
    """Rows to train on, and to be asked about, as reproduce.prepare writes them."""
    rest = ["It has two parts, and a preface.", "Bob read it twice.", "He liked the second part best."]
    return [prepare.needles(hotpotqa([f"Ann wrote book {i}.", *rest]), (40,)) for i in range(20)]
