"""What the samplers share: settings, prompts, random numbers of each row, and the answers on a finished canvas."""

from __future__ import annotations

import abc
import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...backbones import adopt, staged_backbone
from ...compat.dllm_api import BaseSampler, BaseSamplerConfig, BaseSamplerOutput
from ...config import ConfigError, require
from ...method.losses import Positions

Settings = TypeVar("Settings")


@dataclasses.dataclass
class CanvasSampler(BaseSampler):
    """A sampler that fills in a canvas step by step; subclasses write `steps`.

    Args:
        model: a backbone, PEFT's wrapper around one, or a model of dllm's (it gets our forward, `backbones.adopt`).
        tokenizer: its mask and end-of-sequence tokens are used.
        scheduler: says how many tokens each step of `MDLMSampler` commits; linear by default.

    Raises:
        TypeError: the model has no staged forward.
        ConfigError: the tokenizer has no mask or end-of-sequence token.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        adopt(self.model)
        self.layers = len(staged_backbone(self.model).layers)
        for name in ("mask_token_id", "eos_token_id"):
            if getattr(self.tokenizer, name) is None:
                raise ConfigError(f"tokenizer without {name}: a canvas is made of both")

    @abc.abstractmethod
    def steps(
        self,
        inputs: Sequence[Tensor | list[int]],
        config: Any = None,
        seeds: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Iterator[Tensor]:
        """The canvas [B, T] before the first step and after each one; the same tensor, changed in place.

        Args:
            inputs: prompts, of any lengths.
            config: settings; defaults if none.
            seeds: one for each prompt: its random numbers, so that they do not depend on the rest of the batch. Without
                them torch's global generator is used, in the order in which dllm uses it.
            kwargs: settings that differ from `config`.
        """

    @torch.no_grad()
    def sample(
        self,
        inputs: Sequence[Tensor | list[int]],
        config: Any = None,
        seeds: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> BaseSamplerOutput | Tensor:
        """The finished canvas [B, T], or with `return_dict` that and the canvas after every step. As `steps`."""
        return self._finished(self.steps(inputs, config, seeds, **kwargs), config, kwargs)

    def _finished(self, steps: Iterator[Tensor], config: Any, kwargs: dict[str, Any]) -> BaseSamplerOutput | Tensor:
        keep = settings_of(
            BaseSamplerConfig, config, {k: v for k, v in kwargs.items() if k == "return_dict"}
        ).return_dict
        histories = []
        for canvas in steps:
            if keep:
                histories.append(canvas.clone())
        return BaseSamplerOutput(sequences=canvas, histories=histories) if keep else canvas

    def _prompts(self, inputs: Sequence[Tensor | list[int]]) -> list[Tensor]:
        if len(inputs) == 0:
            raise ConfigError("no prompt to decode")
        return [torch.as_tensor(prompt, dtype=torch.long, device=self.model.device) for prompt in inputs]

    def _canvas(self, rows: list[Tensor], length: int) -> Tensor:
        """The rows, padded to a length with end of sequence. → [B, length]."""
        canvas = torch.full((len(rows), length), self.tokenizer.eos_token_id, device=self.model.device)
        for line, row in zip(canvas, rows, strict=True):
            line[: len(row)] = row
        return canvas


def settings_of(cls: type[Settings], config: BaseSamplerConfig | None, changes: dict[str, Any]) -> Settings:
    """The settings of a sampler: `config`, which may be dllm's dataclass of the same fields, with `changes`.

    Raises:
        ConfigError: there is no such setting.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown sampler setting {name!r}; {advice}")
    given = {} if config is None else {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return cls(**{**{k: v for k, v in given.items() if k in known}, **changes})


def new_tokens(settings: Any, longest: int) -> int:
    """Tokens to generate behind a prompt of `longest` tokens. Raises ConfigError if the settings leave none."""
    if settings.max_new_tokens is not None:
        require("sampler", settings, "max_new_tokens", settings.max_new_tokens >= 1, "at least 1")
        return settings.max_new_tokens
    room = (settings.max_length or 0) - longest
    require("sampler", settings, "max_length", room > 0, f"more than the prompt's {longest} tokens")
    return room


class RowNoise:
    """Random numbers of a batch: each row's from its own seed, or all from torch's global generator."""

    def __init__(self, seeds: Sequence[int] | None, rows: int, device: torch.device) -> None:
        if seeds is not None and len(seeds) != rows:
            raise ConfigError(f"{len(seeds)} seeds for {rows} prompts: expected one for each")
        self.generators = None if seeds is None else [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.device = device

    def uniform(self, shape: tuple[int, ...], positions: Positions, dtype: torch.dtype) -> Tensor:
        """Uniform numbers for some positions of a canvas. shape (B, T, …), positions [B, M] → [B, M, …].

        The global generator draws the whole canvas, as dllm does; a row's own draws for the row's positions alone.
        """
        index, valid = positions
        if self.generators is None:
            drawn = torch.rand(shape, dtype=dtype, device=self.device)
            return drawn[torch.arange(len(index), device=self.device)[:, None], index]
        drawn = torch.ones(*index.shape, *shape[2:], dtype=dtype, device=self.device)
        for row, count, generator in zip(drawn, valid.sum(1).tolist(), self.generators, strict=True):
            row[:count].uniform_(generator=generator)
        return drawn

    def choose(self, probabilities: Tensor, idle: Sequence[bool]) -> Tensor:
        """One token for each distribution, 0 for all of an idle row of its own seed. [B, M, V] → [B, M] int64."""
        if self.generators is None:
            return torch.multinomial(probabilities.flatten(0, 1), 1).view(probabilities.shape[:2])
        chosen = torch.zeros(probabilities.shape[:2], dtype=torch.long, device=self.device)
        for row, own, generator, left_out in zip(chosen, probabilities, self.generators, idle, strict=True):
            if not left_out:
                row.copy_(torch.multinomial(own, 1, generator=generator)[:, 0])
        return chosen

    def binomial(self, row: int, count: int, probability: float) -> int:
        """How many of `count` events happen."""
        n, p = (torch.tensor(value, dtype=torch.float64, device=self.device) for value in (count, probability))
        generator = None if self.generators is None else self.generators[row]
        return int(torch.binomial(n, p, generator=generator))


def completions(
    canvas: Tensor, prompt_lengths: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    """The answers on a canvas [B, T]: at most `max_new_tokens` behind each prompt, up to the first of `stop_ids`."""
    answers = []
    for row, length in zip(canvas.tolist(), prompt_lengths, strict=True):
        answer = row[length : length + max_new_tokens]
        end = next((i for i, token in enumerate(answer) if token in stop_ids), len(answer))
        answers.append(answer[:end])
    return answers
