"""Responses cut off at random, as dllm's collator for Dream does, so that a model learns no usual length of answers."""

from __future__ import annotations

from typing import Any

Features = list[dict[str, Any]]

#: Fields of an example that are cut, where it has them.
CUT = ("input_ids", "labels", "attention_mask")


def cut_to_one_of_them(features: Features, u: float) -> Features:
    """Cut responses to at most the length of one of the batch; u in [0, 1) says of which."""
    prompts, lengths = _lengths(features)
    kept = lengths[int(u * len(lengths))] - prompts[int(u * len(lengths))]
    return [_cut(feature, prompt + kept) for feature, prompt in zip(features, prompts, strict=True)]


def cut_the_end(features: Features, u: float) -> Features:
    """Cut the padded batch by fewer tokens than its shortest response has, at least one; u in [0, 1) says by how many.

    It is the examples that are cut here: padded to the longest of them, they are what is left of the batch.
    """
    prompts, lengths = _lengths(features)
    shortest = min(length - prompt for prompt, length in zip(prompts, lengths, strict=True))
    if shortest <= 1:
        return features
    return [_cut(feature, max(lengths) - 1 - int(u * (shortest - 1))) for feature in features]


def _lengths(features: Features) -> tuple[list[int], list[int]]:
    """Return the tokens of each prompt, which are those before the first label, and of each example."""
    labels = [list(map(int, feature["labels"])) for feature in features]
    prompts = [next((i for i, label in enumerate(row) if label != -100), len(row)) for row in labels]
    return prompts, [len(row) for row in labels]


def _cut(feature: dict[str, Any], length: int) -> dict[str, Any]:
    return {name: value[:length] if name in CUT else value for name, value in feature.items()}
