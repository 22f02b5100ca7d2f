"""Every setting, declared once: the memory (the method), and the model, LoRA and data sections of a recipe.

Recipe files, command-line overrides, `memdlm info --keys` and lm-eval arguments are all derived from these fields.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal


class ConfigError(ValueError):
    """A setting the user can correct: the message says which, its value, and what would be accepted."""


def knob(default: Any, help: str) -> Any:
    """A dataclass field with its help text. Mutable defaults (dict, list) are copied per instance."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The inner loop (Parametric Memory). The defaults are the paper's settings.

    Raises:
        ConfigError: a value is of the wrong type, out of range, or not among the choices.
    """

    enabled: bool = knob(True, "train with fast weights; false is plain MDLM on the same masks")

    # the trajectory (section 3.2)
    strategy: Literal["anchor_consistent", "inconsistent", "pre_anchor_only", "anchor_only"] = knob(
        "anchor_consistent", "which denoising states the inner loop visits"
    )
    steps: int = knob(2, "K, inner steps along one trajectory (anchor_consistent, inconsistent)")
    epochs: int = knob(1, "passes over the trajectory")
    pre_anchor_scale: float = knob(1.5, "masked tokens of the pre-anchor state over those of the anchor, at least 1")
    targets: Literal["masked", "newly_revealed"] = knob(
        "masked", "tokens an inner step is supervised on: all masked ones, or those the next state reveals"
    )
    start_ratio: float = knob(0.8, "masked ratio that `inconsistent` starts from, in (0, 1]")
    anchor_ratio: float = knob(
        0.2, "masked ratio of a prompt's anchor at inference, and that `inconsistent` ends on, in (0, 1]"
    )

    # the inner objective and its optimizer (section 3.3)
    objective: Literal["cross_entropy", "kl", "reverse_kl", "hidden_mse", "hidden_cosine"] = knob(
        "cross_entropy", "inner loss: on the clean tokens, or towards a teacher that sees the next state"
    )
    weighting: Literal["scheduler", "uniform"] = knob(
        "scheduler", "weight of an inner token: w(r) at the state's masked ratio r, or 1 (inference)"
    )
    inner_lr: float = knob(0.1, "learning rate of the inner SGD")
    clip: Literal["local", "global", "none"] = knob(
        "local", "gradient clipping: each fast-weight tensor by its own norm, all together, or not at all"
    )
    grad_clip: float = knob(1.0, "largest L2 norm that clipping leaves; 0 turns clipping off")

    # the fast weights
    kind: Literal["lora", "full"] = knob("lora", "low-rank pairs A, B, or a full-size weight difference")
    rank: int = knob(32, "rank of the low-rank pairs")
    alpha: float = knob(64.0, "the low-rank product is scaled by alpha / rank")
    scope: Literal["sample", "batch"] = knob(
        "sample", "one set of fast weights for each sample, or one shared by the batch (as the paper's code does)"
    )
    sync: bool = knob(
        False, "share one set over all processes, for the whole global batch (scope: batch); false keeps them apart"
    )
    target_modules: tuple[str, ...] = knob(
        ("gate_proj", "up_proj", "down_proj"), "names of the linear layers that carry fast weights"
    )
    layer_fraction: float = knob(0.1, "share of the layers, counted from the last, that carry fast weights, in (0, 1]")

    # ours, not the paper's
    dropout: float = knob(
        0.0, "probability that a training example sees no fast weights in the outer pass, in [0, 1]; not in the paper"
    )

    def __post_init__(self) -> None:
        check_types(self, "memory")
        require("memory", self, "steps", self.steps >= 1, "at least 1")
        require("memory", self, "epochs", self.epochs >= 0, "at least 0 (0 trains with empty fast weights)")
        require("memory", self, "pre_anchor_scale", self.pre_anchor_scale >= 1, "at least 1")
        require("memory", self, "inner_lr", self.inner_lr >= 0, "at least 0")
        require("memory", self, "grad_clip", self.grad_clip >= 0, "at least 0")
        require("memory", self, "rank", self.rank >= 1, "at least 1")
        require("memory", self, "alpha", self.alpha > 0, "more than 0")
        require("memory", self, "target_modules", len(self.target_modules) > 0, "at least one module name")
        require("memory", self, "dropout", 0 <= self.dropout <= 1, "in [0, 1]")
        shared = not self.sync or self.scope == "batch"
        require("memory", self, "sync", shared, "false with memory.scope: sample, as each sample has a set of its own")
        falls = self.strategy != "inconsistent" or self.start_ratio >= self.anchor_ratio
        require("memory", self, "start_ratio", falls, f"at least memory.anchor_ratio, {self.anchor_ratio}")
        for name in ("start_ratio", "anchor_ratio", "layer_fraction"):
            require("memory", self, name, 0 < getattr(self, name) <= 1, "in (0, 1]")

    @property
    def scaling(self) -> float:
        """α/r, the factor of the low-rank product; 1 for full-size differences."""
        return self.alpha / self.rank if self.kind == "lora" else 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the backbone comes from: a checkpoint (`path`), or an architecture with dimensions, from scratch."""

    path: str | None = knob(None, "hub name or local folder of the weights; none trains from scratch")
    architecture: str | None = knob(
        None, "model class, e.g. LLaDA2MoeModelLM; with a path it is read from config.json and serves only --dry-run"
    )
    dimensions: dict[str, Any] = knob({}, "fields of the architecture's config, when there is no config.json")
    tokenizer: str | None = knob(None, "hub name or local folder; none takes `path`, or trains one on the data")
    tokenizer_vocab_size: int = knob(4096, "tokens of the byte-level BPE that is trained when there is no tokenizer")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto", "dtype of the weights; auto is bfloat16 under a LoRA, and float32 where all of them train"
    )
    load_in_4bit: bool = knob(False, "NF4 with double quantisation (extra `quant`)")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = knob("sdpa", "attention kernel")
    trust_remote_code: bool = knob(False, "run Python code that a checkpoint brings along; never needed here")

    def __post_init__(self) -> None:
        check_types(self, "model")
        expand(self, "path", "tokenizer")
        if self.path is None and self.architecture is None:
            raise ConfigError("model: neither path nor architecture is set; give one of them")
        if self.path is None and self.load_in_4bit:
            raise ConfigError("model.load_in_4bit=True: expected a model.path; only a checkpoint can be quantised")

    def for_training(self, lora: LoraConfig) -> ModelConfig:
        """With its dtype settled. bfloat16 keeps 8 bits of a weight: updates of less than 1/512 of it would be lost."""
        dtype = ("bfloat16" if lora.enabled or self.load_in_4bit else "float32") if self.dtype == "auto" else self.dtype
        return dataclasses.replace(self, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The outer LoRA, through which the slow weights θ are trained. The defaults are the paper's."""

    enabled: bool = knob(True, "train low-rank adapters; false trains every weight")
    r: int = knob(32, "rank")
    alpha: int = knob(64, "scaled by alpha / r")
    dropout: float = knob(0.05, "dropout on the adapter's input, in [0, 1)")
    target_modules: str | tuple[str, ...] = knob("all-linear", "all-linear, or names of linear layers")
    bias: Literal["none", "all", "lora_only"] = knob("none", "biases to train")
    path: str | None = knob(
        None, "hub name or folder of a LoRA adapter to go on from, made with the settings above; none starts a new one"
    )

    def __post_init__(self) -> None:
        check_types(self, "lora")
        expand(self, "path")
        require("lora", self, "path", self.path is None or self.enabled, "none with lora.enabled=False")
        require("lora", self, "r", self.r >= 1, "at least 1")
        require("lora", self, "dropout", 0 <= self.dropout < 1, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompt and response examples."""

    dataset: str = knob("", "hub name, or local .json/.jsonl/.parquet file or folder")
    split: str = knob("train", "split to train on")
    eval_split: str | None = knob(None, "split to evaluate on; none holds eval_fraction of `split` out")
    eval_fraction: float = knob(0.05, "share of the examples held out when there is no eval_split, in [0, 1)")
    format: Literal["auto", "instruction", "messages"] = knob(
        "auto", "how a row becomes a prompt and a response; auto goes by the field names"
    )
    instruction_field: str = knob("instruction", "field of the prompt (instruction format)")
    input_field: str = knob("input", "optional field appended to the prompt (instruction format)")
    output_field: str = knob("output", "field of the response (instruction format)")
    messages_field: str = knob("messages", "field of the chat: a list of {role, content}, the last from the assistant")
    max_length: int = knob(4096, "longest example in tokens; longer ones are dropped and counted, never cut")
    padding_loss: bool = knob(
        True,
        "see and learn padding, which is end-of-sequence, as dllm does; false hides it, as an evaluation always does",
    )
    mask_prompt: bool = knob(True, "keep the prompt out of the masks and of the loss")
    train_size: int | None = knob(None, "use the first N training rows, before long ones are dropped")
    eval_size: int | None = knob(None, "use the first N evaluation rows, before long ones are dropped")
    num_proc: int = knob(1, "processes that tokenise")

    def __post_init__(self) -> None:
        check_types(self, "data")
        require("data", self, "dataset", self.dataset != "", "a dataset name or path")
        require("data", self, "eval_fraction", 0 <= self.eval_fraction < 1, "in [0, 1)")
        require("data", self, "max_length", self.max_length >= 1, "at least 1")
        for name in ("train_size", "eval_size"):
            value = getattr(self, name)
            require("data", self, name, value is None or value >= 1, "at least 1")
        require("data", self, "num_proc", self.num_proc >= 1, "at least 1")


def require(section: str, config: Any, name: str, holds: bool, accepted: str) -> None:
    """Raise ConfigError naming section, field, value and what would be accepted, unless `holds`."""
    if not holds:
        raise ConfigError(f"{section}.{name}={getattr(config, name)!r}: expected {accepted}")


def expand(config: Any, *names: str) -> None:
    """Bring fields that begin with ~, a home folder, to the folder."""
    for name in names:
        if (value := getattr(config, name)) is not None:
            object.__setattr__(config, name, os.path.expanduser(value))


def check_types(config: Any, section: str) -> None:
    """Bring every field to its declared type (lists to tuples, whole numbers to floats), or raise ConfigError."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        try:
            object.__setattr__(config, f.name, _as_type(value, hints[f.name]))
        except TypeError:
            raise ConfigError(f"{section}.{f.name}={value!r}: expected {describe_type(hints[f.name])}") from None


def describe_type(hint: Any) -> str:
    """A type hint in words: `one of a, b`, `number`, `text or none`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe_type(a) for a in args)
    if origin in (tuple, list):
        return f"list of {describe_type(args[0])}"
    if origin is dict:
        return "mapping"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "none"}
    return names.get(hint, str(hint))


def _as_type(value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal and value in args:
        return value
    if origin in (types.UnionType, typing.Union):
        for arg in args:
            try:
                return _as_type(value, arg)
            except TypeError:
                continue
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        return origin(_as_type(v, args[0]) for v in value)
    if origin is dict and isinstance(value, dict):
        return dict(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if hint in (bool, int, str, type(None)) and type(value) is hint:
        return value
    raise TypeError
