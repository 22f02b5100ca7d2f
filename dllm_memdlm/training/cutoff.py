"""Responses cut off at random, as dllm's collator for Dream does, so that a model learns no usual length of answers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..method import noise

#: Fields of an example that are cut, where it has them.
CUT = ("input_ids", "labels", "attention_mask")


def cut_off(features: list[dict[str, Any]], keys: Tensor, perbatch: bool, ratio: float) -> list[dict[str, Any]]:
    """Cut the responses of a batch; keys [1] are those of its draws.

    With `perbatch` each response is cut to at most the length of one of them. Else, with probability `ratio`, the end
    of the padded batch is cut: at least one token, and fewer than its shortest response has.
    """
    chance, u = noise.uniform(keys, noise.CUTOFF, 2)[0].tolist()
    if not perbatch and chance >= ratio:
        return features
    labels = [list(map(int, feature["labels"])) for feature in features]
    # A prompt is what is before the first label.
    prompts = [next((i for i, label in enumerate(row) if label != -100), len(row)) for row in labels]
    responses = [len(row) - prompt for row, prompt in zip(labels, prompts, strict=True)]
    if perbatch:
        ends = [prompt + responses[int(u * len(responses))] for prompt in prompts]
    elif (most := min(responses) - 1) > 0:
        ends = [max(map(len, labels)) - 1 - int(u * most)] * len(labels)
    else:
        return features
    return [
        {name: value[:end] if name in CUT else value for name, value in feature.items()}
        for feature, end in zip(features, ends, strict=True)
    ]
