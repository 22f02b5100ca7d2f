"""Whatever is wrong with a recipe is said in one line, and the exit code is 2."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from bad_training import BAD_TRAINING, FILES
from command_line import error_of

pytestmark = pytest.mark.usefixtures("as_from_a_shell")


def test_no_input_is_there_twice():
    assert len({row[0] for row in BAD_TRAINING}) == len(BAD_TRAINING) > 120


@pytest.mark.parametrize("row", BAD_TRAINING, ids=lambda row: row[0][:50])
def test_bad_input_is_refused_in_one_line(row, recipe, capsys):
    """`recipe` is in the folder that this test runs in."""
    for name, content in FILES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content, encoding="utf-8")
    line, *says = row
    if short := re.match(r"(\w+)=", line):
        section = short[1] in ("memory", "lora", "training")
        line, says = (line, says) if section else (f"training.{line}", [f"training.{short[1]}=", *says])
    words = line.split(" ")
    text = error_of(capsys, *([] if Path(words[0]).exists() or words[0].endswith(".yaml") else [recipe]), *words)
    assert [piece for piece in says if piece not in text] == [], text
