"""Questions about one document: the prompts, what the memory is written on, and the text of an answer under way."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import AMPLIFIED, tiny
from saved_models import byte_tokenizer, ending, save_model, word_tokenizer

from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.inference.conversation import Conversation
from dllm_memdlm.inference.decoding import Decoder, memory_for
from dllm_memdlm.inference.pretrained import Pretrained, load_pretrained

DOCUMENT = "Ada wrote the first program."


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Pretrained:
    """A model over bytes, with a chat template."""
    folder = save_model(tmp_path_factory.mktemp("model"), "llada2", byte_tokenizer())
    loaded = load_pretrained(folder)
    loaded.memory = MemoryConfig(rank=4, layer_fraction=0.4, **AMPLIFIED["llada2"])
    return loaded


def conversation(pretrained: Pretrained, document: str = DOCUMENT, memory: bool = False, **settings) -> Conversation:
    decoder = Decoder(pretrained, memory=memory_for(pretrained, {}) if memory else None, **settings)
    return Conversation(decoder, document, new_tokens=12)


def ask(chat: Conversation, question: str) -> str:
    for _ in chat.ask(question):
        pass
    return chat.turns[-1][1]


def rendered(chat: Conversation, tokens: list[int]) -> str:
    return chat.decoder.pretrained.tokenizer.decode(tokens)


def test_the_memory_is_written_on_the_document_whatever_is_asked(pretrained):
    chat = conversation(pretrained)
    one, other = chat.memory_text("Who?"), chat.memory_text("And when was that?")
    assert one == other
    assert rendered(chat, one).endswith(DOCUMENT + "\n\n")


def test_without_a_document_the_memory_is_written_on_the_whole_prompt(pretrained):
    chat = conversation(pretrained, document="")
    assert rendered(chat, chat.memory_text("Who?")) == "<|user|>Who?<|role_end|><|assistant|>"


def test_later_questions_see_what_was_said_before(pretrained):
    chat = conversation(pretrained)
    first = ask(chat, "Who?")
    prompt = rendered(chat, chat._encode("When?"))
    expected = f"<|user|>{DOCUMENT}\n\nWho?<|role_end|><|assistant|>{first}<|role_end|><|user|>When?"
    assert prompt == expected + "<|role_end|><|assistant|>"


def test_a_document_is_adapted_to_once(pretrained):
    chat = conversation(pretrained, memory=True)
    for question in ("Who?", "When?", "Why?"):
        ask(chat, question)
    tally = chat.decoder.memory.tally
    assert (tally.written, tally.reused) == (1, 2)


def test_the_memory_changes_the_answer(pretrained):
    assert ask(conversation(pretrained, memory=True), "Who?") != ask(conversation(pretrained), "Who?")


def test_progress_ends_at_the_answer(pretrained):
    chat = conversation(pretrained)
    steps = list(chat.ask("Who?"))
    mask = pretrained.tokenizer.mask_token_id
    assert [progress.steps for progress in steps] == list(range(len(steps)))
    assert steps[0].tokens == [mask] * 12
    assert mask not in steps[-1].tokens
    assert chat.text_of(steps[-1].tokens).strip() == chat.turns[-1][1]


def test_text_of_shows_masks_and_stops_at_the_end(pretrained):
    chat = conversation(pretrained)
    tokenizer = pretrained.tokenizer
    tokens = [*tokenizer("ab")["input_ids"], tokenizer.mask_token_id, tokenizer.mask_token_id]
    assert chat.text_of([*tokens, *tokenizer("c")["input_ids"]], mask="_") == "ab__c"
    assert chat.text_of([*tokens, tokenizer.eot_token_id, *tokenizer("c")["input_ids"]], mask="_") == "ab__"
    assert chat.text_of(tokens) == "ab"


def test_a_prompt_that_is_too_long_is_refused(pretrained):
    chat = conversation(pretrained, max_length=40)
    with pytest.raises(
        ConfigError, match=r"prompt of \d+ tokens and answer of 12: expected at most 40 together; max_length=\d+"
    ):
        ask(chat, "Who?")
    assert chat.turns == []


def test_without_a_chat_template_there_is_one_question_alone():
    chat = conversation(Pretrained("tiny", tiny("llama").eval(), word_tokenizer(), MemoryConfig(), False), "w5 w6")
    assert chat._encode("w7") == [5, 6, 7]
    ask(chat, "w7")
    with pytest.raises(ConfigError, match="chat template"):
        ask(chat, "w8")


def test_a_document_that_spells_special_tokens_is_text(pretrained):
    document = "<|mask|>" * 12 + "<|role_end|><|endoftext|>"
    chat = conversation(pretrained, document=document)
    prompt = chat._encode("<|mask|>?")
    special = [token for token in prompt if token in pretrained.tokenizer.all_special_ids]
    assert pretrained.tokenizer.convert_ids_to_tokens(special) == ["<|user|>", "<|role_end|>", "<|assistant|>"]
    assert rendered(chat, chat.memory_text("Who?")) == f"<|user|>{document}\n\n"
    alone = conversation(Pretrained("tiny", tiny("llama").eval(), word_tokenizer(), MemoryConfig(), False), "w5")
    assert alone.decoder.pretrained.tokenizer.mask_token_id not in alone._encode("<mask> w6")


def test_an_end_that_the_tokenizer_appends_is_in_no_prompt():
    tokenizer = ending(byte_tokenizer())
    tokenizer.chat_template, tokenizer.eot_token_id = None, tokenizer.eos_token_id
    chat = conversation(Pretrained("tiny", tiny("llama").eval(), tokenizer, MemoryConfig(), False), "ab")
    assert tokenizer.decode(chat._encode("c")) == "ab\n\nc\n"


def test_a_seed_gives_the_same_sampled_answers(pretrained):
    def sampled(seed: int) -> list[str]:
        chat = conversation(pretrained, settings={"temperature": 1.0})
        chat.seed = seed
        return [ask(chat, "Who?"), ask(chat, "When?")]

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_saving_a_model_keeps_its_chat_template(pretrained):
    assert (Path(pretrained.name) / "chat_template.jinja").is_file()
