"""`data.visible`: what a model sees of a prompt, while all of it goes along for a memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from data_files import write
from transformers import DataCollatorForSeq2Seq

from dllm_memdlm.config import ConfigError, DataConfig, MemoryConfig
from dllm_memdlm.data import load_examples, train_tokenizer
from dllm_memdlm.training.collator import AnchorTrajectoryCollator
from dllm_memdlm.training.example_ids import EXAMPLE_ID, digest_of, prompt_of


def test_a_prompt_is_cut_and_goes_along_whole(tmp_path):
    tokenizer = train_tokenizer([], 263)  # a token a byte
    rows = [{"instruction": "abcdefgh", "output": "yes"}, {"instruction": "a", "output": "no"}]
    config = write(tmp_path / "rows.json", rows)
    whole, cut = (load_examples(replace(config, visible=n, max_length=16), tokenizer).train for n in (None, 4))
    assert whole.column_names == ["input_ids", "labels"]
    for full, seen in zip(whole, cut, strict=True):
        prompt = prompt_of(full)
        assert seen["prompt_ids"] == prompt_of(seen) == prompt
        start = max(0, len(prompt) - 4)
        assert seen["input_ids"] == full["input_ids"][start:] and seen["labels"] == full["labels"][start:]
    assert [len(row["prompt_ids"]) for row in cut] == [11, 4]
    # what is seen is what may not be too long, and both are what a run is made of
    assert len(load_examples(replace(config, visible=4, max_length=8), tokenizer).train) == 2
    assert (
        len({digest_of(rows) for rows in (whole, cut, load_examples(replace(config, visible=3), tokenizer).train)}) == 3
    )
    padding = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=tokenizer.pad_token_id)
    collator = AnchorTrajectoryCollator(padding, MemoryConfig(source="prompt", window=4, prompt_loss=0.1))
    batch = collator([{**row, EXAMPLE_ID: number} for number, row in enumerate(cut)])
    assert batch["input_ids"].shape[1] == len(cut[0]["input_ids"]) and "prompt_ids" not in batch
    lengths = [batch[f"window_{n}_maskable"].sum(-1).tolist() for n in range(3)]
    assert lengths == [[3, 4], [4, 0], [4, 0]] and "window_3_maskable" not in batch
    assert batch["prompt_input_ids"].shape == batch["prompt_anchor_mask"].shape


def test_it_needs_to_know_where_prompts_end():
    with pytest.raises(ConfigError, match=r"^data\.visible=4: expected none with data\.mask_prompt=False$"):
        DataConfig(dataset="rows.json", visible=4, mask_prompt=False)
