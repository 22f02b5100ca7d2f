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


class _Numbered(Dataset[dict[str, Any]]):
    """A map-style dataset whose examples carry their index; with `others` each has the next one's prompt, too."""

    def __init__(self, dataset: Any, others: bool) -> None:
        self.dataset, self.others = dataset, others

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = {EXAMPLE_ID: index, **self.dataset[index]}
        if self.others:
            example[OTHER_PROMPT] = prompt_of(self.dataset[(index + 1) % len(self)])
        return example


def with_example_ids(dataset: Any, other_prompts: bool = False) -> Any:
    """Return the dataset, each example with its index under `example_id`, by which its noise is drawn.

    Takes a `datasets` dataset, streaming ones too, any map-style dataset, a dict of them, or none. With `other_prompts`
    each example of a map-style one has the prompt of the next one, too.
    """
    if dataset is None or isinstance(dataset, str):
        return dataset
    if isinstance(dataset, dict):
        return {name: with_example_ids(part, other_prompts) for name, part in dataset.items()}
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(lambda row, index: {EXAMPLE_ID: index}, with_indices=True)
    if isinstance(dataset, _Numbered):
        return dataset if dataset.others or not other_prompts else _Numbered(dataset.dataset, others=True)
    if isinstance(dataset, datasets.Dataset) and not other_prompts:
        return dataset if EXAMPLE_ID in dataset.column_names else dataset.add_column(EXAMPLE_ID, range(len(dataset)))
    return _Numbered(dataset, other_prompts)


def prompt_of(example: Mapping[str, Any]) -> list[int]:
    """The tokens of an example's prompt: those of its own field, or all before the first that is learned."""
    ids: list[int] = example.get(PROMPT, example.get("input_ids", []))
    if PROMPT in example:
        return ids
    labels = example.get("labels", ())
    return ids[: next((i for i, label in enumerate(labels) if label != -100), len(ids))]


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
    dataset = dataset.dataset if isinstance(dataset, _Numbered) else dataset
    rows = dataset["input_ids"] if isinstance(dataset, datasets.Dataset) else (row["input_ids"] for row in dataset)
    return [len(row) for row in rows]
