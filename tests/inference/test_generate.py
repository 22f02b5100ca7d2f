"""The command that asks a model about a document. What it refuses: helpers/bad_inference.py."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import AMPLIFIED
from fresh_python import ROOT, run
from rich.console import Console
from safetensors.torch import load_file, save_file
from saved_models import byte_tokenizer, save_model

from dllm_memdlm import generate
from dllm_memdlm.inference.arguments import Parsed, parse
from dllm_memdlm.inference.conversation import Conversation
from dllm_memdlm.method.prompt_memory import load_snapshot

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

    def asked(*arguments: str, question: str | None = "Who?", model: str = model) -> str:
        base = ["--model", model, "--prompt-file", document, "--max-new-tokens", "10"]
        base += [] if question is None else ["--question", question]
        assert generate.main([*base, *arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return asked


def test_an_answer_is_plain_text_when_piped_and_follows_the_settings(ask):
    out = ask()
    assert out.endswith("\n") and "\x1b" not in out and "░" not in out
    assert ask("temperature=2.0", "seed=1") == ask("temperature=2.0", "seed=1") != out


def test_memory_changes_the_answer_and_its_settings_matter(ask):
    without, with_memory = ask(), ask("--memory")
    assert without != with_memory == ask("memory=true") and ask("--memory", "memory_inner_lr=0.0") == without


def test_a_kept_memory_gives_the_same_answers_in_a_new_process_and_to_a_copy(ask, model, document, tmp_path):
    path = str(tmp_path / "memory.safetensors")
    saved = ask("--save-memory", path)
    assert saved == ask("--memory")
    fast_weights, config = load_snapshot(path, model)
    assert config.rank == 4 and fast_weights.samples == 1
    command = ["-m", "dllm_memdlm.generate", "--model", model, "--prompt-file", document, "--question", "Who?"]
    assert run(*command, "--max-new-tokens", "10", "--load-memory", path, paths=(ROOT,)).stdout == saved
    assert ask("--load-memory", path, model=str(shutil.copytree(model, tmp_path / "copy"))) == saved


def test_a_chat_answers_line_by_line(ask, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n\nWhen?\n/exit\nnever asked\n"))
    out, alone = ask("--chat", "--memory", question=None), ask("--memory")
    assert out.startswith(alone) and len(out) > len(alone)


def test_on_a_terminal_the_unmasking_is_seen(model, document):
    terminal = {"TERM": "xterm"}  # whatever the tests run on: on a dumb one nothing is drawn
    out = Console(file=io.StringIO(), force_terminal=True, width=80, _environ=terminal)
    chat = Conversation(parse({"pretrained": model}).open(), Path(document).read_text(), 10)
    generate.answer(chat, "Who?", out)
    shown = out.file.getvalue()
    assert "░" in shown and "steps" in shown and chat.turns[-1][0] == "Who?"


def test_answers_that_are_left_masked_are_said(tmp_path, capsys):
    """This model's likeliest token is the mask."""
    folder, mask = save_model(tmp_path, "llama", byte_tokenizer()), byte_tokenizer().mask_token_id
    weights = load_file(tmp_path / "model.safetensors")
    head = torch.zeros_like(weights["lm_head.weight"])
    head[mask] = 50 * weights["model.norm.weight"]
    save_file({**weights, "lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
    asked = ["--model", folder, "--question", "Who?", "--max-new-tokens", "6", "seed=3"]
    assert generate.main(asked) == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("1 of 1 answers have masks left"), captured
    assert generate.main([*asked, f"suppress_tokens=[{mask}]"]) == 0
    assert capsys.readouterr().err == ""


def test_the_document_can_come_from_the_standard_input(ask, document, monkeypatch):
    expected = ask()
    monkeypatch.setattr(sys, "stdin", io.StringIO(Path(document).read_text()))
    assert ask("--prompt-file", "-") == expected


@pytest.mark.parametrize(
    "arguments",
    [
        *("", "--question Who? --max-new-tokens 0", "--question Who? --memory --load-memory m"),
        *("--question Who? --save-memory m --load-memory m", "--chat --save-memory m", "--chat --prompt-file -"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(arguments, capsys, monkeypatch, tmp_path):
    """And before the work what cannot be saved."""
    with pytest.raises(SystemExit) as stop:
        generate.main(["--model", "nowhere", *arguments.split()])
    assert stop.value.code == 2 and "usage: memdlm generate" in capsys.readouterr().err
    monkeypatch.setattr(Parsed, "open", lambda *args: pytest.fail("the model was loaded"))
    path = str(tmp_path / "none" / "m")
    assert generate.main(["--model", "nowhere", "--question", "Who?", "--save-memory", path]) == 2
    assert capsys.readouterr().err.startswith(f"error: --save-memory {path}: ")
