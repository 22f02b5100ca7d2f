"""Every setting, declared once: the memory (the method), and the model, LoRA and data sections of a recipe.

Recipe files, command-line overrides, `memdlm info --keys` and lm-eval arguments are all derived from these fields.
pydantic checks them by their types; `check_types` says what it refuses.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo


class ConfigError(ValueError):
    """A setting the user can correct: the message says which, its value, and what would be accepted."""


Count = Annotated[int, Field(ge=1, description="whole number of at least 1")]
Natural = Annotated[int, Field(ge=0, description="whole number of at least 0")]
NotNegative = Annotated[float, Field(ge=0, description="number of at least 0")]
Positive = Annotated[float, Field(gt=0, description="number above 0")]
Share = Annotated[float, Field(gt=0, le=1, description="number in (0, 1]")]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1, description="number in [0, 1)")]
Probability = Annotated[float, Field(ge=0, le=1, description="number in [0, 1]")]
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1, description="list of at least one name")]
#: A folder may begin with ~, the home folder.
Place = Annotated[str, AfterValidator(os.path.expanduser), Field(min_length=1, description="folder or hub name")]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]


def knob(default: Any, help: str) -> Any:
    """Return a dataclass field with its help text. A mapping is copied for each instance."""
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The inner loop (Parametric Memory). The defaults are the paper's settings.

    Raises:
        ConfigError: a value is of the wrong type, out of range, or not among the choices.
    """

    enabled: bool = knob(True, "train with fast weights; false is plain MDLM on the same masks")

    # the trajectory (section 3.2)
    strategy: Literal["anchor_consistent", "inconsistent", "pre_anchor_only", "anchor_only", "cover"] = knob(
        "anchor_consistent",
        "which denoising states the inner loop visits; cover (ours) masks every token in one of them, 1/K in each",
    )
    steps: Count = knob(2, "K, inner steps along one trajectory (anchor_consistent, inconsistent, cover)")
    epochs: Natural = knob(1, "passes over the trajectory; 0 trains with empty fast weights")
    pre_anchor_scale: Annotated[float, Field(ge=1, description="number of at least 1")] = knob(
        1.5, "masked tokens of the pre-anchor state over those of the anchor"
    )
    targets: Literal["masked", "newly_revealed"] = knob(
        "masked", "tokens an inner step is supervised on: all masked ones, or those the next state reveals"
    )
    start_ratio: Share = knob(0.8, "masked ratio that `inconsistent` starts from, at least anchor_ratio")
    anchor_ratio: Share = knob(0.2, "masked ratio of a prompt's anchor at inference, and that `inconsistent` ends on")

    # the inner objective and its optimizer (section 3.3)
    objective: Literal["cross_entropy", "kl", "reverse_kl", "hidden_mse", "hidden_cosine"] = knob(
        "cross_entropy", "inner loss: on the clean tokens, or towards a teacher that sees the next state"
    )
    weighting: Literal["scheduler", "uniform"] = knob(
        "scheduler", "weight of an inner token: w(r) at the state's masked ratio r, or 1, as it always is of a prompt"
    )
    inner_lr: NotNegative = knob(0.1, "learning rate of the inner SGD")
    clip: Literal["local", "global", "none"] = knob(
        "local", "gradient clipping: each fast-weight tensor by its own norm, all together, or not at all"
    )
    grad_clip: NotNegative = knob(1.0, "largest L2 norm that clipping leaves; 0 turns clipping off")

    # the fast weights
    kind: Literal["lora", "full"] = knob("lora", "low-rank pairs A, B, or a full-size weight difference")
    rank: Count = knob(32, "rank of the low-rank pairs")
    alpha: Positive = knob(64.0, "the low-rank product is scaled by alpha / rank")
    scope: Literal["sample", "batch"] = knob(
        "sample", "one set of fast weights for each sample, or one shared by the batch (as the paper's code does)"
    )
    sync: bool = knob(
        False, "share one set over all processes, for the whole global batch (scope: batch); false keeps them apart"
    )
    target_modules: Names = knob(
        ("gate_proj", "up_proj", "down_proj"), "names of the linear layers that carry fast weights"
    )
    layer_fraction: Share = knob(0.1, "share of the layers, counted from the last, that carry fast weights")

    # ours, not the paper's
    source: Literal["response", "prompt"] = knob(
        "response", "what fast weights are written on in training: the response (the paper), or the prompt, as in use"
    )
    window: Count | None = knob(
        None, "tokens of a prompt that are read at a time, one window after the other; none reads it whole"
    )
    prompt_loss: NotNegative = knob(
        0.0,
        "weight of the denoising loss of prompts, without fast weights, beside that of responses; memory off or on",
    )
    dropout: Probability = knob(
        0.0, "probability that a training example sees no fast weights in the outer pass; not in the paper"
    )

    def __post_init__(self) -> None:
        check_types(self, "memory")
        shared = not self.sync or self.scope == "batch"
        require("memory", self, "sync", shared, "false with memory.scope: sample, as each sample has a set of its own")
        falls = self.strategy != "inconsistent" or self.start_ratio >= self.anchor_ratio
        require("memory", self, "start_ratio", falls, f"at least memory.anchor_ratio, {self.anchor_ratio}")

    @property
    def scaling(self) -> float:
        """Return α/r, the factor of the low-rank product; 1 for full-size differences."""
        return self.alpha / self.rank if self.kind == "lora" else 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the backbone comes from: a checkpoint (`path`), or an architecture with dimensions, from scratch."""

    path: Place | None = knob(None, "where the weights are; none trains from scratch")
    architecture: str | None = knob(
        None, "model class, e.g. LLaDA2MoeModelLM; with a path it is read from config.json and serves only --dry-run"
    )
    dimensions: dict[str, Any] = knob({}, "fields of the architecture's config, when there is no config.json")
    tokenizer: Place | None = knob(None, "where the tokenizer is; none takes `path`, or trains one on the data")
    tokenizer_vocab_size: int = knob(4096, "tokens of the byte-level BPE that is trained when there is no tokenizer")
    dtype: DType = knob(
        "auto", "dtype of the weights; auto is bfloat16 under a LoRA, and float32 where all of them train"
    )
    load_in_4bit: bool = knob(False, "NF4 with double quantisation (extra `quant`)")
    attn_implementation: Attention = knob("sdpa", "attention kernel")
    trust_remote_code: bool = knob(
        False, "run Python code that a checkpoint brings along; only Dream's own tokenizer is such"
    )

    def __post_init__(self) -> None:
        check_types(self, "model")
        if self.path is None and self.architecture is None:
            raise ConfigError("model: neither path nor architecture is set; give one of them")
        if self.path is None and self.load_in_4bit:
            raise ConfigError("model.load_in_4bit=True: expected a model.path; only a checkpoint can be quantised")

    def for_training(self, lora: LoraConfig) -> ModelConfig:
        """Return it with its dtype settled. bfloat16 keeps 8 bits of a weight: updates below 1/512 of it are lost."""
        dtype = ("bfloat16" if lora.enabled or self.load_in_4bit else "float32") if self.dtype == "auto" else self.dtype
        return dataclasses.replace(self, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The outer LoRA, through which the slow weights θ are trained. The defaults are the paper's."""

    enabled: bool = knob(True, "train low-rank adapters; false trains every weight")
    r: Count = knob(32, "rank")
    alpha: int = knob(64, "scaled by alpha / r")
    dropout: ShareBelowOne = knob(0.05, "dropout on the adapter's input")
    target_modules: str | Names = knob("all-linear", "all-linear, or names of linear layers")
    bias: Literal["none", "all", "lora_only"] = knob("none", "biases to train")
    path: Place | None = knob(None, "a LoRA adapter to go on from, made with the settings above; none starts a new one")

    def __post_init__(self) -> None:
        check_types(self, "lora")
        require("lora", self, "path", self.path is None or self.enabled, "none with lora.enabled=False")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompt and response examples."""

    dataset: str | Names | dict[str, Positive] = knob(
        "", "hub name, or local .json/.jsonl/.parquet/.csv file or folder; a list of them; or their shares in a mixture"
    )
    streaming: bool = knob(False, "read rows while training, shuffled 10,000 at a time; needs training.max_steps")
    split: str = knob("train", "split to train on")
    eval_split: str | None = knob(None, "split to evaluate on; none holds eval_fraction of `split` out")
    eval_fraction: ShareBelowOne = knob(0.05, "share of the examples held out when there is no eval_split")
    format: Literal["auto", "instruction", "messages"] = knob(
        "auto", "how a row becomes a prompt and a response; auto goes by the field names"
    )
    instruction_field: str = knob("instruction", "field of the prompt (instruction format)")
    input_field: str = knob("input", "optional field appended to the prompt (instruction format)")
    output_field: str = knob("output", "field of the response (instruction format)")
    messages_field: str = knob("messages", "field of the chat: a list of {role, content}, the last from the assistant")
    template: dict[str, Any] = knob({}, "arguments of the chat template, such as {enable_thinking: false}")
    max_length: Count = knob(4096, "longest example in tokens; longer ones are dropped and counted, or cut")
    truncation: Literal["filter", "right"] = knob(
        "filter", "what becomes of longer examples, as dllm calls it: right cuts their end where a prompt leaves room"
    )
    padding_loss: bool = knob(
        True,
        "see and learn padding, which is end-of-sequence, as dllm does; false hides it, as an evaluation always does",
    )
    perbatch_cutoff: bool = knob(
        False, "cut responses to at most the length of one of their batch, drawn anew for each, as dllm does for Dream"
    )
    resp_cutoff_ratio: Probability = knob(
        0.0, "share of the batches that are cut by fewer tokens than their shortest response has, as dllm can for Dream"
    )
    mask_prompt: bool = knob(True, "keep the prompt out of the masks and of the loss")
    visible: Count | None = knob(
        None, "tokens of a prompt that the model sees, counted from its end; a memory reads all; none shows all"
    )
    train_size: Count | None = knob(None, "use the first N training rows of a dataset, before long ones are dropped")
    eval_size: Count | None = knob(None, "use the first N evaluation rows, before long ones are dropped")
    num_proc: Count = knob(1, "processes that tokenise")

    def __post_init__(self) -> None:
        check_types(self, "data")
        require("data", self, "dataset", bool(self.dataset) and "" not in self.parts(), "a dataset name or path")
        whole = not self.streaming or self.eval_split is not None
        require("data", self, "eval_fraction", whole or self.eval_fraction == 0, "0 with data.streaming, or eval_split")
        either = not self.perbatch_cutoff or self.resp_cutoff_ratio == 0
        require("data", self, "resp_cutoff_ratio", either, "0 with data.perbatch_cutoff")
        for name in ("perbatch_cutoff", "resp_cutoff_ratio", "visible"):  # a learned prompt is no longer told apart
            none = self.mask_prompt or not getattr(self, name)
            require("data", self, name, none, "none with data.mask_prompt=False")

    def parts(self) -> dict[str, DataConfig]:
        """Return the same settings for each dataset alone, by its name."""
        names = (self.dataset,) if isinstance(self.dataset, str) else self.dataset
        return {name: self if name == self.dataset else dataclasses.replace(self, dataset=name) for name in names}


def require(section: str, config: Any, name: str, holds: bool, accepted: str) -> None:
    """Raise ConfigError naming section, field, value and what would be accepted, unless `holds`."""
    if not holds:
        raise ConfigError(f"{section}.{name}={getattr(config, name)!r}: expected {accepted}")


def check_types(config: Any, section: str) -> None:
    """Bring every field of a dataclass to its declared type: lists to tuples, whole numbers to floats.

    Raises:
        ConfigError: a value is of another type, or out of the type's range.
    """
    for name, (adapter, accepted) in declared(config.__class__).items():
        value = getattr(config, name)
        try:
            object.__setattr__(config, name, adapter.validate_python(value))
        except ValidationError:
            raise ConfigError(f"{section}.{name}={value!r}: expected {accepted}") from None


@functools.cache
def declared(config: type) -> dict[str, tuple[TypeAdapter[Any], str]]:
    """Return what checks each field of a dataclass, and its type in words. `narrower` types win over the declared."""
    strict = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    hints: dict[str, Any] = typing.get_type_hints(config, include_extras=True) | getattr(config, "narrower", {})
    own = {f.name: hints[f.name] for f in dataclasses.fields(config)}
    return {name: (TypeAdapter(hint, config=strict), describe_type(hint)) for name, hint in own.items()}


def describe_type(hint: Any) -> str:
    """Say a type in words: `one of a, b`, `number in [0, 1]`, `text or none`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return next(part.description for part in args[1:] if isinstance(part, FieldInfo) and part.description)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(describe_type, args))
    if origin is list:
        return f"list of {describe_type(args[0])}"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", dict: "mapping"}
    names |= {type(None): "none"}
    return names.get(origin or hint, str(hint))


def refuse_unknown(what: str, names: Iterable[str], known: Iterable[str], prefix: str = "") -> None:
    """Raise ConfigError for the first of the names that is not known, with the nearest that is, or with all."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            advice = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown {what} {f'{prefix}{name}'!r}; {advice}")
