"""Whatever is wrong with a recipe is said in one line, and the exit code is 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_training import BAD_TRAINING
from command_line import error_of

pytestmark = pytest.mark.usefixtures("as_from_a_shell")


def test_no_input_is_there_twice():
    inputs = {repr(row[1:3]) for row in BAD_TRAINING}
    assert len({row[0] for row in BAD_TRAINING}) == len(inputs) == len(BAD_TRAINING)


@pytest.mark.parametrize(
    ("files", "arguments", "says"), [row[1:] for row in BAD_TRAINING], ids=[r[0] for r in BAD_TRAINING]
)
def test_bad_input_is_refused_in_one_line(files, arguments, says, recipe, capsys, monkeypatch):
    """`recipe` is in the folder that this test runs in."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content, encoding="utf-8")
    own = arguments[0].partition("/")[0] in {Path(name).parts[0] for name in files} or arguments[0] == "gone.yaml"
    text = error_of(capsys, *(arguments if own else [recipe, *arguments]))
    for piece in says:
        assert piece in text
