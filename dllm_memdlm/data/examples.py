"""From rows to training examples: chats in token ids, with the labels that say which tokens are learned."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets
import jinja2
from transformers import PreTrainedTokenizerBase

from dllm_memdlm.config import ConfigError, DataConfig
from dllm_memdlm.data import formats
from dllm_memdlm.data.formats import Format, choose_format
from dllm_memdlm.data.sources import load_rows

IGNORED = -100


class Counts(NamedTuple):
    """What became of the rows of a split; lengths in tokens, of the kept examples."""

    kept: int
    too_long: int
    empty: int
    longest: int
    mean: float

    def __str__(self) -> str:
        return (
            f"{self.kept:,} examples of {self.mean:.0f} tokens on average, {self.longest:,} at most "
            f"(dropped: {self.too_long:,} too long, {self.empty:,} without a response)"
        )


class Examples(NamedTuple):
    """Tokenised splits. A row of either is {"input_ids": list[int], "labels": list[int]}, of the same length."""

    train: datasets.Dataset
    eval: datasets.Dataset | None
    train_counts: Counts
    eval_counts: Counts | None

    def summary(self) -> str:
        """One line for the log."""
        return f"train: {self.train_counts}; eval: {self.eval_counts or 'none'}"


def load_examples(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Read, format and tokenise both splits; drop and count what is too long or has an empty response.

    With mask_prompt, labels are -100 on the prompt: every message but the last, and the marker that opens the reply.

    Raises:
        ConfigError: what `load_rows` and `choose_format` raise; the tokenizer has no chat template, or one whose prompt
            is not how the whole chat begins; a row does not fit the format; or no example of a split is left.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"model.tokenizer={tokenizer.name_or_path!r}: has no chat template; expected a tokenizer of a chat model"
        )
    train, held_out = load_rows(config)
    train_examples, train_counts = _tokenise(train, "train", config, tokenizer)
    eval_examples, eval_counts = _tokenise(held_out, "eval", config, tokenizer) if held_out else (None, None)
    return Examples(train_examples, eval_examples, train_counts, eval_counts)


def training_texts(config: DataConfig) -> Iterator[str]:
    """The contents of the training rows' messages, in order, to train a tokenizer on.

    Raises:
        ConfigError: as `load_examples`.
    """
    rows, _ = load_rows(config)
    chosen = choose_format(config, rows.column_names)
    for i, row in enumerate(rows):
        for message in _to_messages(row, chosen, config, f"train row {i}"):
            yield message["content"]


def _tokenise(
    rows: datasets.Dataset, split: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[datasets.Dataset, Counts]:
    chosen = choose_format(config, rows.column_names)
    encoded = rows.map(
        _encode,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=config.num_proc if config.num_proc > 1 else None,
        # `datasets` keys its cache by a function's name: without the text, an edited format would serve old examples
        fn_kwargs=dict(
            split=split, chosen=chosen.to_messages.__name__, config=config, tokenizer=tokenizer, code=_CODE
        ),
        desc=f"tokenising {split}",
    )
    lengths = encoded["length"][:]
    kept = [i for i, length in enumerate(lengths) if 0 < length <= config.max_length]
    total = sum(lengths[i] for i in kept)
    too_long = sum(length > config.max_length for length in lengths)
    empty = lengths.count(0)
    if not kept:
        found = f"; they have {min(filter(None, lengths)):,} to {max(lengths):,} tokens" if too_long else ""
        raise ConfigError(
            f"data.max_length={config.max_length}: no {split} example is left of {len(lengths):,} in {config.dataset}: "
            f"{too_long:,} too long, {empty:,} without a response{found}"
        )
    counts = Counts(len(kept), too_long, empty, max(lengths[i] for i in kept), total / len(kept))
    return encoded.select(kept).remove_columns("length"), counts
