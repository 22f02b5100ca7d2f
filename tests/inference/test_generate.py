"""The command that asks a model about a document."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import AMPLIFIED
from rich.console import Console
from safetensors.torch import load_file, save_file
from saved_models import byte_tokenizer, save_model

from dllm_memdlm import generate
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.inference import arguments
from dllm_memdlm.method.fast_weights import FastWeights

MEMORY = {"rank": 4, "layer_fraction": 0.4, **AMPLIFIED["llada2"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), "llada2", byte_tokenizer(), {"memory": MEMORY})


@pytest.fixture
def document(tmp_path) -> str:
    (tmp_path / "doc.txt").write_text("Ada wrote the first program.", encoding="utf-8")
    return str(tmp_path / "doc.txt")


@pytest.fixture
def ask(model, document, capsys):
    """The command's answer on stdout, asked about the document."""

    def run(*arguments: str, question: str | None = "Who?", code: int = 0) -> str:
        asked = [] if question is None else ["--question", question]
        base = ["--model", model, "--prompt-file", document, "--max-new-tokens", "10"]
        assert generate.main([*base, *asked, *arguments]) == code, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def error_of(capsys, *arguments: str) -> str:
    """The one line on stderr; the exit code is 2."""
    capsys.readouterr()
    assert generate.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: "), captured
    return captured.err.removeprefix("error: ").rstrip()


def test_an_answer_is_plain_text_when_piped(ask):
    out = ask()
    assert out.endswith("\n") and "\x1b" not in out and "░" not in out


def test_memory_changes_the_answer_and_its_settings_matter(ask):
    without, with_memory = ask(), ask("--memory")
    assert without != with_memory
    assert ask("memory=true") == with_memory
    assert ask("--memory", "memory_inner_lr=0.0") == without


def test_a_kept_memory_gives_the_same_answers_in_a_new_process(ask, model, document, tmp_path):
    path = str(tmp_path / "memory.safetensors")
    saved = ask("--save-memory", path)
    assert saved == ask("--memory")
    fast_weights, header = FastWeights.load(path)
    assert header["model"] == model and MemoryConfig(**header["memory"]).rank == 4 and fast_weights.samples == 1
    command = [sys.executable, "-m", "dllm_memdlm.generate", "--model", model, "--prompt-file", document]
    arguments = ["--question", "Who?", "--max-new-tokens", "10", "--load-memory", path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    loaded = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=True)
    assert loaded.stdout == saved


def test_a_copied_run_takes_its_own_memory(ask, model, document, tmp_path, capsys):
    path = str(tmp_path / "memory.safetensors")
    saved, copy = ask("--save-memory", path), str(shutil.copytree(model, tmp_path / "copy"))
    arguments = ["--model", copy, "--prompt-file", document, "--question", "Who?", "--max-new-tokens", "10"]
    assert generate.main([*arguments, "--load-memory", path]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == saved


def test_a_chat_answers_line_by_line(ask, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n\nWhen?\n/exit\nnever asked\n"))
    out = ask("--chat", "--memory", question=None)
    assert out.startswith(ask("--memory"))
    assert len(out) > len(ask("--memory"))


def test_on_a_terminal_the_unmasking_is_seen(model, document):
    from dllm_memdlm.inference.arguments import parse
    from dllm_memdlm.inference.conversation import Conversation

    terminal = {"TERM": "xterm"}  # whatever the tests run on: on a dumb one nothing is drawn
    out = Console(file=io.StringIO(), force_terminal=True, width=80, _environ=terminal)
    chat = Conversation(parse({"pretrained": model}).open(), Path(document).read_text(), 10)
    generate.answer(chat, "Who?", out)
    shown = out.file.getvalue()
    assert "░" in shown and "steps" in shown and chat.turns[-1][0] == "Who?"


def test_settings_reach_the_sampler(ask):
    assert ask("temperature=2.0", "seed=1") != ask()
    assert ask("temperature=2.0", "seed=1") == ask("temperature=2.0", "seed=1")


def test_answers_that_are_left_masked_are_said(tmp_path, capsys):
    """This model's likeliest token is the mask."""
    folder, mask = save_model(tmp_path, "llama", byte_tokenizer()), byte_tokenizer().mask_token_id
    weights = load_file(tmp_path / "model.safetensors")
    head = torch.zeros_like(weights["lm_head.weight"])
    head[mask] = 50 * weights["model.norm.weight"]
    save_file({**weights, "lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
    arguments = ["--model", folder, "--question", "Who?", "--max-new-tokens", "6", "seed=3"]
    assert generate.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("1 of 1 answers have masks left"), captured
    assert generate.main([*arguments, f"suppress_tokens=[{mask}]"]) == 0
    assert capsys.readouterr().err == ""


def test_the_document_can_come_from_the_standard_input(ask, model, document, capsys, monkeypatch):
    expected = ask()
    monkeypatch.setattr(sys, "stdin", io.StringIO(Path(document).read_text()))
    common = ["--model", model, "--question", "Who?", "--max-new-tokens", "10"]
    assert generate.main([*common, "--prompt-file", "-"]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["temprature=1"], "unknown model argument 'temprature'; did you mean temperature?"),
        (["temperature"], "'temperature': expected name=value, such as temperature=0.7"),
        (["steps=4"], "steps: not a setting of the llada21 sampler; known: block_size"),
        (["memory_rank=0"], "memory.rank=0: expected whole number of at least 1"),
        (
            ["--prompt-file", "nowhere.txt"],
            "--prompt-file nowhere.txt: No such file or directory; expected a text file",
        ),
        (["--save-memory", "nowhere/m.safetensors"], "--save-memory nowhere/m.safetensors: there is no folder "),
        (["--load-memory", "nowhere.safetensors"], "nowhere.safetensors: not a fast-weight snapshot"),
        (["max_length=20"], "prompt of 23 tokens and answer of 128: expected at most 20 together; max_length=151"),
    ],
)
def test_what_the_user_can_correct_is_one_line(model, capsys, arguments, message):
    question = "Who is it, and when?"
    assert error_of(capsys, "--model", model, "--question", question, *arguments).startswith(message)


def test_what_cannot_be_saved_is_refused_before_the_work(model, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments.Parsed, "open", lambda *args: pytest.fail("the model was loaded"))
    for path in (tmp_path / "none" / "m", tmp_path, f"{model}/config.json/m"):
        said = error_of(capsys, "--model", model, "--question", "Who?", "--save-memory", str(path))
        assert said.startswith(f"--save-memory {path}: ")


def test_a_model_that_is_not_there_is_one_line(capsys, tmp_path):
    missing = str(tmp_path / "none")
    assert error_of(capsys, "--model", missing, "--question", "Who?") == f"pretrained={missing!r}: no such folder"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--question", "Who?", "--max-new-tokens", "0"],
        ["--question", "Who?", "--memory", "--load-memory", "m.safetensors"],
        ["--question", "Who?", "--save-memory", "m.safetensors", "--load-memory", "m.safetensors"],
        ["--chat", "--save-memory", "m.safetensors"],
        ["--chat", "--prompt-file", "-"],
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        generate.main(["--model", "nowhere", *arguments])
    assert stop.value.code == 2
    assert "usage: memdlm generate" in capsys.readouterr().err
