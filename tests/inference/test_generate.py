"""Questions about one document, and the command that asks them. What it refuses: helpers/bad_inference.py."""

from __future__ import annotations

import io
import re
import shutil
import sys

import pytest
from conftest import AMPLIFIED, tiny
from rich.console import Console
from saved_models import byte_tokenizer, ending, save_model, word_tokenizer

from dllm_memdlm import generate
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.inference.arguments import Parsed, parse
from dllm_memdlm.inference.conversation import Conversation
from dllm_memdlm.inference.decoding import Decoder
from dllm_memdlm.inference.pretrained import Pretrained, load_pretrained
from dllm_memdlm.method.prompt_memory import load_snapshot

DOCUMENT = "Ada wrote the first program."
MEMORY = {"rank": 4, "layer_fraction": 0.4, **AMPLIFIED["llada2"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), "llada2", byte_tokenizer(), {"memory": MEMORY})


@pytest.fixture(scope="module")
def pretrained(model) -> Pretrained:
    """A model over bytes, with a chat template."""
    return load_pretrained(model)


@pytest.fixture
def command(model, tmp_path, capsys):
    """The command's exit code, and what it says on stdout and stderr, asked about the document."""

    def run_with(
        *arguments: str, question: str | None = "Who?", model: str = model, document: str = DOCUMENT
    ) -> tuple[int, str, str]:
        (tmp_path / "doc.txt").write_text(document, encoding="utf-8")
        base = ["--model", model, "--prompt-file", str(tmp_path / "doc.txt"), "--max-new-tokens", "10"]
        base += [] if question is None else ["--question", question]
        return generate.main([*base, *arguments]), *capsys.readouterr()

    return run_with


@pytest.fixture
def ask(command):
    """Its answer."""

    def run_with(*arguments: str, **more: str | None) -> str:
        code, answer, notes = command(*arguments, **more)
        assert code == 0, notes
        return answer

    return run_with


def about(pretrained: Pretrained, document: str = DOCUMENT, **more) -> Conversation:
    return Conversation(Decoder(pretrained, **more), document, new_tokens=12)


def without_template(tokenizer, document: str) -> Conversation:
    return about(Pretrained("tiny", tiny("llama").eval(), tokenizer, MemoryConfig(), False), document)


def asked(chat: Conversation, *questions: str) -> list[str]:
    for question in questions:
        for _ in chat.ask(question):
            pass
    return [answer for _, answer in chat.turns]


def test_an_answer_is_plain_text_when_piped_and_follows_the_settings(ask):
    out = ask()
    assert out.endswith("\n") and "\x1b" not in out and "░" not in out
    one, same, other = (ask("temperature=2.0", f"seed={seed}") for seed in (1, 1, 2))
    assert one == same and len({one, other, out}) == 3


def test_memory_changes_the_answer_and_its_settings_matter(ask):
    without, with_memory = ask(), ask("--memory")
    assert without != with_memory == ask("memory=true") and ask("--memory", "memory_inner_lr=0.0") == without


def test_a_kept_memory_gives_the_same_answers_and_to_a_copy_of_the_model(ask, model, tmp_path):
    path = str(tmp_path / "memory.safetensors")
    saved = ask("--save-memory", path)
    assert saved == ask("--memory")
    fast_weights, config = load_snapshot(path, model)
    assert config.rank == 4 and fast_weights.samples == 1
    assert ask("--load-memory", path) == saved
    assert ask("--load-memory", path, model=str(shutil.copytree(model, tmp_path / "copy"))) == saved


