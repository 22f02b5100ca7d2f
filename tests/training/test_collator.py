"""AnchorTrajectoryCollator: exact outputs, composition with other collators, epochs, workers, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import seq2seq
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from dllm_memdlm.compat.bundled import CosineAlphaScheduler
from dllm_memdlm.compat.dllm_api import NoAttentionMaskWrapper
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.method import noise
from dllm_memdlm.method.trajectory import build_trajectory
from dllm_memdlm.training.collator import EXAMPLE_ID, AnchorTrajectoryCollator

EOS, BOS = 0, 1


@pytest.fixture
def pad(tokenizer) -> DataCollatorForSeq2Seq:
    return seq2seq(tokenizer)


def feature(example: int, prompt: int = 3, response: int = 9) -> dict:
    tokens = [4 + (example * 7 + i) % 90 for i in range(prompt + response)]
    return {"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:], EXAMPLE_ID: example}


def features(count: int) -> list[dict]:
    return [feature(i, prompt=1 + i % 4, response=4 + i % 7) for i in range(count)]


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_docstring_example(pad):
    collator = AnchorTrajectoryCollator(pad, MemoryConfig())
    batch = collator([{"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, 7, 8, 9, 10], "example_id": 7}])
    assert batch.pop("noise_level").tolist() == pytest.approx([0.2638], abs=5e-5)
    assert batch.pop("noise_weight").tolist() == pytest.approx([3.7912], abs=5e-5)
    assert batch.pop("inner_weights").tolist() == [pytest.approx([1.3333, 2.0], abs=5e-5)]
    assert batch.pop("inner_ratios").tolist() == [[0.75, 0.5]]
    assert {name: value.long().tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 10]],
        "labels": [[-100, -100, 7, 8, 9, 10]],
        "attention_mask": [[1, 1, 1, 1, 1, 1]],
        "maskable": [[0, 0, 1, 1, 1, 1]],
        "anchor_mask": [[0, 0, 0, 0, 1, 1]],
        "inner_masks": [[[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]]],
        "noise_keys": [-6596124625521688287],
        "loss_index_0": [[3, 4, 5]],
        "loss_index_1": [[4, 5]],
        "loss_index_2": [[4, 5]],
    }
    assert batch["maskable"].dtype == batch["anchor_mask"].dtype == batch["inner_masks"].dtype == torch.bool


def test_noise_is_that_of_seed_epoch_and_example(pad):
    config = MemoryConfig(steps=3)
    collator = AnchorTrajectoryCollator(pad, config, seed=7, time_epsilon=0.1)
    collator.set_epoch(2)
    batch = collator(features(6))
    keys, t, maskable = noise.example_keys(7, 2, torch.arange(6)), batch["noise_level"], batch["labels"] != -100
    assert torch.equal(batch["noise_keys"], keys)
    torch.testing.assert_close(t, 0.1 + 0.9 * noise.uniform(keys, noise.TIME, 1)[:, 0], rtol=0, atol=1e-6)
    expected = build_trajectory(batch["input_ids"], maskable, t, t, keys, config)
    assert torch.equal(batch["maskable"], maskable)
    # 1 - α(t) is t up to the last bit, which no draw of these falls into
    assert torch.equal(batch["inner_masks"], expected.inner_masks)
    assert torch.equal(batch["anchor_mask"], expected.anchor_mask)


def test_masks_follow_the_schedule(pad):
    """Under the cosine schedule a token is masked with probability cos(π/2 · (1 - t))."""
    collator = AnchorTrajectoryCollator(pad, scheduler=CosineAlphaScheduler())
    batch = {"input_ids": torch.zeros(400, 500).long(), "labels": torch.zeros(400, 500).long()}
    out = collator.add_noise(batch, torch.arange(400))
    share = out["anchor_mask"].double().mean(-1)
    expected = torch.cos(torch.pi / 2 * (1 - out["noise_level"].double()))
    assert (share - expected).abs().max() < 5 * (0.25 / 500) ** 0.5
    assert (share - out["noise_level"]).abs().max() > 0.15


def test_padding_is_end_of_sequence_labelled_and_maskable(pad):
    collator = AnchorTrajectoryCollator(NoAttentionMaskWrapper(pad))
    batch = collator([feature(0, prompt=2, response=3), feature(1, prompt=2, response=200)])
    assert (batch["input_ids"][0, 5:] == EOS).all() and (batch["labels"][0, 5:] == EOS).all()
    assert batch["maskable"][0].tolist() == [False] * 2 + [True] * 200
    share = batch["anchor_mask"][0, 5:].double().mean().item()
    assert share > 0 and share == pytest.approx(batch["noise_level"][0].item(), abs=0.12)


def test_examples_do_not_depend_on_their_batch(pad):
    collator = AnchorTrajectoryCollator(pad, MemoryConfig(steps=3))
    same_length = [feature(i) for i in range(5)]
    whole = collator(same_length)
    assert_same(collator(same_length[::-1]), {name: value.flip(0) for name, value in whole.items()})
    for i in range(5):
        alone, expected = collator([same_length[i]]), {name: value[i : i + 1] for name, value in whole.items()}
        for name in [name for name in expected if "index" in name]:
            # as many positions as the example itself has, not the longest of its batch
            expected[name] = expected[name][:, : alone[name].shape[1]]
        assert_same(alone, expected)


def test_wrapper_of_the_attention_mask_inside_and_outside(pad):
    plain = AnchorTrajectoryCollator(pad)(features(4))
    del plain["attention_mask"]
    assert_same(AnchorTrajectoryCollator(NoAttentionMaskWrapper(pad))(features(4)), plain)
    assert_same(NoAttentionMaskWrapper(AnchorTrajectoryCollator(pad))(features(4)), plain)


def test_bos_is_put_ahead_before_masking(pad):
    collator = AnchorTrajectoryCollator(pad, bos_token_id=BOS)
    given = [feature(i, prompt=0 if i == 0 else 2, response=30) for i in range(3)]
    batch, without = collator(given), AnchorTrajectoryCollator(pad)(given)
    for name, first in (("input_ids", BOS), ("labels", -100)):
        assert (batch[name][:, 0] == first).all() and torch.equal(batch[name][:, 1:], without[name])
    assert not batch["maskable"][:, 0].any() and not batch["inner_masks"][:, :, 0].any()
    # the noise belongs to the position in the sequence as it is masked, BOS included
    u = noise.uniform(batch["noise_keys"], noise.ANCHOR, batch["input_ids"].shape[1])
    assert torch.equal(batch["anchor_mask"], (u < batch["noise_level"][:, None]) & batch["maskable"])
    prompts = [feature(i, prompt=1 + i) for i in range(3)]  # none of whose first tokens is in the loss
    assert_same(collator(prompts), AnchorTrajectoryCollator(pad)(prompts))


def test_evaluation_noise_never_changes(pad):
    collator = AnchorTrajectoryCollator(pad, MemoryConfig(steps=3), seed=9)
    evaluation = collator.for_evaluation()
    fixed = evaluation(features(8))
    assert torch.equal(fixed["noise_keys"], noise.example_keys(42, noise.EVALUATION, torch.arange(8))), "of every seed"
    for epoch in range(3):
        collator.set_epoch(epoch)
        for one in (evaluation, collator.for_evaluation()):
            assert_same(one(features(8)), fixed)
        assert collator.epoch == epoch
        assert not (collator(features(8))["noise_level"] == fixed["noise_level"]).any()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # newer Pythons', of any fork
@pytest.mark.parametrize("persistent", [False, True])
def test_epochs_reach_the_workers(pad, persistent):
    collator, data = AnchorTrajectoryCollator(pad, MemoryConfig(steps=3)), features(14)
    here = DataLoader(data, batch_size=3, collate_fn=collator)
    away = DataLoader(data, batch_size=3, collate_fn=collator, num_workers=2, persistent_workers=persistent)
    levels = []
    for epoch in (0, 1, 2):
        collator.set_epoch(epoch)
        for a, b in zip(away, here, strict=True):
            assert_same(a, b)
        levels.append(torch.cat([batch["noise_level"] for batch in here]))
    assert not (levels[0] == levels[1]).any() and not (levels[1] == levels[2]).any()


def test_copies_keep_their_settings(pad):
    collator = AnchorTrajectoryCollator(pad, MemoryConfig(steps=4), seed=3)
    collator.set_epoch(5)
    given = features(4)
    expected = collator(given)
    assert given == features(4), "features are left as they were"
    for again in (pickle.loads(pickle.dumps(collator)), copy.deepcopy(collator)):
        assert_same(again(given), expected)
        again.set_epoch(6)
        assert collator.epoch == 5


def test_features_without_their_index(pad):
    nameless = {name: value for name, value in feature(1).items() if name != EXAMPLE_ID}
    with pytest.raises(ConfigError, match=r"features without 'example_id' \(fields: input_ids, labels"):
        AnchorTrajectoryCollator(pad)([feature(0), nameless])
