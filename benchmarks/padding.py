"""What padding costs: examples of many lengths in batches of any, of similar ones (`group_by_length`), and alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm_memdlm import noise
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.epoch_order import EpochSampler
from dllm_memdlm.trajectory import build_trajectory

from . import models, steps
from .report import Section
from .steps import PLAIN, Step
from .timing import side_by_side
from .training import Bench, Shape, Size


def padding(size: Size) -> Section:
    """An epoch of examples, in three orders."""
    shape, count = size.base, size.padded_examples
    lengths = lengths_of(count, shape.length)
    orders = {
        "any lengths together": batches(lengths, shape.batch * 2, grouped=False),
        "group_by_length": batches(lengths, shape.batch * 2, grouped=True),
        "each example alone": [[length] for length in lengths],
    }
    section = Section(
        title=f"Padding, {shape}",
        columns=["order", "padding in a batch", "plain s", "MemDLM s", "plain tokens/s", "MemDLM tokens/s"],
        note=f"Forward and backward of {count} examples of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in "
        f"all, in batches of {shape.batch * 2}. Wall time, {torch.get_num_threads()} threads, medians of "
        f"{min(2, size.repeats)} turns. Tokens are those of the examples, without padding.",
    )
    bench = Bench(size, shape)
    cases: dict[str, Step] = {}
    for name, order in orders.items():
        for memory in (PLAIN, MemoryConfig()):
            cases[f"{name}/{memory.enabled}"] = epoch(bench, memory, order)
    bench.ours(MemoryConfig())()
    timed = side_by_side(cases, min(2, size.repeats))
    for name, order in orders.items():
        held = sum(max(batch) * len(batch) for batch in order)
        seconds = [timed[f"{name}/{enabled}"].seconds for enabled in (False, True)]
        share = f"{1 - sum(lengths) / held:.1%}"
        section.rows.append([name, share, *seconds, *(round(sum(lengths) / second) for second in seconds)])
    return section


def lengths_of(count: int, longest: int) -> list[int]:
    """Most are short, a few are not, as instructions with their answers are. From an eighth of the longest."""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(0)).mul(0.6).exp() * longest / 3
    return drawn.long().clamp(longest // 8, longest).tolist()


def batches(lengths: list[int], size: int, grouped: bool) -> list[list[int]]:
    """The lengths in batches, in the trainer's own order."""
    order = list(EpochSampler(len(lengths), 0, lambda: 0, lengths if grouped else None, size))
    return [[lengths[index] for index in order[first : first + size]] for first in range(0, len(order), size)]


def epoch(bench: Bench, memory: MemoryConfig, order: list[list[int]]) -> Step:
    trainer = steps.trainer_of(bench.model, memory)
    taken = [steps.ours(trainer, padded(bench.shape, lengths, memory)) for lengths in order]
    return lambda: sum(step() for step in taken)


def padded(shape: Shape, lengths: list[int], memory: MemoryConfig) -> dict[str, Tensor]:
    """A batch of examples of these lengths, padded on the right."""
    generator, size = torch.Generator().manual_seed(sum(lengths)), len(lengths)
    examples = [torch.randint(3, shape.vocabulary, (length,), generator=generator) for length in lengths]
    tokens = pad_sequence(examples, batch_first=True, padding_value=models.TOKENIZER.eos_token_id)
    position, length = torch.arange(tokens.shape[1]), torch.tensor(lengths)[:, None]
    own = position < length
    maskable = own & (position >= length * shape.ratio // (shape.ratio + 1))
    keys, half = noise.example_keys(42, 0, torch.arange(size)), torch.full((size,), 0.5)
    trajectory = build_trajectory(tokens, maskable, half, half, keys, memory)
    labels = tokens.masked_fill(~maskable, -100)
    return {"labels": labels, "attention_mask": own.long(), **trajectory.to_batch()}
