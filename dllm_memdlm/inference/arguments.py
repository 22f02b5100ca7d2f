"""What `--model_args` of the model `memdlm` may hold, checked: an unknown name is refused with the nearest known one.

Beside the arguments declared here there are the sampler's settings by their own names (`steps`, `block_size`,
`threshold`, …) and the fields of `MemoryConfig` behind `memory_` (`memory_inner_lr`, `memory_rank`, …).
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field

from ..config import (
    Attention,
    ConfigError,
    Count,
    DType,
    MemoryConfig,
    Place,
    check_types,
    knob,
    refuse_unknown,
    require,
)
from .decoding import SAMPLERS, Decoder, SamplerName, memory_for, sampler_settings
from .pretrained import load_pretrained

_logger = logging.getLogger("lm_eval.models.memdlm")  # lm-eval shows the messages of its own loggers only

#: Fields of `MemoryConfig` that mean nothing for a prompt, or are declared below in another form.
TRAINING_ONLY = {"enabled", "dropout", "scope", "sync", "weighting", "source", "prompt_loss"}

#: The other fields, by the names of their arguments.
MEMORY = {f"memory_{f.name}": f.name for f in dataclasses.fields(MemoryConfig) if f.name not in TRAINING_ONLY}

#: A number that YAML 1.1 takes for text: it has an exponent, and no point or no sign behind the e.
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")

#: Arguments one of whose choices is called none, which is not the same as nothing.
NONE_IS_A_CHOICE = {"memory_clip", "cache"}

_AtLeastTwo = Annotated[int, Field(ge=2, description="whole number of at least 2")]
_Seed = Annotated[int, Field(gt=-(2**62), lt=2**62, description="a number of at most 62 bits")]
_Size = Annotated[str, Field(pattern=r"^(auto(:\d+)?|[1-9]\d*)$")]  # in lm-eval's words
_BatchSize = Annotated[Count | _Size, Field(description="a number of at least 1, or auto")]


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """The arguments that are neither the sampler's nor the memory's.

    Raises ConfigError for a value of the wrong type, out of range, or not among the choices.
    """

    pretrained: Place = knob("", "a run's folder, a hub name, or the folder of an adapter")
    adapter: Place | None = knob(None, "a PEFT adapter")
    merge_adapter: bool = knob(False, "add the adapter to the weights: faster, and rounded to their dtype")
    tokenizer: Place | None = knob(None, "none takes the adapter's or the model's")
    dtype: DType = knob("auto", "of the weights; auto is the checkpoint's")
    load_in_4bit: bool = knob(False, "NF4 with double quantisation (extra `quant`)")
    attn_implementation: Attention = knob("sdpa", "attention kernel")
    device: str | None = knob(None, "cpu, cuda or cuda:N; none is the GPU where there is one")
    batch_size: _BatchSize = knob(1, "prompts at a time; auto: as many as fit")
    max_batch_size: Count | None = knob(None, "the most that auto tries; none is 64")
    max_length: _AtLeastTwo | None = knob(None, "tokens of prompt and answer together; none is the model's")
    visible: Count | None = knob(None, "tokens of a prompt that the model sees, from its end; none: as it was trained")
    max_gen_toks: Count = knob(256, "new tokens where the task does not say")
    sampler: SamplerName = knob(
        "auto", "how to decode; auto is what the model was made for, and of LLaDA 2 version 2.1"
    )
    seed: _Seed = knob(0, "of the memory's masks, of sampling, and of the likelihood's masks")
    mc_num: Count = knob(128, "masks from which a likelihood is estimated")
    check_greedy: bool = knob(False, "decode to see whether a continuation is the model's own (one pass a token)")

    memory: bool | None = knob(None, "adapt to each prompt; none: if a memory_ setting is given")
    memory_scope: Literal["prompt", "prefix"] = knob(
        "prompt", "one memory for each prompt, or one for prompts that begin with the same document"
    )
    memory_attention: Literal["full", "block_causal"] = knob(
        "full", "who sees whom while the memory is written: all (the paper), or as LLaDA2.1 decodes"
    )
    fast_weights: Place | None = knob(None, "a file with a saved memory, in place for every prompt")

    def __post_init__(self) -> None:
        check_types(self, "model_args")
        require("model_args", self, "memory", not (self.memory and self.fast_weights), "false with fast_weights")


@dataclass(frozen=True)
class Parsed:
    """The arguments of one evaluation."""

    arguments: EvalArguments
    sampler: dict[str, Any]  #: settings of the sampler
    memory: dict[str, Any]  #: fields of `MemoryConfig` that differ from those of training
    uses_memory: bool

    def open(self, device: torch.device | None = None) -> Decoder:
        """Load the model, with its sampler and memory, on a device or on the one of the arguments.

        Raises ConfigError where something is not there, or does not fit.
        """
        own = self.arguments
        pretrained = load_pretrained(
            own.pretrained,
            own.adapter,
            own.tokenizer,
            device=device or device_of(own.device),
            dtype=own.dtype,
            load_in_4bit=own.load_in_4bit,
            attn_implementation=own.attn_implementation,
            merge_adapter=own.merge_adapter,
        )
        memory = None
        if self.uses_memory or own.fast_weights is not None:
            block_size = self.sampler.get("block_size") or 32
            settings = {"seed": own.seed, "attention": own.memory_attention, "block_size": block_size}
            memory = memory_for(pretrained, self.memory, own.fast_weights, **settings)
        return Decoder(pretrained, own.sampler, self.sampler, memory, own.max_length, own.visible)


def device_of(name: str | None) -> torch.device:
    """Return the device asked for; the CPU for a GPU that is not there, as lm-eval asks for one by default."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
        there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[
            device.type
        ]
    except (KeyError, RuntimeError):
        raise ConfigError(f"device={name!r}: expected cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and not there:
        _logger.warning("device=%s: there is none; using the CPU", name)
        return torch.device("cpu")
    if (device.index or 0) >= there:
        raise ConfigError(f"device={name!r}: there are {there} of that kind; expected one that is there")
    return device


def parse(values: dict[str, Any]) -> Parsed:
    """Sort the arguments out. Raises ConfigError for one that does not exist, or as `EvalArguments`."""
    values = {name: as_meant(value, name in NONE_IS_A_CHOICE) for name, value in values.items()}
    own = {f.name for f in dataclasses.fields(EvalArguments)}
    samplers = set().union(*map(sampler_settings, SAMPLERS))
    refuse_unknown("model argument", values, sorted(own | samplers | MEMORY.keys()))
    arguments = EvalArguments(**{name: value for name, value in values.items() if name in own})
    changes = {MEMORY[name]: value for name, value in values.items() if name in MEMORY}
    wanted = arguments.memory if arguments.memory is not None else bool(changes)
    if wanted and arguments.fast_weights:
        raise ConfigError("model_args.fast_weights: a saved memory brings its settings along; give no memory_ setting")
    for name, usual in (("memory_scope", "prompt"), ("memory_attention", "full")):
        useful = getattr(arguments, name) == usual or wanted or arguments.memory is not None
        require("model_args", arguments, name, useful, "memory=true beside it")
    return Parsed(arguments, {name: v for name, v in values.items() if name in samplers}, changes, wanted)


def from_command_line(args: argparse.Namespace, **defaults: Any) -> Parsed:
    """Read what `memdlm generate` and the evaluations of a run were given. Raises ConfigError as `parse`."""
    values = {**defaults, "pretrained": args.model, "adapter": args.adapter, "fast_weights": args.load_memory}
    for setting in args.settings:
        name, equals, value = setting.partition("=")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise ConfigError(f"{setting!r}: expected name=value, such as temperature=0.7 or suppress_tokens=[5, 7]")
    if args.memory or args.save_memory:
        values["memory"] = True
    return parse(values)


def as_meant(value: Any, none_is_a_choice: bool = False) -> Any:
    """Return a value as it was meant: lm-eval leaves `none` and lists of words as text, and makes 1e3 and -3 floats.

    YAML 1.1 takes 5e-2 for text; in a recipe it is a number, and so it is here.
    """
    if isinstance(value, str) and EXPONENT.fullmatch(value):
        value = float(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    if value.lower() == "none":
        return "none" if none_is_a_choice else None
    if value.startswith("[") and value.endswith("]"):
        parts = [part.strip() for part in value[1:-1].replace(";", ",").split(",") if part.strip()]
        return [int(part) if part.lstrip("-").isdigit() else part for part in parts]
    return value
