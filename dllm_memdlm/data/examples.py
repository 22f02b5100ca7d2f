"""From rows to training examples: chats in token ids, with the labels that say which tokens are learned."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import jinja2
from transformers import PreTrainedTokenizerBase

from dllm_memdlm.config import ConfigError, DataConfig
from dllm_memdlm.data import formats, needle
from dllm_memdlm.data.formats import Messages, Row, choose_format
from dllm_memdlm.data.sources import load_rows

IGNORED = -100

# `datasets` keys its cache by a function's name alone: without this text, an edited format would serve old examples.
_CODE = Path(__file__).read_text(encoding="utf-8") + inspect.getsource(formats) + inspect.getsource(needle)


class Counts(NamedTuple):
    """What became of a split's rows. `longest` and `mean` are lengths in tokens, of the kept examples."""

    kept: int
    too_long: int
    empty: int
    longest: int
    mean: float

    def __str__(self) -> str:
        return (
            f"{self.kept:,} examples, mean {self.mean:.1f} tokens, longest {self.longest:,} "
            f"(dropped {self.too_long:,} too long, {self.empty:,} without a response)"
        )


class Examples(NamedTuple):
    """Tokenised splits. A row of either is {"input_ids": list[int], "labels": list[int]}, both of one length."""

    train: datasets.Dataset
    eval: datasets.Dataset | None
    train_counts: Counts
    eval_counts: Counts | None

    def summary(self) -> str:
        """One line for the log."""
        return f"train: {self.train_counts}; eval: {self.eval_counts or 'none'}"


def load_examples(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Read, format and tokenise both splits; drop and count examples that are too long or have an empty response.

    With mask_prompt, labels are -100 on the prompt: every message but the last, and the marker that opens the reply.

    Raises:
        ConfigError: what `load_rows` and `choose_format` raise; the tokenizer has no chat template, or one whose prompt
            is not how the whole chat begins; a row does not fit the format; no example of a split is left.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"model.tokenizer={tokenizer.name_or_path!r}: has no chat template; expected the tokenizer of a chat model"
        )
    train_rows, eval_rows = load_rows(config)
    train, train_counts = _tokenise(train_rows, "train", config, tokenizer)
    if eval_rows is None:
        return Examples(train, None, train_counts, None)
    held_out, eval_counts = _tokenise(eval_rows, "eval", config, tokenizer)
    return Examples(train, held_out, train_counts, eval_counts)


def training_texts(config: DataConfig) -> Iterator[str]:
    """The contents of the training rows' messages, in order: what a tokenizer is trained on.

    Raises:
        ConfigError: what `load_rows` and `choose_format` raise; a row does not fit the format.
    """
    rows, _ = load_rows(config)
    to_messages = choose_format(config, rows.column_names).to_messages
    for index, row in enumerate(rows):
        for message in _format(row, index, "train", config, to_messages):
            yield message["content"]


def _tokenise(
    rows: datasets.Dataset, split: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[datasets.Dataset, Counts]:
    encoded = rows.map(
        _encode,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=config.num_proc if config.num_proc > 1 else None,  # 1 would start a process for nothing
        desc=f"tokenising {split}",
        fn_kwargs={
            "split": split,
            "config": config,
            "tokenizer": tokenizer,
            "to_messages": choose_format(config, rows.column_names).to_messages,
            "code": _CODE,
        },
    )
    lengths = encoded["length"][:]
    kept = [i for i, length in enumerate(lengths) if 0 < length <= config.max_length]
    too_long, empty = sum(length > config.max_length for length in lengths), lengths.count(0)
    if not kept:
        seen = f"; their lengths go from {min(filter(None, lengths)):,} to {max(lengths):,} tokens" if too_long else ""
        raise ConfigError(
            f"data.max_length={config.max_length}: none of the {len(lengths):,} {split} examples of {config.dataset} "
            f"is left ({too_long:,} too long, {empty:,} without a response){seen}"
        )
    kept_lengths = [lengths[i] for i in kept]
    counts = Counts(len(kept), too_long, empty, max(kept_lengths), sum(kept_lengths) / len(kept))
    return encoded.select(kept).remove_columns("length"), counts


def _encode(
    batch: dict[str, list],
    indices: list[int],
    split: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    to_messages: Callable[[Row, DataConfig], Messages],
    code: str,
) -> dict[str, list]:
    """Token ids and labels of a batch of rows; length 0 marks an empty response. `code` only enters the cache's key."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    chats = [_format(row, i, split, config, to_messages) for i, row in zip(indices, rows, strict=True)]
    try:
        wholes = tokenizer.apply_chat_template(chats, return_dict=False)
        prompts: list[list[int]] = [[] for _ in chats]
        if config.mask_prompt:
            prompts = tokenizer.apply_chat_template(
                [chat[:-1] for chat in chats], add_generation_prompt=True, return_dict=False
            )
    except jinja2.TemplateError as error:
        raise ConfigError(
            f"data.dataset={config.dataset!r}, {split} rows {indices[0]} to {indices[-1]}: the chat template of the "
            f"tokenizer refuses a chat: {error}"
        ) from error
    encoded: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
    for i, chat, whole, prompt in zip(indices, chats, wholes, prompts, strict=True):
        if whole[: len(prompt)] != prompt:
            raise ConfigError(
                f"data.dataset={config.dataset!r}, {split} row {i}: the prompt's tokens are not the first tokens of "
                "the whole chat; expected a chat template that only appends the response, or data.mask_prompt=false"
            )
        encoded["input_ids"].append(whole)
        encoded["labels"].append([IGNORED] * len(prompt) + whole[len(prompt) :])
        encoded["length"].append(len(whole) if chat[-1]["content"].strip() else 0)
    return encoded


def _format(
    row: Row, index: int, split: str, config: DataConfig, to_messages: Callable[[Row, DataConfig], Messages]
) -> Messages:
    try:
        return to_messages(row, config)
    except ValueError as error:
        raise ConfigError(f"data.dataset={config.dataset!r}, {split} row {index}: {error}") from None
