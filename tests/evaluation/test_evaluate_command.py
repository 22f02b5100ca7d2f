"""Our own lm-eval command: `python -m dllm_memdlm.evaluate`."""

from __future__ import annotations

import sys

import pytest
from fresh_python import ROOT, UNKNOWN, known_models, needs_lm_eval, printed, run, write_lm_eval

from dllm_memdlm import evaluate


@needs_lm_eval
@pytest.mark.slow
def test_our_command_knows_the_model_where_torch_loads_nothing_of_others(tmp_path):
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    known = known_models(run("-m", "dllm_memdlm.evaluate", *UNKNOWN, paths=(tmp_path, ROOT), **off))
    assert {"dummy", "hf", "memdlm"} <= set(known)


def test_our_command_is_lm_evals_with_the_model(tmp_path):
    """The stand-in prints its arguments and what it knows."""
    main = """
import json, sys
import lm_eval.models
from lm_eval.api.registry import model_registry
def cli_evaluate():
    print(json.dumps([sys.argv[1:], sorted(model_registry)]))
"""
    write_lm_eval(tmp_path, **{"__main__.py": main})
    done = run("-m", "dllm_memdlm.evaluate", "ls", "tasks", paths=(tmp_path, ROOT))
    assert printed(done) == [["ls", "tasks"], ["dummy", "memdlm"]]


def test_without_lm_eval_our_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    finders = list(sys.meta_path)
    assert evaluate.main() == 2
    assert capsys.readouterr() == ("", "error: lm_eval is not installed: pip install 'lm_eval[ruler]==0.4.13'\n")
    assert sys.meta_path == finders


@needs_lm_eval
def test_a_wrong_model_argument_is_one_line(tmp_path):
    arguments = ("--model", "memdlm", "--model_args", "pretrained=nowhere,memry=true", "--tasks", "arc_easy")
    done = run("-m", "dllm_memdlm.evaluate", *arguments, paths=(ROOT,), HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: unknown model argument 'memry'; did you mean memory?"
    assert "Traceback" not in done.stderr
