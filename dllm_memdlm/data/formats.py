"""How a row becomes a chat: a list of {role, content} messages, of which the last is the response to learn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ..config import ConfigError, DataConfig

Row = Mapping[str, Any]

#: Fields in which a message says something beside its content, in the names that chat templates know.
HELD = frozenset({"tool_calls", "function_call", "reasoning_content", "thinking"})


#: What ShareGPT's chats, which stand under `conversations`, call those who speak.
SPEAKERS = {"human": "user", "gpt": "assistant", "observation": "tool"}
CONVERSATIONS = "conversations"


class Chat(NamedTuple):
    """Messages of {role, content}, both text, and fields of `HELD`; and the functions that they may call."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def instruction(row: Row, config: DataConfig) -> Chat:
    """Join Alpaca-like fields (LongAlpaca's): instruction and optional input, a blank line between them; the output.

    Texts stay as they are: their first spaces may be code's. A blank instruction or input is none.
    """
    parts = [_text(row, name) for name in (config.instruction_field, config.input_field)]
    prompt = {"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}
    return Chat([prompt, {"role": "assistant", "content": _text(row, config.output_field)}])


def messages(row: Row, config: DataConfig) -> Chat:
    """Take a chat as it stands, of any number of turns; the last message is the response.

    A message is {role, content}, or ShareGPT's {from, value}. Its content is text, or a list of parts that hold text.
    It keeps its other fields, which are the chat template's business. Tables give every message the fields of all
    others, without a value: those are left out. The row's field `tools` holds a list, or one as JSON.

    Raises:
        ValueError: not a list of messages, or the last one is not the assistant's; tools of another form.
    """
    field = config.messages_field if config.messages_field in row else CONVERSATIONS
    chat = row[field]
    chat = [_message(value) for value in chat] if isinstance(chat, list) else [None]
    if None in chat:
        raise ValueError(f"field {field!r} is not a list of {{role, content}} or {{from, value}}, both text")
    if not chat or chat[-1]["role"] != "assistant":
        found = chat[-1]["role"] if chat else "no message"
        raise ValueError(f"field {field!r} ends with {found}: expected a message of the assistant")
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"field 'tools' is not JSON ({error}); expected a list of functions") from None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise ValueError(f"field 'tools' is not a list of functions, each an object: found {tools!r:.60}")
    return Chat(chat, _with_values(tools) or None)


def choose_format(config: DataConfig, columns: Iterable[str]) -> Callable[[Row, DataConfig], Chat]:
    """Return what makes chats of rows with these columns: the format that is set, or under `auto` the first that fits.

    It raises ValueError for a row that does not allow it.

    Raises:
        ConfigError: the columns lack a field of the format, or fit none.
    """
    formats = [
        ("messages", messages, [config.messages_field]),
        ("messages", messages, [CONVERSATIONS]),
        ("instruction", instruction, [config.instruction_field, config.output_field]),
    ]
    columns = set(columns)
    wanted = [known for known in formats if config.format in ("auto", known[0])]
    for _, to_chat, fields in wanted:
        if columns.issuperset(fields):
            return to_chat
    raise ConfigError(
        f"data.format={config.format!r}: {config.dataset} has the fields {', '.join(sorted(columns))}; "
        f"expected {', or '.join(' and '.join(fields) for _, _, fields in wanted)}; fields of other "
        "names are told by data.instruction_field, data.output_field and data.messages_field"
    )


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str | None):
        raise ValueError(f"field {field!r}: expected text, found {value!r:.60}")
    return value or ""


def _message(value: Any) -> dict[str, Any] | None:
    """Return a message as chat templates know it; none for what is no message.

    Raises:
        ValueError: a part of its content is no text.
    """
    if not isinstance(value, Mapping):
        return None
    shared = value.get("role") is None and "from" in value
    role, content = ("from", "value") if shared else ("role", "content")
    speaker, said = value.get(role), value.get(content, ...)
    if isinstance(said, list):
        for part in said:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                raise ValueError(f"a message has the part {part!r:.60}: expected text alone, {{type: text, text: …}}")
        said = "".join(part["text"] for part in said)
    if not isinstance(speaker, str) or not isinstance(said, str | None):
        return None
    rest = {name: own for name, own in _with_values(value).items() if name not in (role, content)}
    return {"role": SPEAKERS.get(speaker, speaker) if shared else speaker, "content": said or "", **rest}


def _with_values(value: Any) -> Any:
    """Return a value without the fields that have none, at any depth."""
    if isinstance(value, Mapping):
        return {key: _with_values(item) for key, item in value.items() if item is not None}
    return [_with_values(item) for item in value] if isinstance(value, list) else value
