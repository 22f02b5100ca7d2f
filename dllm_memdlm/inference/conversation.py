"""Questions about one document: the prompt of each, and the part of it that the memory is written on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from ..config import ConfigError
from ..data.encoding import Encoder, decode_text, turn_of
from ..method.prompt_memory import shared_length
from .decoding import Decoder

#: Between a document and the first question about it.
GAP = "\n\n"


@dataclass
class Conversation:
    """A chat about a document, which the first question follows; without a chat template, one question alone.

    The memory is written on the document, so it is the same for every question; without a document on the whole
    prompt, as in the paper.

    Args:
        decoder: answers.
        document: may be empty.
        new_tokens: of an answer.
        seed: of sampling.
    """

    decoder: Decoder
    document: str
    new_tokens: int
    seed: int = 0
    turns: list[tuple[str, str]] = field(default_factory=list)  #: questions and answers so far

    def __post_init__(self) -> None:
        self.tokenizer = self.decoder.pretrained.tokenizer
        self._encoder = Encoder(self.tokenizer, self.decoder.pretrained.template)

    def ask(self, question: str) -> Iterator[list[int]]:
        """Yield the tokens of the answer before the first step and after each one, masks where nothing is decided yet.

        Once it has ended, the answer is the last of `turns`.

        Raises:
            ConfigError: the prompt is too long, or a chat goes on without a chat template.
        """
        prompt, text = self.parts(question)
        length = len(prompt) + self.new_tokens
        tokens: list[int] = []
        with self.decoder.recalled([text]):
            for canvas in self.decoder.stream([prompt], self.new_tokens, seeds=[self.seed + len(self.turns)]):
                tokens = canvas[0, len(prompt) : length].tolist()
                yield tokens
        self.turns.append((question, self.text_of(tokens).strip()))

    def parts(self, question: str) -> tuple[list[int], list[int]]:
        """Return what the model sees of the prompt, and what the memory is written on. Raises ConfigError as `ask`."""
        prompt = self.prompt(question, self.turns)
        text, room = self.memory_text(question), self.decoder.max_length - self.new_tokens
        seen = min(room, self.decoder.visible or room)
        # of the document the end will do, where a memory reads all of it or the model was trained so; of a question not
        cut = len(text) if self.document and (self.decoder.reads_windows or self.decoder.visible) else 0
        if len(prompt) - cut > seen:
            beside = " beside the document" if cut else ""
            longer = ", or --memory and --window N, which read a longer document" if self.document and not cut else ""
            tried = f"visible={len(prompt) - cut}" if seen < room else f"max_length={len(prompt) + self.new_tokens}"
            raise ConfigError(
                f"prompt of {len(prompt)} tokens and answer of {self.new_tokens}: expected at most "
                f"{seen + self.new_tokens} together{beside}{longer}; {tried} tries it all the same"
            )
        return self.decoder.parts(prompt, self.new_tokens)[0], text

    def memory_text(self, question: str) -> list[int]:
        """Return the tokens of the document as the prompts begin with it; the whole prompt if there is no document."""
        if not self.document:
            return self.prompt(question, self.turns)
        # Tokens may straddle the border, so it is where the prompts of two different questions part.
        one, other = (self.prompt(first, []) for first in ("A", "1"))
        return one[: shared_length(one, other)]

    def text_of(self, tokens: list[int], mask: str = "") -> str:
        """Return an answer as text, up to its end, with something in place of what is still masked."""
        ends = (self.tokenizer.eos_token_id, self.tokenizer.eot_token_id)
        own = itertools.takewhile(lambda token: token not in ends, tokens)
        runs = itertools.groupby(own, lambda token: token == self.tokenizer.mask_token_id)
        texts = (mask * len([*run]) if masked else decode_text(self.tokenizer, [*run]) for masked, run in runs)
        return turn_of(self.tokenizer, "".join(texts))

    def prompt(self, question: str, turns: list[tuple[str, str]]) -> list[int]:
        """Return the tokens of a question after these turns. Raises ConfigError where no chat template takes them."""
        first, *later = [asked for asked, _ in turns] + [question]
        questions = [GAP.join(part for part in (self.document, first) if part), *later]
        if self.tokenizer.chat_template is None:
            if turns:
                raise ConfigError("a chat needs a tokenizer with a chat template; this model takes one question alone")
            return self._encoder.prompt(questions[0] + "\n").ids
        chat = [{"role": "user", "content": questions[0]}]
        for (_, answer), asked in zip(turns, later, strict=True):
            chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": asked}]
        return self._encoder.encode(rendered(self._encoder, chat, add_generation_prompt=True)).ids


def rendered(encoder: Encoder, chat: Sequence[Mapping[str, Any]], **template: Any) -> str:
    """Return a chat as text. Raises ConfigError where the tokenizer's template refuses it."""
    try:
        return encoder.render(chat, **template)
    except jinja2.TemplateError as error:
        roles, reason = ", ".join(message["role"] for message in chat), " ".join(str(error).split())
        name = encoder.tokenizer.name_or_path
        raise ConfigError(
            f"tokenizer={name!r}: its chat template refuses a chat of {roles} ({reason}); expected one of a chat model"
        ) from error
