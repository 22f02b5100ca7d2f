"""MemDLMTrainer: masked diffusion training on top of the fast weights that each sample writes for itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import datasets
import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Sampler
from transformers.trainer_utils import TrainOutput, has_length

from ..backbones import adopt, staged_backbone
from ..compat.dllm_api import MDLMTrainer
from ..config import ConfigError, MemoryConfig, require
from ..method import global_batch, noise
from ..method.bilevel import BilevelStep
from ..method.inner_loop import ParametricMemory, Written
from ..method.prompt_memory import at_inference
from ..method.trajectory import Trajectory
from . import engines
from .arguments import MemDLMConfig
from .checkpoints import WholeCheckpoints
from .collator import AnchorTrajectoryCollator
from .epoch_order import EpochSampler
from .evaluating import Evaluation, check_best_metric
from .example_ids import lengths_of, with_example_ids
from .logs import Averages, EpochClock


class MemDLMTrainer(WholeCheckpoints, Evaluation, MDLMTrainer):
    """Trains a masked diffusion language model, with memory (bi-level, first order) or without (plain MDLM).

    Both see the same noise for the same seed. Beside dllm's logs there are, with memory on: `loss_memory_off` (the
    train loss of one micro-batch with the fast weights discarded), `inner_loss_k` and `inner_grad_norm_k` of each
    inner step, `fast_weights_norm` (the size of φ; of that micro-batch, too), and `nonfinite_samples`, the samples that
    fell back to no fast weights since the last log; with
    `memory.prompt_loss` `prompt_nll`; and in an evaluation the losses of `Evaluation`.

    Args:
        model: a backbone of `dllm_memdlm.backbones`, or a LLaDA-MoE, LLaDA2.1, Dream or A2D model of dllm's, which gets
            our forward (`backbones.adopt`); or PEFT's wrapper around one.
        args: training arguments.
        memory: settings of the inner loop; the paper's by default.
        data_collator: any collator that pads `input_ids` and `labels`; it is wrapped in AnchorTrajectoryCollator
            unless it is one.
        kwargs: as for dllm's MDLMTrainer. `processing_class`, the tokenizer, needs a mask token.
    """

    def __init__(
        self,
        model: nn.Module,
        args: MemDLMConfig,
        memory: MemoryConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        memory = memory or MemoryConfig()
        if memory.enabled and args.fp16:
            raise ConfigError("training.fp16=True: expected bf16 with memory.enabled; inner gradients would underflow")
        adopt(model)
        optimizer = (kwargs.get("optimizers") or (None, None))[0]
        if optimizer is not None:
            own = set(model.parameters())
            if any(parameter not in own for group in optimizer.param_groups for parameter in group["params"]):
                raise ConfigError(
                    "optimizers: an optimizer of other parameters than the model's; of a model of dllm's with experts "
                    "make it after `backbones.adopt(model)`"
                )
        backbone = staged_backbone(model)  # a model that cannot be trained is refused before anything is built
        shifted = args.right_shift_logits is not False or not backbone.right_shift_logits
        accepted = f"true or none with {type(backbone).__name__}, whose logits are those of the next position"
        require("training", args, "right_shift_logits", shifted, accepted)
        super().__init__(
            model=model,
            args=args,
            train_dataset=with_example_ids(train_dataset),
            eval_dataset=with_example_ids(eval_dataset, other_prompts=True),
            data_collator=data_collator,
            **kwargs,
        )
        self.right_shift_logits = bool(args.right_shift_logits or backbone.right_shift_logits)
        tokenizer = self.processing_class
        if tokenizer is None or tokenizer.mask_token_id is None:
            raise ConfigError(
                "tokenizer without a mask token; add one: tokenizer.add_special_tokens({'mask_token': …})"
            )
        if self.right_shift_logits and tokenizer.bos_token_id is None:
            raise ConfigError("training.right_shift_logits=True: expected a tokenizer with a bos token")
        if isinstance(train_dataset, (IterableDataset, datasets.IterableDataset)) and args.dataloader_num_workers > 1:
            raise ConfigError(
                f"training.dataloader_num_workers={args.dataloader_num_workers}: expected 0 or 1 for streaming data, "
                "whose examples each worker would number from 0"
            )
        args.noted = {f"memory.{name}": value for name, value in dataclasses.asdict(memory).items()}
        check_best_metric(args, memory, eval_dataset, kwargs.get("compute_metrics"))
        self.mask_token_id = tokenizer.mask_token_id
        if isinstance(self.data_collator, AnchorTrajectoryCollator):
            if self.data_collator.config != memory:
                raise ConfigError("data_collator.config and memory differ; give both the same MemoryConfig")
            if self.right_shift_logits != (self.data_collator.bos_token_id is not None):
                raise ConfigError(
                    f"data_collator.bos_token_id={self.data_collator.bos_token_id}: expected the tokenizer's where the "
                    f"model's logits are of the next position, and none elsewhere (here {self.right_shift_logits})"
                )
        else:
            self.data_collator = AnchorTrajectoryCollator(
                self.data_collator,
                config=memory,
                seed=args.seed if args.data_seed is None else args.data_seed,
                scheduler=self.scheduler,
                time_epsilon=self.time_epsilon,
                bos_token_id=tokenizer.bos_token_id if self.right_shift_logits else None,
            )
        # Whether the loss is divided by the maskable tokens of a whole optimizer step, or by the accumulated batches.
        self.model_accepts_loss_kwargs = self.loss_norm_type == "token"
        self.memory_config, self.memory = memory, None
        if memory.enabled:
            settings = self.mask_token_id, self.right_shift_logits
            self.memory = ParametricMemory(self.model, memory, *settings)
            self._of_prompts = ParametricMemory(self.model, at_inference(memory), *settings)
        self._train_log = Averages()
        self._clock = EpochClock(self.data_collator, self._train_log)
        self.add_callback(self._clock)
        engines.fit(self.model, self.args)

    # === engines ===

    def create_accelerator_and_postprocess(self) -> None:
        with engines.in_force(self.args):
            super().create_accelerator_and_postprocess()
        engines.check(self.accelerator, self.args)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args)
        # With LoRA nothing goes without weight decay, and DeepSpeed takes no empty group.
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """None once `max_steps` is reached. transformers looks after a step only, so every resume would take one."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # === the step ===

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self._clock.loss_sum += loss.double()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The loss of one batch (section 3.1, `BilevelStep`); plain MDLM's with memory off."""
        # 1. The anchor passes the prefix, with gradient.
        trajectory = Trajectory.from_batch(inputs)
        step = BilevelStep(
            self.accelerator.unwrap_model(model),
            self.memory,
            trajectory,
            self.mask_token_id,
            self._windows(inputs, "window"),
            Trajectory.from_batch(inputs, "prompt_") if "prompt_input_ids" in inputs else None,
            self.memory_config.prompt_loss,
            self.loss_weight_type,
            self.loss_norm_type,
            self.right_shift_logits,
        )
        # 2. The inner loop writes fast weights.
        training, fast = self.model.training, None
        if self.memory is not None:
            written = step.write()
            if training:
                self._note(step, written)
            fast = written.fast_weights
            del written  # memory dropout leaves nothing of it
            if training and self.memory_config.dropout > 0:  # which sets of fast weights stay [S]
                drawn = noise.uniform(self.memory.keys_of(trajectory), noise.DROPOUT, 1)[:, 0]
                fast = fast.keep(drawn >= self.memory_config.dropout)
        # 3. The outer loss, with them in place. It is divided by the maskable tokens of a whole optimizer step in all
        # processes, whose gradients will be averaged.
        count = num_items_in_batch
        if count is not None and self.args.average_tokens_across_devices:
            count = count / self.accelerator.num_processes
        loss, total = step.loss(model, fast, count)
        if training and step.prompt_loss > 0:
            term, nll = step.prompt_term(count)
            loss = loss + term
            self._train_log.add("prompt_nll", nll)
        # 4. For the logs: the mean of tokens, and in an evaluation the losses of each sample.
        maskable = trajectory.maskable.sum(-1).to(total.dtype)
        if training:
            tokens = maskable.sum()
            self.meter.update(split="train", value=total.sum() / tokens.clamp_min(1), weight=tokens)
        if not return_outputs:
            return loss
        return loss, {"loss": total, "maskable": maskable, **self.losses_beside(step, inputs, total)}

    def _windows(self, inputs: dict[str, Any], use: str) -> list[Trajectory]:
        """Read the windows of a batch; as many as any process has, since engines that share weights walk in step."""
        windows: list[Trajectory] = []
        while f"{use}_{len(windows)}_input_ids" in inputs:
            windows.append(Trajectory.from_batch(inputs, f"{use}_{len(windows)}_"))
        missing = global_batch.most(len(windows), self.args.device) - len(windows) if windows else 0
        return windows + missing * [windows[-1].without_loss()] if missing else windows

    # === order ===

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not has_length(dataset):
            return None
        collator, args = self.data_collator, self.args
        return EpochSampler(
            len(dataset),
            seed=collator.seed,
            epoch=lambda: collator.epoch,
            lengths=lengths_of(dataset) if args.group_by_length else None,
            batch_size=args.train_batch_size * args.gradient_accumulation_steps,
        )

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if has_length(loader) and len(loader) == 0:
            raise ConfigError(
                f"training.dataloader_drop_last={self.args.dataloader_drop_last}: no whole batch of "
                f"{self.args.train_batch_size} for each of {self.args.world_size} processes in "
                f"{len(self.train_dataset)} examples; expected false, or a smaller per_device_train_batch_size"
            )
        return loader

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | list[int] | None:
        if not self.args.group_by_length or eval_dataset is None or not has_length(eval_dataset):
            sampler: Sampler[int] | None = super()._get_eval_sampler(eval_dataset)
            return sampler
        # The longest first: the same batches in every evaluation, with hardly any padding.
        lengths = lengths_of(eval_dataset)
        return sorted(range(len(lengths)), key=lambda i: -lengths[i])

    # === logs ===

    def _note(self, step: BilevelStep, written: Written) -> None:
        passes = len(written.steps) // (len(step.windows) if self.memory_config.source == "prompt" else 1)
        for number, inner in enumerate(written.steps):
            place = number % passes + 1  # of each window the first, …
            where = inner.finite if inner.tokens is None else inner.finite & (inner.tokens > 0)
            self._train_log.add(f"inner_loss_{place}", inner.loss, where)
            self._train_log.add(f"inner_grad_norm_{place}", inner.grad_norm, where)
        self._train_log.count("nonfinite_samples", (~written.finite).sum())
        last = self.state.global_step + 1
        if self.accelerator.sync_gradients and (last % self.state.logging_steps == 0 or last == 1):
            self._train_log.add("fast_weights_norm", written.fast_weights.norm(), written.finite)
            # One sample for each log. Its dropout draws must not move those of training.
            device = self.args.device
            draws = torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
            with draws, torch.no_grad():
                self._train_log.add("loss_memory_off", step.loss(step.model)[0])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:
            self._of_this_session(logs)
        if "loss" in logs:
            self._clock.note_seconds()
            logs = {**logs, **self._train_log.pop(self.accelerator)}
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As transformers' method. `training_loss`, too, is that of the steps that were taken."""
        # Autocast rounds what goes into a LoRA. PEFT would widen it first, to the dtype of the weights.
        with disable_input_dtype_casting(self.model, active=self.accelerator.mixed_precision != "no"):
            output = super().train(*args, **kwargs)
        return output._replace(training_loss=output.metrics.get("train_loss", 0.0))

    def _of_this_session(self, logs: dict[str, float]) -> None:
        """A run's summary, of the steps taken here: transformers 4.57 counts in those before, and those to come."""
        taken = self.state.global_step - self._clock.first_step
        for name in ("train_loss", "train_samples_per_second", "train_steps_per_second"):
            logs.pop(name, None)
        if taken == 0:
            return
        logs["train_loss"] = self.accelerator.reduce(self._clock.loss_sum, "mean").item() / taken
        if logs["train_runtime"] > 0:
            batches = self.args.gradient_accumulation_steps * self.args.world_size
            examples = self.state.train_batch_size * batches
            logs["train_steps_per_second"] = round(taken / logs["train_runtime"], 3)
            logs["train_samples_per_second"] = round(taken * examples / logs["train_runtime"], 3)
