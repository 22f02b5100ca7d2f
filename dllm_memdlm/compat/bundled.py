"""The part of dllm that this package stands on, for when dllm is not installed: same names, same signatures.

Import these names from `dllm_memdlm.compat.dllm_api`, which gives dllm's own where dllm is there. Written from the
behaviour of dllm 0.1.0 (commit ca176752); the contract tests compare the two.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor

from ..versions import TrainingArguments

Time = TypeVar("Time", float, Tensor)


@dataclass
class BaseAlphaScheduler(abc.ABC):
    """A noise schedule: α(t) is the probability that a token is still clean at time t in [0, 1]."""

    def __call__(self, t: Time) -> Time:
        return self.alpha(t)

    def alpha(self, t: Time) -> Time:
        """α(t). Raises ValueError outside [0, 1]."""
        return self._value(self._alpha, t)

    def alpha_derivative(self, t: Time) -> Time:
        """α'(t). Raises ValueError outside [0, 1]."""
        return self._value(self._alpha_derivative, t)

    def weight(self, t: Time) -> Time:
        """w(t) = -α'(t) / (1 - α(t)), the weight of a masked token in the diffusion loss."""
        return -self.alpha_derivative(t) / (1 - self.alpha(t) + 1e-6)

    def reverse_mask_prob(self, s: float | Tensor, t: float | Tensor) -> float | Tensor:
        """Probability that a token masked at time t is masked at the earlier s too. Raises ValueError unless s < t."""
        early, late = (torch.as_tensor(value, dtype=torch.float32) for value in (s, t))
        if not torch.all(early < late):
            raise ValueError(f"s={s}, t={t}: expected s < t")
        result = (1 - self(early)) / (1 - self(late))
        return result.item() if isinstance(s, float) and isinstance(t, float) else result

    def _value(self, function: Any, t: Time) -> Time:
        value = torch.as_tensor(t, dtype=torch.float32)
        if not torch.all((value >= 0) & (value <= 1)):
            raise ValueError(f"t={t}: expected a time in [0, 1]")
        result = function(value)
        return result.item() if isinstance(t, float) else result

    @abc.abstractmethod
    def _alpha(self, t: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _alpha_derivative(self, t: Tensor) -> Tensor: ...


@dataclass
class LinearAlphaScheduler(BaseAlphaScheduler):
    """α(t) = 1 - t, so w(t) = 1/t."""

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)


@dataclass
class CosineAlphaScheduler(BaseAlphaScheduler):
    """α(t) = 1 - cos(π/2 · (1 - t))."""

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - torch.cos(math.pi / 2 * (1 - t))

    def _alpha_derivative(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))


@dataclass
class CollatorWrapper:
    """A collator around a collator: `before` sees the features, `after` the batch. Wrappers nest."""

    collator: Any

    def before(self, features: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return features

    def after(self, outputs: dict[str, Any]) -> dict[str, Any]:
        return outputs

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        return self.after(self.collator(self.before(features), return_tensors=return_tensors))

    def __getattr__(self, name: str) -> Any:
        # Reached only when normal look-up fails. Dunder names stay out: pickle and copy ask for them on an object
        # that has no `collator` yet.
        if not name.startswith("__") and "collator" in self.__dict__:
            return getattr(self.collator, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@dataclass
class NoAttentionMaskWrapper(CollatorWrapper):
    """Drops the attention mask, so that padding, which is end-of-sequence, is visible to the model."""

    def after(self, outputs: dict[str, Any]) -> dict[str, Any]:
        outputs.pop("attention_mask", None)
        return outputs


def prepend_bos(batch: dict[str, Any], bos_token_id: int, label_pad_token_id: int = -100) -> dict[str, Any]:
    """Put a begin-of-sequence token before every sequence; it is visible and not in the loss. Changes `batch`."""
    first = {"input_ids": bos_token_id, "labels": label_pad_token_id, "attention_mask": 1}
    for name, value in first.items():
        if batch.get(name) is not None:
            column = torch.full_like(batch[name][:, :1], value)
            batch[name] = torch.cat([column, batch[name]], dim=1)
    return batch


@dataclass
class MDLMConfig(TrainingArguments):
    """Training arguments of plain masked diffusion, with dllm's defaults."""

    output_dir: str | None = None
    report_to: str = "wandb"
    seed: int = 42
    num_train_epochs: float = 10
    learning_rate: float = 2e-5
    lr_scheduler_type: str = "cosine"
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    warmup_ratio: float = 0.1
    bf16: bool = True
    logging_steps: float = 10
    eval_on_start: bool = False
    eval_strategy: str = "steps"
    eval_steps: float = 0.1
    save_steps: float = 0.1
    save_only_model: bool = True
    time_epsilon: float = 1e-3
    loss_weight_type: str = "scheduler"
    loss_norm_type: str = "token"
    right_shift_logits: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.run_name: str | None = self.run_name or self.output_dir


class TokenMeter(transformers.TrainerCallback):
    """Mean negative log-likelihood and perplexity over tokens since the last evaluation, logged when one ends."""

    def __init__(self, trainer: transformers.Trainer) -> None:
        self.trainer = trainer
        self.sums: dict[str, Tensor] = {}

    def update(self, split: str, value: Tensor, weight: Tensor) -> None:
        """Add tokens: value is broadcast to weight; their weighted mean is reported. split is train or eval."""
        total = torch.stack([(value * weight).sum(), weight.sum()]).detach().double()
        self.sums[split] = self.sums.get(split, torch.zeros_like(total)) + total

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = {}
        for split in ("train", "eval"):
            total = self.sums.pop(split, torch.zeros(2, dtype=torch.float64, device=args.device))
            value, weight = self.trainer.accelerator.reduce(total, "sum").tolist()
            if weight > 0:
                prefix = "" if split == "train" else f"{split}_"
                logs |= {f"{prefix}nll": value / weight, f"{prefix}ppl": math.exp(min(value / weight, 700))}
        self.trainer.log(logs)


class MDLMTrainer(transformers.Trainer):
    """Holds the settings of plain masked diffusion. `MemDLMTrainer` computes the loss, with memory off too."""

    def __init__(self, args: MDLMConfig, scheduler: BaseAlphaScheduler | None = None, *pargs: Any, **kwargs: Any):
        super().__init__(*pargs, args=args, **kwargs)
        self.scheduler = scheduler if scheduler is not None else LinearAlphaScheduler()
        self.time_epsilon = args.time_epsilon
        self.loss_weight_type = args.loss_weight_type
        self.loss_norm_type = args.loss_norm_type
        self.right_shift_logits = args.right_shift_logits
        self.meter = TokenMeter(self)
        self.add_callback(self.meter)


@dataclass
class BaseSamplerOutput:
    """A finished canvas [B, T], and the canvas after every step if that was asked for."""

    sequences: Tensor
    histories: list[Tensor] | None = None


@dataclass
class BaseSamplerConfig:
    """Settings that every sampler has."""

    return_dict: bool = False


@dataclass
class BaseSampler(abc.ABC):
    """A model, its tokenizer and a noise schedule: what decodes prompts."""

    model: Any
    tokenizer: Any
    scheduler: BaseAlphaScheduler | None = None

    def __post_init__(self) -> None:
        if self.scheduler is None:
            self.scheduler = LinearAlphaScheduler()

    @abc.abstractmethod
    def sample(self, prompts: list, config: BaseSamplerConfig | None = None, **kwargs: Any) -> BaseSamplerOutput: ...

    @abc.abstractmethod
    def infill(self, inputs: list, config: BaseSamplerConfig | None = None, **kwargs: Any) -> BaseSamplerOutput: ...
