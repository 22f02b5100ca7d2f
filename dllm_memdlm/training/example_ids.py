"""Examples and their place in the dataset, by which their noise is drawn, their prompts, and their lengths."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import datasets
from torch.utils.data import Dataset

#: The field of an example that holds its index in the dataset.
EXAMPLE_ID = "example_id"
#: The field of its whole prompt, where `input_ids` hold the end of it alone; and in an evaluation of another one's.
PROMPT, OTHER_PROMPT = "prompt_ids", "other_prompt_ids"


class _Numbered(Dataset):
    """A map-style dataset whose items carry their index."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], EXAMPLE_ID: index}


class _WithOthers(Dataset):
    """A map-style dataset whose items carry the prompt of the next one."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], OTHER_PROMPT: prompt_of(self.dataset[(index + 1) % len(self)])}


def with_other_prompts(dataset: Any) -> Any:
    """The dataset of `with_example_ids`, each example with the prompt of another; a streaming one stays as it is."""
    if isinstance(dataset, dict):
        return {name: with_other_prompts(part) for name, part in dataset.items()}
    return _WithOthers(dataset) if isinstance(dataset, (datasets.Dataset, _Numbered)) else dataset


def prompt_of(example: Mapping[str, Any]) -> list[int]:
    """The tokens of an example's prompt: those of its own field, or all before the first that is learned."""
    if PROMPT in example:
        return example[PROMPT]
    ids, labels = example.get("input_ids", ()), example.get("labels", ())
    return ids[: next((i for i, label in enumerate(labels) if label != -100), len(ids))]


def with_example_ids(dataset: Any) -> Any:
    """The dataset, each example with its index under `example_id`, by which its noise is drawn.

    Takes a `datasets` dataset, streaming ones too, any map-style dataset, a dict of them, or none.
    """
    if dataset is None or isinstance(dataset, (str, _Numbered, _WithOthers)):
        return dataset
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(lambda row, index: {EXAMPLE_ID: index}, with_indices=True)
    if isinstance(dataset, datasets.Dataset):
        return dataset if EXAMPLE_ID in dataset.column_names else dataset.add_column(EXAMPLE_ID, range(len(dataset)))
    if isinstance(dataset, dict):
        return {name: with_example_ids(part) for name, part in dataset.items()}
    return _Numbered(dataset)


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
    if isinstance(dataset, _WithOthers):
        dataset = dataset.dataset
    rows = dataset["input_ids"] if isinstance(dataset, datasets.Dataset) else (row["input_ids"] for row in dataset)
    return [len(row) for row in rows]
