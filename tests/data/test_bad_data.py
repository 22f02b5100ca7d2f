"""Data and tokenizers that cannot be trained on: each ends in one line that says what, where, and what is accepted."""

from __future__ import annotations

import pytest
from bad_data import BAD
from command_line import error_of

pytestmark = pytest.mark.usefixtures("as_from_a_shell")


@pytest.mark.parametrize(("files", "overrides", "says"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_data_is_one_line(files, overrides, says, recipe, tmp_path, capsys):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = error_of(capsys, recipe, *overrides)
    assert [part for part in says if part not in message] == [], message
