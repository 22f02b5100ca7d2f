"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_tokenizer

from dllm_memdlm import train


def error_of(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What the one line on stderr says, after `error: `; the exit code is 2 and nothing has been saved."""
    capsys.readouterr()
    assert train.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: "), captured.err
    assert "saved to" not in captured.out
    return captured.err.removeprefix("error: ").rstrip("\n")


def make_chat_tokenizer(folder: Path, **special: str) -> None:
    tokenizer = make_tokenizer(**special)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
