"""What `--model_args` of the model `memdlm` may hold, checked: an unknown name is refused with the nearest known one.

Beside the arguments declared here there are the sampler's settings by their own names (`steps`, `block_size`,
`threshold`, …) and the fields of `MemoryConfig` behind `memory_` (`memory_inner_lr`, `memory_rank`, …).
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..config import ConfigError, MemoryConfig, check_types, knob, require
from .decoding import SAMPLERS, Decoder, memory_for, sampler_settings
from .pretrained import load_pretrained

_logger = logging.getLogger("lm_eval.models.memdlm")  # lm-eval shows the messages of its own loggers only

#: Fields of `MemoryConfig` that mean nothing for a prompt, or are declared below in another form.
TRAINING_ONLY = {"enabled", "dropout", "scope", "sync", "weighting"}

#: A number that YAML 1.1 takes for text: it has an exponent, and no point or no sign behind the e.
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")

#: Arguments one of whose choices is called none, which is not the same as nothing.
NONE_IS_A_CHOICE = {"memory_clip", "cache"}


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """Raises ConfigError: a value is of the wrong type, out of range, or not among the choices."""

    pretrained: str = knob("", "a run's folder, a hub name, or the folder of an adapter")
    adapter: str | None = knob(None, "folder or hub name of a PEFT adapter")
    merge_adapter: bool = knob(False, "add the adapter to the weights: faster, and rounded to their dtype")
    tokenizer: str | None = knob(None, "folder or hub name; none takes the adapter's or the model's")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob("auto", "of the weights; auto is the checkpoint's")
    load_in_4bit: bool = knob(False, "NF4 with double quantisation (extra `quant`)")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = knob("sdpa", "attention kernel")
    device: str | None = knob(None, "cpu, cuda or cuda:N; none is the GPU where there is one")
    batch_size: int | str = knob(1, "prompts at a time; auto: as many as fit")
    max_batch_size: int | None = knob(None, "the most that auto tries; none is 64")
    max_length: int | None = knob(None, "tokens of prompt and answer together; none is the model's")
    max_gen_toks: int = knob(256, "new tokens where the task does not say")
    sampler: Literal["auto", "mdlm", "llada21"] = knob("auto", "how to decode; auto is what the model was made for")
    seed: int = knob(0, "of the memory's masks, of sampling, and of the likelihood's masks")
    mc_num: int = knob(128, "masks from which a likelihood is estimated")
    check_greedy: bool = knob(False, "decode to see whether a continuation is the model's own (one pass a token)")

    memory: bool | None = knob(None, "adapt to each prompt; none: if a memory_ setting is given")
    memory_scope: Literal["prompt", "prefix"] = knob(
        "prompt", "one memory for each prompt, or one for prompts that begin with the same document"
    )
    memory_attention: Literal["full", "block_causal"] = knob(
        "full", "who sees whom while the memory is written: all (the paper), or as LLaDA2.1 decodes"
    )
    fast_weights: str | None = knob(None, "a saved memory, in place for every prompt")

    def __post_init__(self) -> None:
        check_types(self, "model_args")
        for name in ("pretrained", "adapter", "tokenizer", "fast_weights"):
            value = getattr(self, name)
            require(
                "model_args", self, name, value != "", "a file" if name == "fast_weights" else "a folder or hub name"
            )
            if value is not None:
                object.__setattr__(self, name, os.path.expanduser(value))
        for name, least in (("max_batch_size", 1), ("max_length", 2), ("max_gen_toks", 1), ("mc_num", 1)):
            value = getattr(self, name)
            require("model_args", self, name, value is None or value >= least, f"at least {least}")
        require("model_args", self, "seed", abs(self.seed) < 2**62, "a number of at most 62 bits")
        fits = re.fullmatch(r"auto(:\d+)?|[1-9]\d*", str(self.batch_size)) is not None
        require("model_args", self, "batch_size", fits, "a number of at least 1, or auto")
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

        Raises:
            ConfigError: something is not there, or does not fit.
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
            memory = memory_for(
                pretrained,
                self.memory,
                own.fast_weights,
                seed=own.seed,
                attention=own.memory_attention,
                block_size=self.sampler.get("block_size") or 32,
            )
        return Decoder(pretrained, own.sampler, self.sampler, memory, own.max_length)


def device_of(name: str | None) -> torch.device:
    """The device asked for; the CPU where a GPU is asked for, as lm-eval does by default, that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if name not in ("cpu", "cuda", "mps") and not (kind == "cuda" and number.isdecimal()):
        raise ConfigError(f"device={name!r}: expected cpu, cuda, cuda:N or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        _logger.warning("device=%s: there is none; using the CPU", name)
        return torch.device("cpu")
    if number and int(number) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}: expected one below cuda:{torch.cuda.device_count()}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device={name!r}: there is none; expected cpu, cuda or cuda:N")
    return torch.device(name)


def parse(values: dict[str, Any]) -> Parsed:
    """Sort the arguments out.

    Raises:
        ConfigError: an argument that does not exist; or as `EvalArguments`.
    """
    values = {name: as_meant(value, name in NONE_IS_A_CHOICE) for name, value in values.items()}
    own = {f.name for f in dataclasses.fields(EvalArguments)}
    samplers = set().union(*(sampler_settings(name) for name in SAMPLERS))
    memory = {f"memory_{f.name}": f for f in dataclasses.fields(MemoryConfig) if f.name not in TRAINING_ONLY}
    known = own | samplers | memory.keys()
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
            advice = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown model argument {name!r}; {advice}")
    arguments = EvalArguments(**{k: v for k, v in values.items() if k in own})
    changes = {name.removeprefix("memory_"): v for name, v in values.items() if name in memory}
    wanted = arguments.memory if arguments.memory is not None else bool(changes)
    if wanted and arguments.fast_weights:
        raise ConfigError("model_args.fast_weights: a saved memory brings its settings along; give no memory_ setting")
    for name, usual in (("memory_scope", "prompt"), ("memory_attention", "full")):
        value = getattr(arguments, name)
        if value != usual and not wanted and arguments.memory is None:
            raise ConfigError(f"model_args.{name}={value!r}: expected memory=true beside it")
    settings = {k: v for k, v in values.items() if k in samplers}
    return Parsed(arguments, settings, changes, wanted)


def as_meant(value: Any, none_is_a_choice: bool = False) -> Any:
    """A value as it was meant: lm-eval leaves `none` and lists of words as text, and makes 1e3 and -3 floats.

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
