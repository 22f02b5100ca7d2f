"""The command `memdlm`: its parts are the modules of the same names."""

from __future__ import annotations

import importlib

import pytest
from fresh_python import needs_lm_eval, run

from dllm_memdlm import __version__, cli


@pytest.mark.parametrize("name", sorted(cli.COMMANDS.keys() - {"evaluate"}))
def test_each_command_is_the_module_of_its_name(name, capsys):
    texts = []
    for main in (lambda argv: cli.main([name, *argv]), importlib.import_module(f"dllm_memdlm.{name}").main):
        with pytest.raises(SystemExit) as stopped:
            main(["--help"])
        texts.append(capsys.readouterr().out)
        assert stopped.value.code == 0
    assert texts[0] == texts[1] and texts[0].startswith(f"usage: memdlm {name} ")


@needs_lm_eval
def test_lm_eval_s_command_line():
    done = run("-m", "dllm_memdlm.cli", "evaluate", "validate", "--tasks", "no-such-task")
    assert done.returncode == 1 and "no-such-task" in done.stdout + done.stderr


def test_a_command_tells_its_exit_code(capsys, tmp_path):
    assert cli.main(["train", str(tmp_path / "none.yaml"), "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert cli.main(["info"]) == 0
    assert "torch" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "code", "text"), [(["--help"], 0, "export  "), (["--version"], 0, __version__)])
def test_help_and_version(argv, code, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == code and text in capsys.readouterr().out


def test_no_such_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["trian"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("memdlm: error: ")


def test_no_command(capsys):
    assert cli.main([]) == 2
    assert "export  " in capsys.readouterr().err
