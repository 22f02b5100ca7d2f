"""AnchorTrajectoryCollator: from examples to a padded batch with its noise."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..compat.dllm_api import BaseAlphaScheduler, CollatorWrapper, LinearAlphaScheduler, prepend_bos
from ..config import ConfigError, MemoryConfig
from ..method import noise
from ..method.trajectory import build_trajectory
from ..method.windows import window_count, window_trajectory, windows_of
from .cutoff import cut_off
from .example_ids import EXAMPLE_ID, OTHER_PROMPT, PROMPT, prompt_of


@dataclass
class AnchorTrajectoryCollator(CollatorWrapper):
    """Wraps any collator that pads `input_ids` and `labels`, and adds the noise of the batch.

        >>> collator = AnchorTrajectoryCollator(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=eos), memory)
        >>> collator([{"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, 7, 8, 9, 10], "example_id": 7}])
        {"input_ids": [[5, 6, 7, 8, 9, 10]],             # x0
         "attention_mask": [[1, 1, 1, 1, 1, 1]],
         "labels": [[-100, -100, 7, 8, 9, 10]],
         "maskable": [[0, 0, 1, 1, 1, 1]],               # the response
         "noise_level": [0.2638],                        # t
         "noise_weight": [3.7912],                       # w(t)
         "anchor_mask": [[0, 0, 0, 0, 1, 1]],            # M_t
         "inner_masks": [[[0, 0, 0, 1, 1, 1],            # M_pre: one and a half times as many tokens
                          [0, 0, 0, 0, 1, 1],            # M_t
                          [0, 0, 0, 0, 0, 0]]],          # and the clean text, which follows
         "inner_ratios": [[0.75, 0.5]],                  # r of the two inner states
         "inner_weights": [[1.3333, 2.0]],               # w(r)
         "noise_keys": [-6596124625521688287],           # what all of this is a function of
         "loss_index_0": [[3, 4, 5]],                    # where the two states have their loss
         "loss_index_1": [[4, 5]],
         "loss_index_2": [[4, 5]]}                       # and the anchor

    Where prompts are written on (`memory.source: prompt`, and every evaluation with memory) the batch has a trajectory
    of each of their windows, too, with `window_0_` before its names, `window_1_`, …; and where their own loss is wanted
    one of a window of each, with `prompt_`.

    The noise of an example is a pure function of (seed, epoch, example): no worker, rank, batch or restart changes it.
    Put this wrapper outside those that change the length of the batch.

    Args:
        collator: the collator to wrap.
        config: the strategy of the inner loop; with memory off only the anchor is drawn.
        seed: noise seed.
        scheduler: noise schedule; linear by default.
        time_epsilon: smallest t.
        padding_loss: whether padding is left as the wrapped collator makes it, in dllm and in the paper's runs a token
            that is seen and learned. False hides it, and takes it out of the loss. An evaluation always does.
        bos_token_id: put before every sequence ahead of masking, as models whose logits are shifted need; none
            leaves the sequences alone.
        perbatch_cutoff: whether responses are cut to at most the length of one of the batch, drawn anew for each.
        resp_cutoff_ratio: how often a batch is cut instead, by fewer tokens than its shortest response has. These two
            are dllm's for Dream. An evaluation cuts nothing.
    """

    config: MemoryConfig = field(default_factory=MemoryConfig)
    seed: int = 42
    scheduler: BaseAlphaScheduler = field(default_factory=LinearAlphaScheduler)
    time_epsilon: float = 1e-3
    bos_token_id: int | None = None
    padding_loss: bool = True
    perbatch_cutoff: bool = False
    resp_cutoff_ratio: float = 0.0

    def __post_init__(self) -> None:
        # In shared memory, so that workers which outlive an epoch see the next one begin.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._evaluates = False

    @property
    def epoch(self) -> int:
        """The epoch whose noise is drawn."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw the noise of another epoch from now on, in every worker."""
        self._epoch.fill_(epoch)

    def for_evaluation(self) -> AnchorTrajectoryCollator:
        """A copy with noise of its own: that of no training epoch, and the same for every epoch and seed."""
        fixed = copy.copy(self)
        fixed.seed, fixed.padding_loss, fixed._evaluates = noise.EVALUATION_SEED, False, True
        fixed.perbatch_cutoff, fixed.resp_cutoff_ratio = False, 0.0
        fixed._epoch = torch.tensor(noise.EVALUATION)
        return fixed

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        if any(EXAMPLE_ID not in feature for feature in features):
            raise ConfigError(
                f"AnchorTrajectoryCollator: features without {EXAMPLE_ID!r} (fields: {', '.join(features[0])}); "
                "pass the dataset to MemDLMTrainer, or add each example's index under that name"
            )
        examples = torch.tensor([feature[EXAMPLE_ID] for feature in features], dtype=torch.int64)
        of_prompts = self._of_prompts(features, examples)
        beside = {EXAMPLE_ID, PROMPT, OTHER_PROMPT}
        features = [{k: v for k, v in feature.items() if k not in beside} for feature in features]
        if self.perbatch_cutoff or self.resp_cutoff_ratio > 0:  # a batch's draws are those of its first example
            keys = noise.example_keys(self.seed, self.epoch, examples[:1])
            features = cut_off(features, keys, self.perbatch_cutoff, self.resp_cutoff_ratio)
        batch = super().__call__(features, return_tensors)
        if batch.get("labels") is None:
            raise ConfigError(
                f"AnchorTrajectoryCollator: examples without labels (fields: {', '.join(features[0])}); expected the "
                "input_ids as labels, with -100 where nothing is learned"
            )
        if not self.padding_loss and (own := _own_tokens(batch, features)) is not None and not own.all():
            batch["labels"] = batch["labels"].masked_fill(~own, -100)
            batch["attention_mask"] = own.long()
        return self.add_noise(batch, examples) | of_prompts

    def _of_prompts(self, features: list[dict[str, Any]], examples: Tensor) -> dict[str, Tensor]:
        """Return the trajectories of the windows of prompts, and of one window of each prompt without inner states.

        Raises:
            ConfigError: training wants prompts, and there are none.
        """
        config, shift, batch = self.config, self.bos_token_id is not None, dict[str, Tensor]()
        trains = config.prompt_loss > 0 or (config.enabled and config.source == "prompt")
        writes = config.enabled and (self._evaluates or config.source == "prompt")
        if not (trains or writes):
            return batch
        prompts = [torch.as_tensor(prompt_of(feature), dtype=torch.int64) for feature in features]
        if trains and not any(map(len, prompts)):
            raise ConfigError(
                f"AnchorTrajectoryCollator: examples without a prompt (fields: {', '.join(features[0])}); expected "
                f"labels of -100 on it, or {PROMPT!r}, with memory.source: prompt and with memory.prompt_loss"
            )
        keys = noise.stream_keys(noise.example_keys(self.seed, self.epoch, examples), noise.PROMPT)
        if self._evaluates or config.prompt_loss > 0:
            windows, drawn = windows_of(prompts, config.window), noise.uniform(keys, noise.CHOICE, 1)[:, 0].tolist()
            counts = [window_count(len(prompt), config.window) for prompt in prompts]
            chosen = [windows[int(u * n)][row] for row, (u, n) in enumerate(zip(drawn, counts, strict=True))]
            anchors = replace(config, enabled=False)
            batch |= window_trajectory(chosen, keys, anchors, right_shift_logits=shift).to_batch("prompt_")
        texts = {"window": prompts} if writes else {}
        if writes and all(OTHER_PROMPT in feature for feature in features):
            texts["other"] = [torch.as_tensor(feature[OTHER_PROMPT], dtype=torch.int64) for feature in features]
        for use, rows in texts.items():
            for number, parts in enumerate(windows_of(rows, config.window)):
                batch |= window_trajectory(parts, keys, config, number, shift).to_batch(f"{use}_{number}_")
        return batch

    def add_noise(self, batch: dict[str, Any], examples: Tensor) -> dict[str, Any]:
        """Add the fields of a `Trajectory` to a padded batch. examples [B] int64, indices in the dataset."""
        labels = batch["labels"]
        if self.bos_token_id is not None and not torch.all(labels[:, 0] == -100):
            batch = prepend_bos(batch, self.bos_token_id)
            labels = batch["labels"]
        maskable = labels != -100
        keys = noise.example_keys(self.seed, self.epoch, examples)
        t = self.time_epsilon + (1 - self.time_epsilon) * noise.uniform(keys, noise.TIME, 1)[:, 0]
        chance, ids = 1 - self.scheduler(t), batch["input_ids"]
        trajectory = build_trajectory(ids, maskable, t, chance, keys, self.config, self.scheduler)
        return {**batch, **trajectory.to_batch()}


def _own_tokens(batch: dict[str, Any], features: list[dict[str, Any]]) -> Tensor | None:
    """What of a batch is no padding [B, L] bool: as its mask says, or else where the examples' tokens stand in it.

    None where neither tells: a wrapped collator made other tokens of the examples, and no mask.
    """
    mask: Tensor | None = batch.get("attention_mask")
    ids: Tensor = batch["input_ids"]
    if mask is not None and mask.shape == ids.shape and not mask.all():
        return mask.bool()
    own = torch.zeros_like(ids, dtype=torch.bool)
    for row, feature in enumerate(features):
        tokens = torch.as_tensor(feature.get("input_ids", ()))
        places = (slice(0, len(tokens)), slice(ids.shape[1] - len(tokens), None))  # padded right, or left
        place = next((place for place in places if torch.equal(ids[row, place], tokens.to(ids.dtype))), None)
        if place is None or not len(tokens):
            return None
        own[row, place] = True
    return own
