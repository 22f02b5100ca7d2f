"""From rows to training examples: chats in token ids, with the labels that say which tokens are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import datasets
import jinja2
from transformers import PreTrainedTokenizerBase

from ..config import ConfigError, DataConfig
from .encoding import Encoder, Tokens, unmarked
from .formats import HELD, Chat, Row, choose_format
from .sources import SPLIT_SEED, Rows, load_rows, reason_of

IGNORED = -100

#: Of the cached examples: another one for every change after which a row has other tokens, labels or errors. `datasets`
#: keys its cache by a function's name and arguments, not by its code.
VERSION = 2
SHUFFLED = 10_000  #: examples of a stream at a time


class Counts(NamedTuple):
    """What became of a split's rows. `longest` and `mean` are lengths in tokens, of the kept examples."""

    kept: int
    too_long: int
    empty: int
    longest: int
    mean: float
    cut: int = 0

    def __str__(self) -> str:
        cut = f"; cut {self.cut:,}" if self.cut else ""
        return (
            f"{self.kept:,} examples, mean {self.mean:.1f} tokens, longest {self.longest:,} "
            f"(dropped {self.too_long:,} too long, {self.empty:,} without a response{cut})"
        )


class Examples(NamedTuple):
    """Tokenised splits. A row of either is {"input_ids": list[int], "labels": list[int]}, both of one length.

    With `data.visible` they are what the model sees, and {"prompt_ids": list[int]} is the whole prompt.
    """

    train: datasets.Dataset | datasets.IterableDataset
    eval: datasets.Dataset | None
    train_counts: Counts | None
    eval_counts: Counts | None

    def summary(self) -> str:
        """One line for the log."""
        return f"train: {self.train_counts or 'streamed'}; eval: {self.eval_counts or 'none'}"


def load_examples(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Read, format and tokenise both splits; drop and count examples that are too long or have an empty response.

    With mask_prompt, labels are -100 on the prompt: every message but the last, and the marker that opens the reply.
    A token that reaches over the prompt's end into the response is learned. Of several datasets the examples follow
    each other, or are drawn by their shares, until one of them has no more; what is held out of each follows.

    Raises:
        ConfigError: what `load_rows` and `choose_format` raise; the tokenizer has no chat template, or one whose prompt
            is not how the whole chat begins; a row does not fit the format, or says what the template leaves out; no
            example of a split is left.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"model.tokenizer={tokenizer.name_or_path!r}: has no chat template; expected the tokenizer of a chat model"
        )
    loaded = [_load_one(part, tokenizer) for part in config.parts().values()]
    if len(loaded) == 1:
        return loaded[0]
    if isinstance(config.dataset, dict):
        shares = [share / sum(config.dataset.values()) for share in config.dataset.values()]
        train = datasets.interleave_datasets([own.train for own in loaded], shares, seed=SPLIT_SEED)
    else:
        train = datasets.concatenate_datasets([own.train for own in loaded])
    counts = _counts_of(train, [own.train_counts for own in loaded])
    held_out = [(own.eval, own.eval_counts) for own in loaded if own.eval is not None]
    if not held_out:
        return Examples(train, None, counts, None)
    evaluated = datasets.concatenate_datasets([rows for rows, _ in held_out])
    return Examples(train, evaluated, counts, _counts_of(evaluated, [own for _, own in held_out]))


def _counts_of(examples: Any, of_parts: Sequence[Counts | None]) -> Counts | None:
    if None in of_parts:
        return None
    lengths = [len(tokens) for tokens in examples["input_ids"]]
    dropped, empty, cut = (sum(getattr(own, name) for own in of_parts) for name in ("too_long", "empty", "cut"))
    return Counts(len(lengths), dropped, empty, max(lengths), sum(lengths) / len(lengths), cut)


