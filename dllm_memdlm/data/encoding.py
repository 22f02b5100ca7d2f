"""Token ids of texts and chats. What a user wrote is text: only the chat template writes special tokens.

A tokenizer finds its special tokens in any text that spells them. `render` therefore puts a mark inside those that
stand in a message, and `encode` takes the marks out again: what a mark has split becomes ordinary tokens.

    encoder = Encoder(tokenizer)
    tokens = encoder.encode(encoder.render(chat, add_generation_prompt=True))  # a chat
    tokens = encoder.text("a text that may spell <|mask|>")  # a text alone
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..config import ConfigError

#: Unicode keeps this code point for a program's own use: no text has it.
MARK = "\ufdd0"


class Tokens(NamedTuple):
    """Token ids, and where in the text each token ends (none where the tokenizer is a slow one, which cannot say)."""

    ids: list[int]
    ends: list[int] | None


class Encoder:
    """A tokenizer that knows which of its special tokens may be meant; `template` are its template's own arguments."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any] | None = None) -> None:
        self.tokenizer, self._template = tokenizer, dict(template or {})
        tokens = {str(token): token for token in tokenizer.added_tokens_decoder.values() if token.special}
        named = [*tokenizer.all_special_tokens, getattr(tokenizer, "eot_token", None)]
        tokens = {**dict.fromkeys(filter(None, named)), **tokens}
        # one letter is no spelling of a special token, and what is unknown may be so
        spelled = sorted((t for t in tokens if len(t) > 1), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, spelled)) or r"(?!)")
        self._written = re.compile(f"({'|'.join(_with_spaces(t, tokens[t]) for t in spelled) or '(?!)'})")
        self._ids = set(tokenizer.convert_tokens_to_ids(spelled)) - {tokenizer.unk_token_id}

    def text(self, text: str) -> Tokens:
        """Encode a text in which nothing is special, without what the tokenizer adds around a text."""
        return self._ordinary(text) if self._spelled.search(text) else self._call([text])[0]

    def render(self, chat: Sequence[Mapping[str, Any]], **template: Any) -> str:
        """Return a chat as its template writes it, with marks in what the messages spell.

        `template` is what apply_chat_template takes.

        Raises:
            ConfigError: the template does not leave the text of a message as it is, so that nobody knows whose a
                special token is.
        """
        template = {**self._template, **template}
        plain = self._render(chat, template)
        marked = [{k: v if k == "role" else self.marked(v) for k, v in message.items()} for message in chat]
        settings = self.marked(template)
        if marked == list(chat) and settings == template:
            return plain
        text = self._render(marked, settings)
        if unmarked(text) != plain:
            found: list[str] = []
            _each_text([*chat, template], lambda text: found.extend(self._spelled.findall(text)))
            raise ConfigError(
                "a message spells a special token, and the chat template changes what a message says; expected a text "
                f"without {found[0]!r}"
            )
        return text

    def encode(self, rendered: str) -> Tokens:
        """Encode a rendered chat; `ends` count without the marks."""
        return self.encode_all([rendered])[0]

    def encode_all(self, rendered: Sequence[str]) -> list[Tokens]:
        """Encode several, which a fast tokenizer does side by side."""
        plain = iter(self._call([text for text in rendered if MARK not in text]))
        return [self._encode_marked(text) if MARK in text else next(plain) for text in rendered]

    def prompt(self, text: str) -> Tokens:
        """Encode a text to go on from: as the tokenizer begins it, without what it appends, such as an end of text."""
        return self.begun(self.text(text))

    def begun(self, tokens: Tokens) -> Tokens:
        """Put what the tokenizer puts before every text before these: often nothing, or its first token."""
        return _joined([("", self._start), ("", tokens)])

    def marked(self, value: Any) -> Any:
        """Return a value in whose texts every special token that they spell has a mark after its first letter."""
        return _each_text(value, self._mark)

    def _mark(self, text: str) -> str:
        while self._spelled.search(text):  # again, where two spellings share letters
            text = self._spelled.sub(lambda found: f"{found[0][0]}{MARK}{found[0][1:]}", text)
        return text

    @cached_property
    def _start(self) -> Tokens:
        """What the tokenizer puts before every text."""
        inner, whole = (self.tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
        count = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
        return Tokens(whole[:count], [0] * count)

    def _render(self, chat: Sequence[Mapping[str, Any]], template: Mapping[str, Any]) -> str:
        # a list of chats: of a chat without messages, transformers asks for the first one
        (text,) = self.tokenizer.apply_chat_template([list(chat)], tokenize=False, **template)
        return text

    def _encode_marked(self, text: str) -> Tokens:
        """Make ordinary tokens of what spells one between special tokens; all before, between and after as ever."""
        pieces = [""]
        for part in self._written.split(text):  # text, special token, text, … and text
            if MARK in part:
                pieces += [part, ""]
            else:
                pieces[-1] += part
        encoded = [self._ordinary(unmarked(p)) if MARK in p else self._call([p])[0] for p in pieces]
        return _joined([*zip(map(unmarked, pieces), encoded, strict=True)])

    def _ordinary(self, text: str) -> Tokens:
        tokens = self._call([text], split_special_tokens=True)[0]
        if self._ids.isdisjoint(tokens.ids):
            return tokens
        # a vocabulary of words holds its special tokens as words: cut them
        parts = self._mark(text).split(MARK)
        return _joined([(part, self._call([part], split_special_tokens=True)[0]) for part in parts])

    def _call(self, texts: list[str], **settings: Any) -> list[Tokens]:
        if not texts:
            return []
        fast = self.tokenizer.is_fast
        settings |= {"add_special_tokens": False, "return_offsets_mapping": fast}
        encoded = self.tokenizer(texts, padding=False, truncation=False, **settings)
        if not fast:
            return [Tokens(ids, None) for ids in encoded["input_ids"]]
        both = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [Tokens(ids, [end for _, end in spans]) for ids, spans in both]


def encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Mapping[str, Any]], **template: Any) -> list[int]:
    """Return the token ids of a chat, in which only the template's own special tokens are special."""
    encoder = Encoder(tokenizer)
    return encoder.encode(encoder.render(chat, **template)).ids


def decode_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return what tokens say, without special ones. Spaces stay: tidying them is up to the release otherwise."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def turn_of(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return an answer up to the text that ends a turn, where that is no token: BERT's `[/Answer]`."""
    end = getattr(tokenizer, "turn_end", None)
    return text if end is None else text.partition(end)[0]


def unmarked(rendered: str) -> str:
    """Return a rendered chat as its template has written it."""
    return rendered.replace(MARK, "")


def _each_text(value: Any, change: Callable[[str], Any]) -> Any:
    """Return a value with each text in it changed, but for the keys of mappings."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _each_text(item, change) for key, item in value.items()}
    return [_each_text(item, change) for item in value] if isinstance(value, (list, tuple)) else value


def _with_spaces(token: str, added: Any) -> str:
    """Return the pattern of a special token with the spaces beside it that belong to it."""
    before, after = (r"\s*" if getattr(added, side, False) else "" for side in ("lstrip", "rstrip"))
    return before + re.escape(token) + after


def _joined(parts: Sequence[tuple[str, Tokens]]) -> Tokens:
    """Join the tokens of texts that follow each other; ends count from the first one's begin."""
    ids: list[int] = []
    ends: list[int] | None = []
    start = 0
    for text, tokens in parts:
        ids += tokens.ids
        ends = None if ends is None or tokens.ends is None else ends + [start + end for end in tokens.ends]
        start += len(text)
    return Tokens(ids, ends)
