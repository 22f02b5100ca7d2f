"""What padding does: nothing to an evaluation, and to training what `padding_loss` says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import examples, make_tokenizer, make_trainer, seq2seq, tiny
from small_run import recipe_for, write_recipe
from steps import OFF, memory_for, train_logs

from dllm_memdlm.compat.dllm_api import NoAttentionMaskWrapper
from dllm_memdlm.config import ConfigError
from dllm_memdlm.training import run
from dllm_memdlm.training.collator import AnchorTrajectoryCollator

#: Examples of 5 to 30 tokens.
ROWS = examples(7, shortest=5, longest=30)
NUMBERED = [{**row, "example_id": number} for number, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("kind", "norm", "memory"),
    [
        ("llada_moe", "token", True),
        ("llada2", "sequence", True),
        ("llama", "batch", True),
        ("llama", "sequence", False),
    ],
)
def test_an_evaluation_does_not_depend_on_its_batches(kind, norm, memory, tokenizer, tmp_path):
    """Every example counts as the norm says; with batches of one nothing is padded."""
    config, found = memory_for(kind) if memory else OFF, []
    for size in (1, 3, 7):
        collator = NoAttentionMaskWrapper(seq2seq(tokenizer))  # as in a recipe
        settings = {"per_device_eval_batch_size": size, "loss_norm_type": norm, "group_by_length": size == 3}
        model = tiny(kind, torch.float64)
        found.append(make_trainer(model, tokenizer, tmp_path, config, ROWS, ROWS, collator, **settings).evaluate())
    for name in ("eval_loss", *(["eval_loss_memory_off"] if memory else [])):
        assert [metrics[name] for metrics in found[1:]] == pytest.approx([found[0][name]] * 2, rel=1e-6), name
    assert not memory or abs(found[0]["eval_loss"] - found[0]["eval_loss_memory_off"]) > 1e-4


@pytest.mark.parametrize("padding", [True, False])
def test_without_padding_a_step_does_not_depend_on_its_split(padding, tokenizer, tmp_path):
    """The loss and the norm of the gradients of one step on four examples, in batches of 4, 2 and 1."""
    found = []
    for size in (4, 2, 1):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
        model, collator = tiny("llada_moe", torch.float64), NoAttentionMaskWrapper(seq2seq(tokenizer))
        memory = memory_for("llada_moe")
        trainer = make_trainer(model, tokenizer, tmp_path, memory, ROWS[:4], collator=collator, **settings)
        trainer.data_collator.padding_loss = padding
        trainer.train()
        (log,) = train_logs(trainer)
        found.append((log["loss"], log["grad_norm"]))
    if padding:
        assert len({loss for loss, _ in found}) > 1, "as dllm's does"
    else:  # transformers logs four digits
        assert all(parts == pytest.approx(found[0], rel=1e-3) for parts in found[1:])


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_is_hidden_is_padding(side):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    batch = AnchorTrajectoryCollator(seq2seq(tokenizer), memory_for("llama"), padding_loss=False)(NUMBERED)
    for number, row in enumerate(ROWS):
        ids, labels, seen, maskable = (
            batch[name][number] for name in ("input_ids", "labels", "attention_mask", "maskable")
        )
        length = len(row["input_ids"])
        own = slice(0, length) if side == "right" else slice(len(ids) - length, None)
        assert (ids[own].tolist(), labels[own].tolist()) == (row["input_ids"], row["labels"])
        assert seen.sum() == length and seen[own].all()
        assert maskable.equal(labels != -100) and maskable.sum() == sum(label != -100 for label in row["labels"])


@pytest.mark.parametrize("kind", ["bos", "left"])
def test_what_a_wrapped_collator_changes_is_no_padding(kind):
    """As its mask says; without one, a batch whose tokens are not the examples' is left as it is."""
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left" if kind == "left" else "right"

    def changed(features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        if kind == "bos":
            features = [{"input_ids": [1, *f["input_ids"]], "labels": [-100, *f["labels"]]} for f in features]
        return seq2seq(tokenizer)(features)

    masked, unmasked = (
        AnchorTrajectoryCollator(collator, memory_for("llama"), padding_loss=False)(NUMBERED)["maskable"].sum(-1)
        for collator in (changed, NoAttentionMaskWrapper(changed))
    )
    learned = torch.tensor([sum(label != -100 for label in row["labels"]) for row in ROWS])
    lengths = torch.tensor([len(row["labels"]) for row in ROWS])
    assert masked.equal(learned)
    assert unmasked.equal(learned if kind == "left" else learned + lengths.max() - lengths)


def test_examples_without_labels_are_refused(tokenizer, tmp_path):
    def plain(rows: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        return {"input_ids": torch.tensor([row["input_ids"][:5] for row in rows])}

    rows = [{"input_ids": row["input_ids"]} for row in ROWS]
    for collator in (None, plain):
        trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, data=rows, collator=collator)
        with pytest.raises(ConfigError, match=r"examples without labels \(fields: input_ids\); expected the input_ids"):
            trainer.train()


def test_a_recipe_says_whether_padding_is_learned_and_responses_are_cut_off(tmp_path):
    rows = [{"instruction": "?" * 4, "output": "a" * (3 + 5 * (i % 4))} for i in range(20)]
    recipe_file, batches = write_recipe(tmp_path, rows=rows), []
    for settings in ([], ["data.padding_loss=false", "data.perbatch_cutoff=true"]):
        trainer = run.build_trainer(recipe_for(recipe_file, tmp_path / "run", *settings))
        collator = trainer.data_collator
        assert (collator.perbatch_cutoff, collator.resp_cutoff_ratio) == (bool(settings), 0.0)
        collator.perbatch_cutoff = False
        rows = [trainer.train_dataset[i] for i in range(4)]
        batches.append(collator(rows))
    learned, hidden = batches
    assert (learned["labels"][:, -1] != -100).all() and "attention_mask" not in learned
    assert hidden["attention_mask"].sum(-1).tolist() == [len(row["input_ids"]) for row in rows]
    assert (hidden["labels"][hidden["attention_mask"] == 0] == -100).all() and not hidden["attention_mask"].all()
