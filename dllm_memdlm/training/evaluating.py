"""What a trainer does on held-out examples: a loss that does not depend on how they are batched."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import transformers
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.trainer_utils import has_length

from ..config import ConfigError, MemoryConfig
from ..method.bilevel import BilevelStep
from ..method.losses import NORMS
from .example_ids import prompt_of, with_example_ids

#: The losses with φ of the own prompt, and of another one's.
OF_PROMPTS = ("loss_memory_prompt", "loss_memory_other")


class Evaluation(transformers.Trainer):
    """The losses of an evaluation. To be mixed in before dllm's trainer.

    With memory on these are, of the same masked responses:
    `eval_loss`: φ as in training, by default written on the response, so on the very tokens that are scored;
    `eval_loss_memory_off`: without φ;
    `eval_loss_memory_prompt`: φ written on the prompt alone, as in use;
    `eval_loss_memory_other`: φ written on the prompt of another example, the control: what of the gain is no memory.
    `eval_prompt_nll` (with memory, or `memory.prompt_loss`) says whether the model still denoises prompts, without φ.

    Padding is neither seen nor scored, and every example counts as the norm of the loss says, over the whole data: dllm
    and transformers take the mean of the batches' means, which another batch size changes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._evaluated: dict[str, list[Tensor]] = defaultdict(list)  #: of each batch [B], by the names of losses
        super().__init__(*args, **kwargs)

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch; what it is made of is kept for `evaluation_loop`. No logits."""
        inputs = send_to_device(inputs, self.args.device)
        with self.compute_loss_context_manager():
            loss, found = self.compute_loss(model, inputs, return_outputs=True)
        names = list(found)
        samples = torch.stack([found[name].to(torch.float32) for name in names], dim=-1)
        for name, values in zip(names, self.gather_function(samples.detach()).cpu().unbind(-1), strict=True):
            self._evaluated[name].append(values)
        return loss.detach(), None, None

    @torch.no_grad()
    def losses_beside(self, step: BilevelStep, inputs: dict[str, Any], total: Tensor) -> dict[str, Tensor]:
        """Return the other losses of a batch [B], weighted and summed as `total`; and the NLL of its prompts."""
        found: dict[str, Tensor] = {}
        if step.prompt is not None:
            found["prompt_nll"], found["prompt_masked"] = step.prompt_nll()
            found["prompt_tokens"] = step.prompt.maskable.sum(-1)
        if self.memory is None:
            return found
        found["loss_memory_off"] = step.loss(step.model)[1]
        for use, name in zip(("window", "other"), OF_PROMPTS, strict=True):
            if use == "window" and (self.memory_config.source, self.memory_config.scope) == ("prompt", "sample"):
                found[name] = total
            elif windows := step.windows if use == "window" else self._windows(inputs, use):
                found[name] = step.loss(step.model, self._of_prompts.write_all(windows).fast_weights)[1]
        return found

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._evaluated.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = {name: torch.cat(values).double() for name, values in self._evaluated.items()}
        if found:
            maskable = found.pop("maskable")
            # All processes hold all samples. The meter, which adds the processes up, gives eval_nll and eval_ppl.
            tokens = maskable.sum().clamp_min(1)
            share = (tokens / self.args.world_size).float().to(self.args.device)
            nll = (found["loss"].sum() / tokens).float().to(self.args.device)
            self.meter.update(split="eval", value=nll, weight=share)
            prompts = {name: found.pop(name).sum().item() for name in [*found] if name.startswith("prompt_")}
            losses = {name: NORMS[self.loss_norm_type](total, maskable).item() for name, total in found.items()}
            if prompts.get("prompt_masked"):
                losses["prompt_nll"] = prompts["prompt_nll"] / prompts["prompt_masked"]
            if not prompts.get("prompt_tokens"):  # there is no memory of them then
                losses = {name: loss for name, loss in losses.items() if name not in OF_PROMPTS}
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in losses.items()})
        return output

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        training_collator = self.data_collator
        self.data_collator: Any = training_collator.for_evaluation()
        try:
            return super().get_eval_dataloader(with_example_ids(eval_dataset, other_prompts=True))
        finally:
            self.data_collator = training_collator


def check_best_metric(
    args: transformers.TrainingArguments, memory: MemoryConfig, eval_dataset: Any, compute_metrics: Any
) -> None:
    """Refuse a metric that no evaluation gives. Only a user's own function knows more of them."""
    if args.metric_for_best_model is None or compute_metrics is not None or isinstance(eval_dataset, dict):
        return
    known, metric = ["loss"], args.metric_for_best_model.removeprefix("eval_")
    if memory.enabled:
        known += ["loss_memory_off", *OF_PROMPTS]
    if memory.enabled or memory.prompt_loss > 0:
        known.append("prompt_nll")
    of_prompts = (*OF_PROMPTS, "prompt_nll")  # which there are where an example has a prompt
    rows = range(len(eval_dataset)) if metric in of_prompts and has_length(eval_dataset) else ()
    if rows and not any(len(prompt_of(eval_dataset[index])) for index in rows):
        known = [name for name in known if name not in of_prompts]
    if metric not in known:
        raise ConfigError(
            f"training.metric_for_best_model={args.metric_for_best_model!r}: expected one of "
            f"{', '.join(f'eval_{name}' for name in known)}"
        )
