"""Questions about one document: the prompts, what the memory is written on, and the text of an answer under way."""

from __future__ import annotations

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
    loaded = load_pretrained(save_model(tmp_path_factory.mktemp("model"), "llada2", byte_tokenizer()))
    loaded.memory = MemoryConfig(rank=4, layer_fraction=0.4, **AMPLIFIED["llada2"])
    return loaded


def about(pretrained: Pretrained, document: str = DOCUMENT, seed: int = 0, **more) -> Conversation:
    decoder = Decoder(pretrained, **more)
    return Conversation(decoder, document, new_tokens=12, seed=seed)


def without_template(tokenizer, document: str) -> Conversation:
    return about(Pretrained("tiny", tiny("llama").eval(), tokenizer, MemoryConfig(), False), document)


def ask(chat: Conversation, *questions: str) -> list[str]:
    for question in questions:
        for _ in chat.ask(question):
            pass
    return [answer for _, answer in chat.turns]


def test_what_the_memory_is_written_on_and_what_is_asked(pretrained):
    chat = about(pretrained)
    one, other = chat.memory_text("Who?"), chat.memory_text("And when was that?")
    assert one == other and chat.tokenizer.decode(one) == f"<|user|>{DOCUMENT}\n\n"
    alone = about(pretrained, document="").memory_text("Who?")
    assert chat.tokenizer.decode(alone) == "<|user|>Who?<|role_end|><|assistant|>"
    (first,) = ask(chat, "Who?")  # which later questions see
    expected = f"<|user|>{DOCUMENT}\n\nWho?<|role_end|><|assistant|>{first}<|role_end|><|user|>When?"
    assert chat.tokenizer.decode(chat.prompt("When?", chat.turns)) == expected + "<|role_end|><|assistant|>"


def test_a_document_is_adapted_to_once_and_that_changes_the_answer(pretrained):
    chat = about(pretrained, memory=memory_for(pretrained, {}))
    answers = ask(chat, "Who?", "When?", "Why?")
    tally = chat.decoder.memory.tally
    assert (tally.written, tally.reused) == (1, 2)
    assert answers[:1] != ask(about(pretrained), "Who?")


def test_progress_ends_at_the_answer(pretrained):
    """Shown with its masks, up to the end of the turn."""
    chat = about(pretrained)
    steps, mask = list(chat.ask("Who?")), chat.tokenizer.mask_token_id
    assert [progress.steps for progress in steps] == list(range(len(steps)))
    assert steps[0].tokens == [mask] * 12 and mask not in steps[-1].tokens
    assert chat.text_of(steps[-1].tokens).strip() == chat.turns[-1][1]
    tokens, more = [*pretrained.tokenizer("ab")["input_ids"], mask, mask], pretrained.tokenizer("c")["input_ids"]
    assert chat.text_of([*tokens, *more], mask="_") == "ab__c"
    assert chat.text_of([*tokens, pretrained.tokenizer.eot_token_id, *more], mask="_") == "ab__"
    assert chat.text_of(tokens) == "ab"


def test_a_prompt_that_is_too_long_is_refused(pretrained):
    chat = about(pretrained, max_length=40)
    with pytest.raises(ConfigError, match=r"answer of 12: expected at most 40 together; max_length=\d+"):
        ask(chat, "Who?")
    assert chat.turns == []


def test_without_a_chat_template_there_is_one_question_alone():
    chat = without_template(word_tokenizer(), "w5 w6")
    assert chat.prompt("w7", []) == [5, 6, 7]
    ask(chat, "w7")
    with pytest.raises(ConfigError, match="chat template"):
        ask(chat, "w8")


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


def test_a_seed_gives_the_same_sampled_answers(pretrained):
    one, same, other = (
        ask(about(pretrained, seed=seed, settings={"temperature": 1.0}), "Who?", "When?") for seed in (1, 1, 2)
    )
    assert one == same != other