def test_a_chat_answers_line_by_line(ask, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n\nWhen?\n/exit\nnever asked\n"))
    out, alone = ask("--chat", "--memory", question=None), ask("--memory")
    assert out.startswith(alone) and len(out) > len(alone)


def test_on_a_terminal_the_unmasking_is_seen(model):
    terminal = {"TERM": "xterm"}  # whatever the tests run on: on a dumb one nothing is drawn
    out = Console(file=io.StringIO(), force_terminal=True, width=80, _environ=terminal)
    chat = Conversation(parse({"pretrained": model}).open(), DOCUMENT, 10)
    generate.answer(chat, "Who?", out)
    shown = out.file.getvalue()
    assert "░" in shown and "steps" in shown and chat.turns[-1][0] == "Who?"


def test_answers_that_are_left_masked_are_said(model, monkeypatch, capsys):
    monkeypatch.setattr(Decoder, "unfinished", lambda decoder: f"of {decoder.answered} one has masks left")
    assert generate.main(["--model", model, "--question", "Who?", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().err == "of 1 one has masks left\n"


def test_the_document_can_come_from_the_standard_input(ask, monkeypatch):
    expected = ask()
    monkeypatch.setattr(sys, "stdin", io.StringIO(DOCUMENT))
    assert ask("--prompt-file", "-") == expected


#: Of 60 bytes, of which a model with this context sees the last ones alone.
LONG, SHORT = f"{DOCUMENT} Lovelace was her married name. ", ("max_length=48", "--max-new-tokens", "8")
WINDOWS = ("--window", "16", "memory_strategy=cover", "memory_inner_lr=3.0", "memory_grad_clip=1.0")


def test_a_long_document_is_read_in_windows_asked_saved_and_loaded(command, tmp_path):
    path = str(tmp_path / "memory.safetensors")
    code, answer, notes = command(*SHORT, *WINDOWS, "--save-memory", path, document=LONG)
    assert code == 0 and re.search(r"read 6\d tokens in 4 windows, \d+\.\d s", notes) and "saved to" in notes
    assert command(*SHORT, *WINDOWS, "--memory", document=LONG)[1] == answer
    assert command(*SHORT, "--load-memory", path, document=LONG)[:2] == (0, answer)  # it says that it reads windows
    # the beginning, long out of sight, still matters; without a memory it does not
    other = LONG.replace("Ada", "Bob")
    assert command(*SHORT, *WINDOWS, "--memory", document=other)[1] != answer
    (one, two) = (command(*SHORT, "visible=40", document=document)[:2] for document in (LONG, other))
    assert one == two == (0, one[1]) and one[1] != answer


def test_without_windows_a_long_document_is_refused(command, tmp_path):
    def refused(*arguments: str) -> str:
        code, _, notes = command(*SHORT, *arguments, document=LONG)
        assert code == 2 and notes.count("\n") == 1
        return notes

    refused("--save-memory", str(tmp_path / "memory"))
    assert not (tmp_path / "memory").exists()
    for arguments in ((), ("--memory",)):
        assert all(part in refused(*arguments) for part in ("--window", "max_length="))
    assert "expected at most 48" in refused("--memory", *WINDOWS, "--max-new-tokens", "47")  # no room for the question
    # nor is the question itself cut
    said = refused("--memory", *WINDOWS, "visible=4")
    assert "expected at most 12 together beside the document; visible=" in said
    assert "memory.window=49: expected at most max_length=48" in refused("--memory", "--window", "49")


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            "",
            "--question Who? --window 16",
            "--question Who? --max-new-tokens 0",
            "--question Who? --memory --load-memory m",
        ),
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


def test_what_the_memory_is_written_on_and_what_is_asked(pretrained):
    chat = about(pretrained)
    one, other = chat.memory_text("Who?"), chat.memory_text("And when was that?")
    assert one == other and chat.tokenizer.decode(one) == f"<|user|>{DOCUMENT}\n\n"
    alone = about(pretrained, document="").memory_text("Who?")
    assert chat.tokenizer.decode(alone) == "<|user|>Who?<|role_end|><|assistant|>"
    (first,) = asked(chat, "Who?")  # which later questions see
    expected = f"<|user|>{DOCUMENT}\n\nWho?<|role_end|><|assistant|>{first}<|role_end|><|user|>When?"
    assert chat.tokenizer.decode(chat.prompt("When?", chat.turns)) == expected + "<|role_end|><|assistant|>"


def test_steps_end_at_the_answer(pretrained):
    chat = about(pretrained)
    (first, *_, last), mask = chat.ask("Who?"), chat.tokenizer.mask_token_id
    assert first == [mask] * 12 and mask not in last and chat.text_of(last).strip() == chat.turns[-1][1]
    tokens, more = [*pretrained.tokenizer("ab")["input_ids"], mask, mask], pretrained.tokenizer("c")["input_ids"]
    assert chat.text_of([*tokens, *more], mask="_") == "ab__c"
    assert chat.text_of([*tokens, pretrained.tokenizer.eot_token_id, *more], mask="_") == "ab__"
    assert chat.text_of(tokens) == "ab"
    pretrained.tokenizer.turn_end = "b"  # as text, of BERTs
    assert chat.text_of([*tokens, *more], mask="_") == "a"


def test_windows_and_what_is_visible_go_with_the_settings_of_a_run(tmp_path):
    recipe = {"memory": {**MEMORY, "window": 16, "source": "prompt", "prompt_loss": 0.3}, "data": {"visible": 32}}
    folder = save_model(tmp_path, "llada2", byte_tokenizer(), recipe, max_position_embeddings=48)
    decoder = parse({"pretrained": folder, "memory": True}).open()
    assert decoder.reads_windows and decoder.visible == 32
    asked(Conversation(decoder, LONG, 8), "Who?")
    assert decoder.memory.tally.written == 1
    assert not parse({"pretrained": folder, "memory": True, "memory_window": None}).open().reads_windows


def test_without_a_chat_template_there_is_one_question_alone():
    chat = without_template(word_tokenizer(), "w5 w6")
    assert chat.prompt("w7", []) == [5, 6, 7]
    asked(chat, "w7")
    with pytest.raises(ConfigError, match="chat template"):
        asked(chat, "w8")


def test_a_document_that_spells_special_tokens_is_text(pretrained):
    document = "<|mask|>" * 12 + "<|role_end|><|endoftext|>"
    chat = about(pretrained, document=document)
    special = [token for token in chat.prompt("<|mask|>?", []) if token in chat.tokenizer.all_special_ids]
    assert chat.tokenizer.convert_ids_to_tokens(special) == ["<|user|>", "<|role_end|>", "<|assistant|>"]
    assert chat.tokenizer.decode(chat.memory_text("Who?")) == f"<|user|>{document}\n\n"
    alone = without_template(word_tokenizer(), "w5")
    assert alone.tokenizer.mask_token_id not in alone.prompt("<mask> w6", [])


def test_an_end_that_the_tokenizer_appends_is_in_no_prompt():
    tokenizer = ending(byte_tokenizer())
    tokenizer.chat_template, tokenizer.eot_token_id = None, tokenizer.eos_token_id
    assert tokenizer.decode(without_template(tokenizer, "ab").prompt("c", [])) == "ab\n\nc\n"
