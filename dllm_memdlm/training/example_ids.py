"""Examples and their place in the dataset, by which their noise is drawn, their prompts, and their lengths."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import datasets
from torch.utils.data import Dataset

#: The field of an example that holds its index in the dataset.
EXAMPLE_ID = "example_id"
#: The field of its whole prompt, where `input_ids` hold the end of it alone; and in an evaluation of another one's.
PROMPT, OTHER_PROMPT = "prompt_ids", "other_prompt_ids"


class _With(Dataset[dict[str, Any]]):
    """A map-style dataset whose items carry more: what `more` says of the dataset and an index."""

    def __init__(self, dataset: Any, more: Callable[[Any, int], dict[str, Any]]) -> None:
        self.dataset, self.more = dataset, more

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], **self.more(self.dataset, index)}


def _number(dataset: Any, index: int) -> dict[str, Any]:
    return {EXAMPLE_ID: index}


def _other_prompt(dataset: Any, index: int) -> dict[str, Any]:
    return {OTHER_PROMPT: prompt_of(dataset[(index + 1) % len(dataset)])}


def with_other_prompts(dataset: Any) -> Any:
    """The dataset of `with_example_ids`, each example with the next one's prompt; a streaming one stays as it is."""
    if isinstance(dataset, dict):
        return {name: with_other_prompts(part) for name, part in dataset.items()}
    without = isinstance(dataset, datasets.Dataset) or (isinstance(dataset, _With) and dataset.more is _number)
    return _With(dataset, _other_prompt) if without else dataset


def prompt_of(example: Mapping[str, Any]) -> list[int]:
    """The tokens of an example's prompt: those of its own field, or all before the first that is learned."""
    ids: list[int] = example.get(PROMPT, example.get("input_ids", []))
    if PROMPT in example:
        return ids
    labels = example.get("labels", ())
    return ids[: next((i for i, label in enumerate(labels) if label != -100), len(ids))]


def with_example_ids(dataset: Any) -> Any:
    """The dataset, each example with its index under `example_id`, by which its noise is drawn.

    Takes a `datasets` dataset, streaming ones too, any map-style dataset, a dict of them, or none.
    """
    if dataset is None or isinstance(dataset, (str, _With)):
        return dataset
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(lambda row, index: {EXAMPLE_ID: index}, with_indices=True)
    if isinstance(dataset, datasets.Dataset):
        return dataset if EXAMPLE_ID in dataset.column_names else dataset.add_column(EXAMPLE_ID, range(len(dataset)))
    if isinstance(dataset, dict):
        return {name: with_example_ids(part) for name, part in dataset.items()}
    return _With(dataset, _number)


def digest_of(rows: datasets.Dataset) -> str:
    """A digest of the token ids and labels of all rows, in order."""
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for name in ("input_ids", "labels", *({PROMPT} & set(table.column_names))):
            column = table[name].combine_chunks()
            for numbers in (column.value_lengths(), column.flatten()):
                digest.update(numbers.to_numpy().astype("int64").tobytes())
    return digest.hexdigest()


def lengths_of(dataset: Any) -> list[int]:
    """Tokens of every example of a map-style dataset."""
    while isinstance(dataset, _With):
        dataset = dataset.dataset
    rows = dataset["input_ids"] if isinstance(dataset, datasets.Dataset) else (row["input_ids"] for row in dataset)
    return [len(row) for row in rows]
