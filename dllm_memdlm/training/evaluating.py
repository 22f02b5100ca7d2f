"""What a trainer does on held-out examples: a loss that does not depend on how they are batched."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..config import ConfigError, MemoryConfig
from ..method.losses import NORMS
from .example_ids import with_example_ids


class Evaluation(transformers.Trainer):
    """The losses of an evaluation, with fast weights and without. To be mixed in before dllm's trainer.

    Padding is neither seen nor scored, and every example counts as the norm of the loss says, over the whole data: dllm
    and transformers take the mean of the batches' means, which another batch size changes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._evaluated: list[Tensor] = []  #: of each batch [B, 3]: the weighted NLL with φ, without, maskable tokens
        super().__init__(*args, **kwargs)

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch; what it is made of is kept for `evaluation_loop`. No logits."""
        inputs = send_to_device(inputs, self.args.device)
        with self.compute_loss_context_manager():
            loss, found = self.compute_loss(model, inputs, return_outputs=True)
        samples = torch.stack([found["total"], found["total_memory_off"], found["maskable"]], dim=-1)
        self._evaluated.append(self.gather_function(samples.detach()).cpu())
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._evaluated.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._evaluated:
            on, off, maskable = torch.cat(self._evaluated).double().unbind(-1)
            # All processes hold all samples. The meter, which adds the processes up, gives eval_nll and eval_ppl.
            tokens = maskable.sum().clamp_min(1)
            share = (tokens / self.args.world_size).float().to(self.args.device)
            self.meter.update(split="eval", value=(on.sum() / tokens).float().to(self.args.device), weight=share)
            norm = NORMS[self.loss_norm_type]
            output.metrics[f"{metric_key_prefix}_loss"] = norm(on, maskable).item()
            if self.memory is not None:
                output.metrics[f"{metric_key_prefix}_loss_memory_off"] = norm(off, maskable).item()
        return output

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        training_collator = self.data_collator
        self.data_collator = training_collator.for_evaluation()
        try:
            return super().get_eval_dataloader(with_example_ids(eval_dataset))
        finally:
            self.data_collator = training_collator


def check_best_metric(
    args: transformers.TrainingArguments, memory: MemoryConfig, eval_dataset: Any, compute_metrics: Any
) -> None:
    """Refuse a metric that no evaluation gives. Only a user's own function knows more of them."""
    if args.metric_for_best_model is None or compute_metrics is not None or isinstance(eval_dataset, dict):
        return
    known = ["loss", *(["loss_memory_off"] if memory.enabled else [])]
    if args.metric_for_best_model.removeprefix("eval_") not in known:
        raise ConfigError(
            f"training.metric_for_best_model={args.metric_for_best_model!r}: expected one of "
            f"{', '.join(f'eval_{name}' for name in known)}"
        )
