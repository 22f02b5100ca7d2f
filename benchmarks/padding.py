"""What padding costs: examples of many lengths in batches of any, of similar ones (`group_by_length`), and alone."""

from __future__ import annotations

import torch

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.training.epoch_order import EpochSampler

from . import steps
from .report import Section
from .steps import PLAIN, Step
from .timing import side_by_side
from .training import Bench, Size

#: Examples in the epoch whose first batches are timed.
EXAMPLES = 1000


def padding(size: Size) -> Section:
    """The beginning of an epoch of examples, in three orders."""
    shape, number = size.base, size.padded_batches
    lengths, batch = lengths_of(EXAMPLES, shape.length), shape.batch * 2
    orders = {
        "any lengths together": batches(lengths, batch, grouped=False),
        "group_by_length": batches(lengths, batch, grouped=True),
        "each example alone": [[length] for length in lengths],
    }
    section = Section(
        title=f"Padding, {shape}",
        columns=["order", "padding in a batch", "plain tokens/s", "MemDLM tokens/s", "MemDLM ÷ plain"],
        note=f"An epoch of {EXAMPLES} examples of {min(lengths)} to {max(lengths)} tokens, {sum(lengths) // EXAMPLES} "
        f"on average, in batches of {batch}; the first {number} batches are timed. Tokens are those of the examples, "
        f"without padding. Wall time, {torch.get_num_threads()} threads, medians of {min(2, size.repeats)} turns.",
    )
    bench = Bench(size, shape)
    bench.ours(MemoryConfig())()
    for name, order in orders.items():
        taken = order[: number * (batch if name == "each example alone" else 1)]
        cases = {"plain": epoch(bench, PLAIN, taken), "MemDLM": epoch(bench, MemoryConfig(), taken)}
        timed = side_by_side(cases, min(2, size.repeats))
        speeds = [round(sum(map(sum, taken)) / t.seconds) for t in timed.values()]
        section.rows.append([name, f"{share(order):.1%}", *speeds, timed["MemDLM"].ratio(timed["plain"])])
    return section


def share(order: list[list[int]]) -> float:
    """Of padding among the tokens of all batches."""
    return 1 - sum(map(sum, order)) / sum(max(batch) * len(batch) for batch in order)


def lengths_of(count: int, longest: int) -> list[int]:
    """Most are short, a few are not, as instructions with their answers are. From an eighth of the longest."""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(0)).mul(0.6).exp() * longest / 3
    return drawn.long().clamp(longest // 8, longest).tolist()


def batches(lengths: list[int], size: int, grouped: bool) -> list[list[int]]:
    """The lengths in batches, in the trainer's own order."""
    order = list(EpochSampler(len(lengths), 0, lambda: 0, lengths if grouped else None, size))
    return [[lengths[index] for index in order[first : first + size]] for first in range(0, len(order), size)]


def epoch(bench: Bench, memory: MemoryConfig, order: list[list[int]]) -> Step:
    trainer, shape = steps.trainer_of(bench.model, memory), bench.shape
    taken = [steps.ours(trainer, steps.batch_of(shape.vocabulary, own, shape.ratio, memory)) for own in order]
    return lambda: sum(step() for step in taken)
