"""Documents longer than the context: read into a memory in windows, asked, saved and loaded; and lm-eval's prompts."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import tiny
from saved_models import byte_tokenizer, pretrained_of, prompt_memory, random_prompts, save_model
from steps import memory_for

from dllm_memdlm import generate
from dllm_memdlm.inference.arguments import parse
from dllm_memdlm.inference.conversation import Conversation
from dllm_memdlm.inference.decoding import Decoder

#: Of 60 bytes, of which the model sees the last ones alone.
DOCUMENT = "Ada wrote the first program. Lovelace was her married name. "
MEMORY = {"rank": 4, "layer_fraction": 0.4, "strategy": "cover", "inner_lr": 3.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A context of 48 tokens."""
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder, "llada2", byte_tokenizer(), {"memory": MEMORY}, max_position_embeddings=48)


@pytest.fixture
def ask(model, tmp_path, capsys):
    def run(*arguments: str, document: str = DOCUMENT) -> tuple[int, str, str]:
        (tmp_path / "book.txt").write_text(document, encoding="utf-8")
        base = ["--model", model, "--prompt-file", str(tmp_path / "book.txt"), "--question", "Who?"]
        code = generate.main([*base, "--max-new-tokens", "8", *arguments])
        return code, *capsys.readouterr()

    return run


def test_a_long_document_is_read_asked_saved_and_loaded(ask, tmp_path):
    path = str(tmp_path / "memory.safetensors")
    code, answer, notes = ask("--window", "16", "--save-memory", path)
    assert code == 0 and re.search(r"read 6\d tokens in 4 windows, \d+\.\d s", notes) and "saved to" in notes
    assert ask("--window", "16", "--memory")[1] == answer
    assert ask("--load-memory", path)[:2] == (0, answer)  # its settings say that it reads windows
    # the beginning, long out of sight, still matters; without a memory it does not
    other = DOCUMENT.replace("Ada", "Bob")
    assert ask("--window", "16", "--memory", document=other)[1] != answer
    unseen = [ask("visible=40", document=document)[:2] for document in (DOCUMENT, other)]
    assert unseen[0] == unseen[1] == (0, unseen[0][1]) and unseen[0][1] != answer


def test_without_windows_it_is_refused(ask, tmp_path):
    assert ask("--save-memory", str(tmp_path / "memory"))[0] == 2 and not (tmp_path / "memory").exists()
    for arguments in ((), ("--memory",)):
        code, _, notes = ask(*arguments)
        assert code == 2 and notes.count("\n") == 1 and "--window" in notes and "max_length=" in notes
    code, _, notes = ask("--memory", "--window", "16", "--max-new-tokens", "47")  # no room for the question
    assert code == 2 and "expected at most 48" in notes
    code, _, notes = ask("--memory", "--window", "16", "visible=4")  # nor is the question itself cut
    assert code == 2 and "expected at most 12 together beside the document; visible=" in notes
    assert "memory.window=49: expected at most max_length=48" in ask("--memory", "--window", "49")[2]
    with pytest.raises(SystemExit):
        ask("--window", "16")


def test_what_a_model_sees_and_what_a_memory_reads():
    text = random_prompts(20)[0]
    model = tiny("llama")

    def parts(prompt: list[int], window: int | None = None, **settings: int) -> tuple:
        memory = prompt_memory(model, memory_for("llama", window=window))
        return Decoder(pretrained_of(model), memory=memory, **{"max_length": 16, **settings}).parts(prompt, 4)

    assert parts(text) == (text[-12:], None) and parts(text[:12]) == (text[:12], text[:12])
    assert parts(text, window=8) == (text[-12:], text)
    assert parts(text, window=8, visible=5) == (text[-5:], text)
    assert parts(text[:12], visible=5) == (text[7:12], text[:12])
    assert parts(text, visible=5) == (text[-5:], None)
    # as a run's recipe says, unless told otherwise
    trained = pretrained_of(model)
    trained.visible = 7
    assert Decoder(trained).visible == 7 and Decoder(trained, visible=3).visible == 3


def test_windows_go_with_the_settings_of_a_run(model, tmp_path):
    recipe = {"memory": {**MEMORY, "window": 16, "source": "prompt", "prompt_loss": 0.3}, "data": {"visible": 32}}
    folder = save_model(tmp_path, "llada2", byte_tokenizer(), recipe, max_position_embeddings=48)
    decoder = parse({"pretrained": folder, "memory": True}).open()
    assert decoder.reads_windows and decoder.visible == 32
    chat = Conversation(decoder, DOCUMENT, 8)
    for _ in chat.ask("Who?"):
        pass
    assert decoder.memory.tally.written == 1 and chat.turns
    assert not parse({"pretrained": folder, "memory": True, "memory_window": None}).open().reads_windows


def test_lm_evals_overlong_prompts_have_memories(model):
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'dllm-memdlm[eval]'")
    from local_tasks import generate, score

    from dllm_memdlm.evaluation.lm_eval_model import MemDLMEvalLM

    found = {}
    for window in (None, 16):
        harness = MemDLMEvalLM(pretrained=model, memory=True, memory_window=window, mc_num=4, max_gen_toks=4)
        torch.manual_seed(0)
        answers = generate(harness, DOCUMENT, DOCUMENT[:20])
        likelihood = score(harness, (DOCUMENT, "Ada"))
        found[window] = answers, likelihood, harness.memory.tally
    assert (found[None][2].without, found[16][2].without) == (2, 0)
    assert found[None][0][0] != found[16][0][0] and found[None][1] != found[16][1]
