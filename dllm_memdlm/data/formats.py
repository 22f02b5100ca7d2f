"""How a row becomes a chat: a list of {role, content} messages, of which the last is the response to learn."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ..config import ConfigError, DataConfig
from .needle import Row, check_needles, plant, sentences_of

Messages = list[dict[str, Any]]  #: of {role, content}, both text; a message may say more in fields of `HELD`
Tools = list[dict[str, Any]] | None  #: functions that a chat may call
ToMessages = Callable[[Row, DataConfig], Messages]
ToTools = Callable[[Row], Tools]

#: Fields in which a message says something beside its content, in the names that chat templates know.
HELD = frozenset({"tool_calls", "function_call", "reasoning_content", "thinking"})

# HotpotQA's fields that hold pairs, and what the hub's form calls the two halves of a pair
PAIRS = {"context": ("title", "sentences"), "supporting_facts": ("title", "sent_id")}


def no_tools(row: Row) -> Tools:
    """None, as all formats but one have."""
    return None


class Format(NamedTuple):
    """The fields a row must have, and the chat that is made of them (ValueError: the row does not allow it)."""

    fields: Callable[[DataConfig], tuple[str, ...]]
    to_messages: ToMessages
    to_tools: ToTools = no_tools
    auto: bool = True  #: whether `auto` may choose it


def instruction(row: Row, config: DataConfig) -> Messages:
    """Alpaca-like fields (LongAlpaca's): instruction and optional input, a blank line between them, and the output.

    Texts stay as they are: their first spaces may be code's. A blank instruction or input is none.
    """
    parts = (_text(row, name) for name in (config.instruction_field, config.input_field))
    return _chat("\n\n".join(part for part in parts if part.strip()), _text(row, config.output_field))


def messages(row: Row, config: DataConfig) -> Messages:
    """A chat as it stands, of any number of turns; the last message is the response.

    Messages keep all their fields, which are the chat template's business. Tables give every message the fields of all
    others, without a value: those are left out.

    Raises:
        ValueError: not a list of {role, content}, or the last message is not the assistant's.
    """
    chat = row[config.messages_field]
    if not isinstance(chat, list) or not all(map(_is_message, chat)):
        raise ValueError(f"field {config.messages_field!r} is not a list of {{role, content}}, both text")
    if not chat or chat[-1]["role"] != "assistant":
        found = chat[-1]["role"] if chat else "no message"
        raise ValueError(f"field {config.messages_field!r} ends with {found}: expected a message of the assistant")
    return [{**_with_values(m), "content": m["content"] or ""} for m in chat]


def tools_of(row: Row) -> Tools:
    """The functions that a chat may call: its row's field `tools`, as a list or as JSON; none if there are none."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"field 'tools' is not JSON ({error}); expected a list of functions") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"field 'tools' is not a list of functions, each an object: found {tools!r:.60}")
    return [_with_values(tool) for tool in tools]


def hotpotqa(row: Row, config: DataConfig) -> Messages:
    """A HotpotQA question over its paragraphs; the response quotes the evidence, then answers.

    Most answers are a few words: too few masked tokens to train a small model on, and facts it cannot know. The quotes
    make the response long, and the prompt alone determines them, so the loss rewards using the prompt. Every sentence
    follows a space, in the prompt as in the quote, so that both have the same tokens. The two supporting paragraphs
    alone keep examples short; with all ten, in the row's order, the evidence has to be found first.

    RULER scores this very set (qa_2): a model trained on it must not be scored there.
    """
    facts = set(_halves(row, "supporting_facts", str, int))
    supporting = {title for title, _ in facts}
    kept, quotes = [], []
    for title, sentences in _paragraphs(row):
        if title in supporting or config.hotpotqa_paragraphs == "all":
            kept.append(f"{title}: {' '.join(sentences)}")
        # a few facts name a sentence beyond the paragraph's end; those are left out
        quotes += [f"> {sentence}" for i, sentence in enumerate(sentences) if (title, i) in facts]
    prompt = "\n\n".join([*kept, f"Question: {_text(row, 'question').strip()}"])
    return _chat(prompt, "\n".join([*quotes, f"Answer: {_text(row, 'answer').strip()}"]))


def paragraphs(row: Row, config: DataConfig) -> Messages:
    """The paragraphs of a HotpotQA row as a text of their own, in one message: no question, and no answer.

    Something to train on all tokens of, such as a causal model that has to learn to fill in masks.

    Raises:
        ValueError: the row has no paragraphs.
    """
    sentences_of(row)
    text = "\n\n".join(f"{title}: {' '.join(sentences)}" for title, sentences in _paragraphs(row))
    return [{"role": "assistant", "content": text}]


def needle(row: Row, config: DataConfig) -> Messages:
    """Keys and values planted in the sentences of a HotpotQA row, all of them asked for (see data/needle.py).

    Of the lengths in `needle_words` each row takes one, the same one always.

    Raises:
        ConfigError: the lengths have no room for `needle_count` needles.
    """
    check_needles(config.needle_words, config.needle_count)
    haystack = sentences_of(row)
    words = random.Random(f"length {haystack}").choice(config.needle_words)
    example = plant(haystack, words, config.needle_count)
    return _chat(example.prompt, example.response)


def pairs_to_columns(row: Row) -> Row:
    """HotpotQA's released rows in the form of the hub's, any other row as it is.

    The release writes [title, sentences] and [title, number] pairs. Arrow has no type for a list of mixed types; the
    hub keeps a list of titles beside a list of sentences or numbers.
    """
    if not all(_is_pairs(row.get(field)) for field in PAIRS):
        return row
    columns = {
        field: {name: [pair[i] for pair in row[field]] for i, name in enumerate(names)}
        for field, names in PAIRS.items()
    }
    return {**row, **columns}


# `auto` takes the first of those it may choose of which the rows have every field.
FORMATS: dict[str, Format] = {
    "messages": Format(lambda c: (c.messages_field,), messages, tools_of),
    "hotpotqa": Format(lambda c: ("question", "answer", "context", "supporting_facts"), hotpotqa),
    "instruction": Format(lambda c: (c.instruction_field, c.output_field), instruction),
    "paragraphs": Format(lambda c: ("context",), paragraphs, auto=False),
    "needle": Format(lambda c: ("context",), needle, auto=False),
}


def choose_format(config: DataConfig, columns: Iterable[str]) -> Format:
    """The format that the configuration names, or under `auto` the one that the columns fit.

    Raises:
        ConfigError: the columns lack a field of the format, or fit none.
    """
    columns = set(columns)
    automatic = [name for name, known in FORMATS.items() if known.auto]
    names = automatic if config.format == "auto" else [config.format]
    for name in names:
        if columns.issuperset(FORMATS[name].fields(config)):
            return FORMATS[name]
    wanted = "; or ".join(f"{name}: {', '.join(FORMATS[name].fields(config))}" for name in names)
    raise ConfigError(
        f"data.format={config.format!r}: {config.dataset} has the fields {', '.join(sorted(columns))}; "
        f"expected {wanted}"
    )


def _paragraphs(row: Row) -> list[tuple[str, list[str]]]:
    """The title and the stripped sentences of each paragraph of a HotpotQA row."""
    return [(title, [s.strip() for s in sentences]) for title, sentences in _halves(row, "context", str, list)]


def _halves(row: Row, field: str, first: type, second: type) -> list[tuple[Any, Any]]:
    """The pairs that HotpotQA has in a field. Raises ValueError if they are none."""
    value, names = row[field], PAIRS[field]
    lists = [value.get(name) if isinstance(value, Mapping) else None for name in names]
    if all(isinstance(items, list) for items in lists) and len(lists[0]) == len(lists[1]):
        pairs = list(zip(*lists, strict=True))
        if all(isinstance(one, first) and isinstance(other, second) for one, other in pairs) and all(
            isinstance(sentence, str) for _, other in pairs if second is list for sentence in other
        ):
            return pairs
    raise ValueError(
        f"field {field!r} is not as in HotpotQA: expected pairs, or the hub's two lists, {' and '.join(names)}"
    )


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str | None):
        raise ValueError(f"field {field!r}: expected text, found {value!r:.60}")
    return value or ""


def _is_message(value: Any) -> bool:
    fields = isinstance(value, Mapping) and {"role", "content"} <= value.keys()
    return fields and isinstance(value["role"], str) and isinstance(value["content"], str | None)


def _with_values(value: Any) -> Any:
    """A value without the fields that have none, at any depth."""
    if isinstance(value, Mapping):
        return {key: _with_values(item) for key, item in value.items() if item is not None}
    return [_with_values(item) for item in value] if isinstance(value, list) else value


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)


def _chat(prompt: str, response: str) -> Messages:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