def _load_one(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Examples:
    train_rows, eval_rows = load_rows(config)
    train, train_counts = _tokenise(train_rows, "train", config, tokenizer)
    if eval_rows is None:
        return Examples(train, None, train_counts, None)
    held_out, eval_counts = _tokenise(eval_rows, "eval", config, tokenizer)
    return Examples(train, held_out, train_counts, eval_counts)


def training_texts(config: DataConfig) -> Iterator[str]:
    """Yield the contents of the training rows' messages, in order: what a tokenizer is trained on.

    Raises:
        ConfigError: what `load_rows` and `choose_format` raise; a row does not fit the format.
    """
    for part in config.parts().values():
        (rows, numbers, split), _ = load_rows(part)
        to_chat = choose_format(part, rows.column_names)
        for number, row in zip(numbers, rows, strict=True):
            with _named(part, split, number):
                chat = to_chat(row, part)
            yield from (message["content"] for message in chat.messages)


def _tokenise(
    source: Rows, role: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, Counts | None]:
    rows, numbers, split = source
    streamed = isinstance(rows, datasets.IterableDataset)
    columns = list(next(iter(rows), {})) if streamed else rows.column_names
    settings = {"numbers": numbers, "split": split, "config": config, "tokenizer": tokenizer, "version": VERSION}
    settings |= {"to_chat": choose_format(config, columns)}
    how = {"batched": True, "with_indices": True, "remove_columns": columns, "fn_kwargs": settings}
    if streamed:
        fits = rows.map(_encode, **how).filter(lambda row: 0 < row["length"] <= config.max_length)
        return fits.remove_columns(["length", "cut"]).shuffle(SPLIT_SEED, buffer_size=SHUFFLED), None
    processes = config.num_proc if config.num_proc > 1 else None  # 1 would start a process for nothing
    encoded = rows.map(_encode, **how, num_proc=processes, desc=f"tokenising {role}")
    lengths = encoded["length"][:]
    kept = [i for i, length in enumerate(lengths) if 0 < length <= config.max_length]
    too_long, empty = sum(length > config.max_length for length in lengths), lengths.count(0)
    if not kept:
        where, seen = f"data.dataset={config.dataset!r}", "expected a response in at least one"
        if too_long:
            where = f"data.max_length={config.max_length}"
            seen = f"their lengths go from {min(filter(None, lengths)):,} to {max(lengths):,} tokens"
        raise ConfigError(
            f"{where}: none of the {len(lengths):,} {role} examples of {config.dataset} is left "
            f"({too_long:,} too long, {empty:,} without a response); {seen}"
        )
    kept_lengths = [lengths[i] for i in kept]
    cut = sum(encoded["cut"][:])
    counts = Counts(len(kept), too_long, empty, max(kept_lengths), sum(kept_lengths) / len(kept), cut)
    return encoded.select(kept).remove_columns(["length", "cut"]), counts


def _encode(
    batch: dict[str, list],
    indices: list[int],
    numbers: Sequence[int],
    split: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    to_chat: Callable[[Row, DataConfig], Chat],
    version: int,
) -> dict[str, list]:
    """Return token ids and labels of a batch of rows; length 0 marks an empty response."""
    encoder = Encoder(tokenizer, config.template)
    wholes, prompts, responses = [], [], []
    for index, *values in zip(indices, *batch.values(), strict=True):
        with _named(config, split, numbers[index]):
            chat = to_chat(dict(zip(batch, values, strict=True)), config)
            wholes.append(_render(encoder, chat))
            prompts.append(_prompt(encoder, chat, wholes[-1]) if config.mask_prompt else "")
            _refuse_what_is_left_out(encoder, chat, wholes[-1])
        last = chat.messages[-1]
        responses.append(last["content"].strip() or any(last.get(field) for field in HELD))
    encoded: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": [], "cut": []}
    if config.visible is not None:
        encoded["prompt_ids"] = []
    for tokens, prompt, response in zip(encoder.encode_all(wholes), prompts, responses, strict=True):
        border = _border(encoder, tokens, prompt)
        start = 0 if config.visible is None else max(0, border - config.visible)
        end, room = len(tokens.ids), start + config.max_length
        response = response and border < end
        if cut := bool(response) and config.truncation == "right" and border < room < end:
            end = room
        encoded["input_ids"].append(tokens.ids[start:end])
        encoded["labels"].append([IGNORED] * (border - start) + tokens.ids[border:end])
        encoded["length"].append(end - start if response else 0)
        encoded["cut"].append(cut)
        if config.visible is not None:
            encoded["prompt_ids"].append(tokens.ids[:border])
    return encoded


def _render(encoder: Encoder, chat: Chat, **template: Any) -> str:
    """Return the text of a chat. Raises ValueError if the template refuses it, ConfigError if the template is none."""
    try:
        return encoder.render(chat.messages, tools=chat.tools, **template)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"model.tokenizer={encoder.tokenizer.name_or_path!r}: line {error.lineno} of its chat template is not "
            f"Jinja: {reason_of(error)}; expected a tokenizer with a template that can be read"
        ) from error
    except ConfigError as error:
        raise ValueError(error) from error  # of the row, not of a setting
    except (jinja2.TemplateError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"the chat template of the tokenizer refuses the chat: {reason_of(error)}") from error


def _prompt(encoder: Encoder, chat: Chat, whole: str) -> str:
    """Return the text before the response. Raises ValueError where the whole chat does not begin with it."""
    prompt = _render(encoder, Chat(chat.messages[:-1], chat.tools), add_generation_prompt=True)
    if not unmarked(whole).startswith(unmarked(prompt)):
        raise ValueError(
            "the prompt is not how the whole chat begins; expected a chat template that only appends the response, or "
            "data.mask_prompt=false"
        )
    return prompt


def _border(encoder: Encoder, tokens: Tokens, prompt: str) -> int:
    """Return how many tokens belong to the prompt alone: tokens may merge where the response begins."""
    if tokens.ends is not None:
        length = len(unmarked(prompt))
        return next((i for i, end in enumerate(tokens.ends) if end > length), len(tokens.ids))
    alone = encoder.encode(prompt).ids
    return next((i for i, (a, b) in enumerate(zip(alone, tokens.ids, strict=False)) if a != b), len(alone))


def _refuse_what_is_left_out(encoder: Encoder, chat: Chat, whole: str) -> None:
    """Raise ValueError if a chat has tools, or a message what it says beside its text, and the template drops that."""
    messages, tools = chat
    without = {"tools": Chat(messages)} if tools else {}
    for i, message in enumerate(messages):
        for field in HELD & message.keys():
            # templates leave the reasoning of earlier turns out on purpose
            if i == len(messages) - 1 or "call" in field:
                rest = {key: value for key, value in message.items() if key != field}
                without[field] = Chat([*messages[:i], rest, *messages[i + 1 :]], tools)
    for field, shorter in without.items():
        try:
            same = encoder.render(shorter.messages, tools=shorter.tools) == whole
        except jinja2.TemplateError:
            continue  # the template asks for it
        if same:
            raise ValueError(
                f"the chat template of the tokenizer leaves out {field}; expected rows without, or a tokenizer whose "
                "template writes them"
            )


@contextmanager
def _named(config: DataConfig, split: str, number: int) -> Iterator[None]:
    """Name the row in the errors of a block."""
    try:
        yield
    except ConfigError:
        raise  # a setting, whichever row met it
    except ValueError as error:
        raise ConfigError(f"data.dataset={config.dataset!r}, {split} row {number}: {error}") from error
