"""LLaDA2.1's block diffusion of a model that chooses the mask token: it comes to an end all the same."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import MASK, VOCABULARY, tiny
from naive_samplers import prompts
from torch import Tensor, nn

from dllm_memdlm.inference.samplers import LLaDA21Sampler

#: Far more steps than the prompts below take to come to an end.
LIMIT = 600


def with_table(predictions: dict[int, tuple[int, float]]) -> nn.Module:
    """A model that looks at a position's own token alone: token → (what it predicts, with which probability)."""
    model = tiny("llama").eval()
    table = torch.zeros(VOCABULARY, VOCABULARY)
    for token in range(VOCABULARY):
        choice, probability = predictions.get(token, (token, 0.99))
        table[token, choice] = torch.tensor(probability / (1 - probability) * (VOCABULARY - 1)).log()

    def forward(input_ids: Tensor, positions: Tensor | None = None, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=table[input_ids if positions is None else input_ids.gather(1, positions)])

    model.forward = forward
    return model


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    "predictions",
    [
        {MASK: (MASK, 0.99)},
        {MASK: (MASK, 0.3)},
        {MASK: (5, 0.5), 5: (MASK, 0.99)},
        {MASK: (5, 0.99), 5: (MASK, 0.99)},
        {MASK: (5, 0.99), 5: (6, 0.99), 6: (MASK, 0.99)},
        {MASK: (5, 0.5), 5: (6, 0.99), 6: (5, 0.99)},
        {MASK: (MASK, 0.99)} | {token: (MASK, 0.99) for token in range(3, VOCABULARY)},
    ],
)
@pytest.mark.parametrize("changes", [{}, {"max_post_steps": 0}, {"temperature": 0.5}, {"num_to_transfer": 3}])
def test_a_model_that_chooses_the_mask_comes_to_an_end(predictions, changes, cached, tokenizer):
    sampler = LLaDA21Sampler(with_table(predictions), tokenizer)
    steps = sampler.steps(prompts(5, 2), seeds=[1, 2], max_new_tokens=13, block_size=4, use_cache=cached, **changes)
    finished = [canvas.clone() for canvas in itertools.islice(steps, LIMIT)]
    assert len(finished) < LIMIT, "no end"
    assert not (finished[-1] == MASK).any()
