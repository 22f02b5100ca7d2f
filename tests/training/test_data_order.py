"""The order of the examples and the noise they see: functions of (seed, epoch) and the example alone."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from conftest import examples, make_trainer, tiny
from steps import OFF, memory_for

from dllm_memdlm.training.epoch_order import EpochSampler
from dllm_memdlm.training.example_ids import lengths_of, with_example_ids

LENGTHS = [int(n) for n in torch.randint(5, 500, (256,), generator=torch.Generator().manual_seed(0))]


def order(epoch: int = 0, seed: int = 42, lengths: list[int] | None = None) -> list[int]:
    return list(EpochSampler(256, seed, lambda: epoch, lengths, batch_size=8))


def spread(indices: list[int]) -> float:
    """The mean difference between the longest and the shortest example of a batch of 8."""
    batches = [[LENGTHS[i] for i in indices[start : start + 8]] for start in range(0, 256, 8)]
    return sum(max(batch) - min(batch) for batch in batches) / len(batches)


def test_every_epoch_and_seed_has_an_order_of_its_own_and_keeps_it():
    for lengths in (None, LENGTHS):
        first = order(lengths=lengths)
        assert sorted(first) == list(range(256))
        torch.manual_seed(7)  # the global generator has no say
        assert order(lengths=lengths) == first
        assert order(epoch=1, lengths=lengths) != first != order(seed=1, lengths=lengths)
    epoch = 0
    sampler = EpochSampler(256, 42, lambda: epoch)
    first, epoch = list(sampler), 3  # which is asked for when it begins
    assert list(sampler) == order(epoch=3) != first


def test_similar_lengths_come_together(tokenizer, tmp_path):
    """In an evaluation the longest come first."""
    assert spread(order(lengths=LENGTHS)) < 0.35 * spread(order())
    rows = examples(9, shortest=10, longest=40)
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, OFF, rows, rows, group_by_length=True)
    widths = [batch["input_ids"].shape[1] for batch in trainer.get_eval_dataloader()]
    assert widths == sorted((len(row["labels"]) for row in rows), reverse=True)[::3]


def batches_of(trainer: Any) -> list[dict[str, Any]]:
    """What a run of it takes its steps on."""
    seen: list[dict[str, Any]] = []
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *args: seen.append(dict(inputs)) or step(model, inputs, *args)
    trainer.train()
    return seen


def test_mdlm_and_memdlm_see_the_same_masks(tokenizer, tmp_path):
    def run(memory: Any, **settings: Any) -> list[dict[str, Any]]:  # into a third epoch
        return batches_of(make_trainer(tiny("llama", lora=0.5), tokenizer, tmp_path, memory, max_steps=5, **settings))

    mdlm = run(OFF)
    assert not torch.equal(mdlm[0]["input_ids"], mdlm[2]["input_ids"]), "each epoch in an order of its own"
    for memory in (memory_for("llama"), memory_for("llama", dropout=0.5)):
        for one, other in zip(mdlm, run(memory), strict=True):
            assert all(torch.equal(one[name], other[name]) for name in ("input_ids", "anchor_mask", "noise_keys"))
            assert other["inner_masks"].shape[1] == 3
    assert not torch.equal(mdlm[0]["noise_level"], run(OFF, data_seed=7)[0]["noise_level"])


@pytest.mark.parametrize("form", ["list", "datasets", "streaming"])
def test_any_dataset_gets_example_ids(form, tokenizer, tmp_path):
    """By which noise is drawn, other noise in every epoch."""
    rows = examples(3)
    data: Any = rows if form == "list" else datasets.Dataset.from_list(rows)
    assert form == "streaming" or lengths_of(data) == [len(row["input_ids"]) for row in rows]
    data = data.to_iterable_dataset() if form == "streaming" else data
    numbered = with_example_ids(data)
    for again in (numbered, *([] if form == "streaming" else [with_example_ids(numbered)])):
        assert [row["example_id"] for row in again] == list(range(3))
        assert [row["input_ids"] for row in again] == [row["input_ids"] for row in rows]
    batches = batches_of(make_trainer(tiny("llama"), tokenizer, tmp_path, OFF, data, max_steps=3))
    assert len({tuple(sorted(batch["noise_level"].tolist())) for batch in batches}) == 3
