"""Responses cut off at random, against a plain reference and against dllm's collator for Dream."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EOS, examples, make_trainer, seq2seq, tiny, train_batch
from data_files import message_of
from small_run import write_recipe
from steps import OFF, memory_for

from dllm_memdlm.config import DataConfig
from dllm_memdlm.training import run
from dllm_memdlm.training.collator import AnchorTrajectoryCollator
from dllm_memdlm.training.recipe import load_recipe

ROWS = [{**row, "example_id": number} for number, row in enumerate(examples(40, longest=30))]


def batches(collator: AnchorTrajectoryCollator, size: int = 4) -> list[dict[str, Any]]:
    return [collator(copy.deepcopy(ROWS[i : i + size])) for i in range(0, len(ROWS), size)]


def prompt_of(row: dict[str, Any]) -> int:
    return row["labels"].count(-100)


@pytest.mark.parametrize("config", [OFF, memory_for("llama")])
def test_responses_are_cut_to_one_of_their_batch(config, tokenizer):
    plain = AnchorTrajectoryCollator(seq2seq(tokenizer), config, padding_loss=False)
    cut = AnchorTrajectoryCollator(seq2seq(tokenizer), config, padding_loss=False, perbatch_cutoff=True)
    kinds = set()
    for start, batch in zip(range(0, len(ROWS), 4), batches(cut), strict=True):
        rows = ROWS[start : start + 4]
        lengths = [len(row["input_ids"]) - prompt_of(row) for row in rows]
        kept = batch["maskable"].sum(-1).tolist()
        limit = max(kept)
        assert limit in lengths and kept == [min(length, limit) for length in lengths]
        for row, tokens, count in zip(rows, batch["input_ids"].tolist(), kept, strict=True):
            assert tokens[: prompt_of(row) + count] == row["input_ids"][: prompt_of(row) + count]
            assert set(tokens[prompt_of(row) + count :]) <= {EOS}
        kinds.add(lengths.index(limit))
    assert len(kinds) > 2, "another one each time"
    again = batches(cut)
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(batches(cut), again, strict=True))
    cut.set_epoch(1)
    assert [b["input_ids"].shape for b in batches(cut)] != [b["input_ids"].shape for b in again]
    evaluated = batches(cut.for_evaluation()), batches(plain.for_evaluation())
    assert all(torch.equal(one["anchor_mask"], two["anchor_mask"]) for one, two in zip(*evaluated, strict=True))


def test_some_batches_are_cut_at_their_end(tokenizer):
    """By fewer tokens than the shortest response has; none, some or all of them as the ratio says."""
    plain = batches(AnchorTrajectoryCollator(seq2seq(tokenizer), OFF))
    for ratio, expected in ((0.0, 0), (1.0, 10), (0.5, 5)):
        cut = batches(AnchorTrajectoryCollator(seq2seq(tokenizer), OFF, resp_cutoff_ratio=ratio))
        amounts = []
        for start, one, whole in zip(range(0, len(ROWS), 4), cut, plain, strict=True):
            length = one["input_ids"].shape[1]
            for name in ("input_ids", "labels", "attention_mask", "maskable"):
                assert torch.equal(one[name], whole[name][:, :length])
            shortest = min(len(row["input_ids"]) - prompt_of(row) for row in ROWS[start : start + 4])
            amounts.append(whole["input_ids"].shape[1] - length)
            assert amounts[-1] < shortest
        assert abs(sum(amount > 0 for amount in amounts) - expected) <= (2 if ratio == 0.5 else 0)
    short = [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "example_id": 0}]
    assert AnchorTrajectoryCollator(seq2seq(tokenizer), OFF, resp_cutoff_ratio=1.0)(short)["input_ids"].shape == (1, 3)


def test_a_recipe_asks_for_it_and_the_memory_sees_what_is_left(tokenizer, tmp_path):
    assert (DataConfig(dataset="x").perbatch_cutoff, DataConfig(dataset="x").resp_cutoff_ratio) == (False, 0.0)
    recipe = load_recipe(write_recipe(tmp_path), ["data.perbatch_cutoff=true", f"training.output_dir={tmp_path}"])
    assert run.build_trainer(recipe).data_collator.perbatch_cutoff is True
    assert message_of(lambda: DataConfig(dataset="x", perbatch_cutoff=True, resp_cutoff_ratio=0.5)) == (
        "data.resp_cutoff_ratio=0.5: expected 0 with data.perbatch_cutoff"
    )
    trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, memory_for("llama"))
    trainer.data_collator.perbatch_cutoff = True
    batch = train_batch(trainer)
    assert batch["inner_masks"].shape[-1] == batch["input_ids"].shape[1]
    assert torch.isfinite(trainer.compute_loss(trainer.model, batch))


@pytest.mark.dllm
@pytest.mark.parametrize("settings", [{"perbatch_cutoff": True}, {"resp_cutoff_ratio": 1.0}])
def test_the_same_cuts_as_dllms(settings, tokenizer, monkeypatch):
    """Where its draws are made ours: which response it takes, or by how many tokens."""
    from dllm.pipelines.dream.utils import DreamSFTCollator

    theirs = DreamSFTCollator(tokenizer, label_pad_token_id=EOS, **{"perbatch_cutoff": False, **settings})
    ways = (AnchorTrajectoryCollator(seq2seq(tokenizer), OFF, padding_loss=loss, **settings) for loss in (True, False))
    for number, (ours, hidden) in enumerate(zip(*map(batches, ways), strict=True)):
        rows = [{**row, "prompt_len": prompt_of(row)} for row in copy.deepcopy(ROWS[4 * number : 4 * number + 4])]
        longest = int(hidden["maskable"].sum(-1).max())  # of the responses that are left
        cut = max(len(row["input_ids"]) for row in rows) - ours["input_ids"].shape[1]
        monkeypatch.setattr(np.random, "choice", lambda lengths, longest=longest: longest)
        monkeypatch.setattr(np.random, "randint", lambda low, high, cut=cut: cut)
        expected = theirs(rows)
        for name in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(ours[name], expected[name]), name
