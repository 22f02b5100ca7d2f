"""What the samplers share: settings, the canvas, random numbers of each row, and the answers on a finished canvas."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...backbones import adopt, staged_backbone
from ...compat.dllm_api import BaseSampler, BaseSamplerConfig, BaseSamplerOutput
from ...config import ConfigError, Count, NotNegative, check_types, knob, refuse_unknown, require
from ...method.losses import Positions

Prompts = Sequence[Tensor | list[int]]


@dataclasses.dataclass
class SamplerConfig(BaseSamplerConfig):
    """Settings of every sampler. They have dllm's names and defaults, but for those that only we have.

    Raises:
        ConfigError: a value is of the wrong type, out of range, or not among the choices.
    """

    NAME: ClassVar[str]  #: of the sampler

    max_new_tokens: Count | None = knob(128, "of an answer")
    max_length: int | None = knob(None, "of prompt and answer together, where max_new_tokens is none")
    temperature: NotNegative = knob(0.0, "0 takes the likeliest token")

    def __post_init__(self) -> None:
        check_types(self, "sampler")

    @classmethod
    def of(cls, config: BaseSamplerConfig | None, changes: dict[str, Any]) -> SamplerConfig:
        """Return `config`, which may be dllm's dataclass of the same fields, with `changes`, or raise ConfigError."""
        known = sorted(field.name for field in dataclasses.fields(cls))
        refuse_unknown(f"setting of the {cls.NAME} sampler", changes, known)
        given = {} if config is None else {name: getattr(config, name) for name in known if hasattr(config, name)}
        return cls(**{**given, **changes})

    def new_tokens(self, longest: int) -> int:
        """Return how many tokens to generate behind `longest` tokens. Raises ConfigError if there is no room."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        room = (self.max_length or 0) - longest
        require("sampler", self, "max_length", room > 0, f"more than the prompt's {longest} tokens")
        return room


@dataclasses.dataclass
class CanvasSampler(BaseSampler):
    """A sampler that fills in a canvas step by step; subclasses write `_decode`.

    Args:
        model: a backbone, PEFT's wrapper around one, or a model of dllm's (it gets our forward, `backbones.adopt`).
        tokenizer: its mask and end-of-sequence tokens are used.
        scheduler: says how many tokens each step of `MDLMSampler` commits; linear by default.

    Raises:
        TypeError: the model has no staged forward.
        ConfigError: the tokenizer has no mask or end-of-sequence token.
    """

    CONFIG: ClassVar[type[SamplerConfig]]

    def __post_init__(self) -> None:
        super().__post_init__()
        adopt(self.model)
        backbone = staged_backbone(self.model)
        self.layers, self.shifted = len(backbone.layers), backbone.right_shift_logits
        if self.shifted and not hasattr(self.CONFIG, "right_shift_logits"):
            raise ConfigError(
                f"sampler {self.CONFIG.NAME}: takes no logits of the next position, which those of "
                f"{type(backbone).__name__} are; expected dream or mdlm"
            )
        for name in ("mask_token_id", "eos_token_id"):
            if getattr(self.tokenizer, name) is None:
                raise ConfigError(f"tokenizer without {name}: a canvas is made of both")

    def steps(
        self, inputs: Prompts, config: Any = None, seeds: Sequence[int] | None = None, **kwargs: Any
    ) -> Iterator[Tensor]:
        """Yield the canvas [B, T] before the first step and after each one: the same tensor, changed in place.

        Args:
            inputs: prompts, of any lengths.
            config: settings; defaults if none.
            seeds: one for each prompt: its random numbers, so that they do not depend on the rest of the batch. Without
                them torch's global generator is used, in the order in which dllm uses it.
            kwargs: settings that differ from `config`.

        Raises:
            ConfigError: there is no prompt, or a setting or the number of seeds does not fit.
        """
        return self._decode(*self._begin(inputs, config, seeds, kwargs))

    def sample(
        self, inputs: Prompts, config: Any = None, seeds: Sequence[int] | None = None, **kwargs: Any
    ) -> BaseSamplerOutput | Tensor:
        """Return the finished canvas [B, T]; with `return_dict` also the canvas after every step. See `steps`."""
        prompts, settings, noise = self._begin(inputs, config, seeds, kwargs)
        return finished(self._decode(prompts, settings, noise), settings)

    @abc.abstractmethod
    def _decode(self, prompts: list[Tensor], settings: Any, noise: RowNoise) -> Iterator[Tensor]: ...

    def _begin(
        self, inputs: Prompts, config: Any, seeds: Sequence[int] | None, changes: dict[str, Any]
    ) -> tuple[list[Tensor], Any, RowNoise]:
        if self.shifted:  # by its architecture, whatever the defaults of a config say
            changes = {"right_shift_logits": True, **changes}
        settings, device = self.CONFIG.of(config, changes), self.model.device
        shifted = not self.shifted or settings.right_shift_logits
        require("sampler", settings, "right_shift_logits", shifted, "true with this model, whose logits are shifted")
        if len(inputs) == 0:
            raise ConfigError("no prompt to decode")
        prompts = [torch.as_tensor(prompt, dtype=torch.long, device=device) for prompt in inputs]
        if getattr(settings, "right_shift_logits", False):  # the first token is predicted from what stands before it
            prompts = [
                prompt if len(prompt) else prompt.new_tensor([self.tokenizer.bos_token_id]) for prompt in prompts
            ]
        return prompts, settings, RowNoise(seeds, len(prompts), device)

    def _canvas(self, prompts: list[Tensor], ends: list[int]) -> Tensor:
        """Return the prompts, each followed by masks up to its end, and padded with end of sequence. [B, T]."""
        canvas = torch.full((len(prompts), max(ends)), self.tokenizer.eos_token_id, device=self.model.device)
        for row, prompt, end in zip(canvas, prompts, ends, strict=True):
            row[: len(prompt)] = prompt
            row[len(prompt) : end] = self.tokenizer.mask_token_id
        return canvas


def finished(steps: Iterator[Tensor], settings: SamplerConfig) -> BaseSamplerOutput | Tensor:
    """Return what `sample` returns, from the canvases that `steps` yields."""
    histories = []
    for canvas in steps:
        if settings.return_dict:
            histories.append(canvas.clone())
    return BaseSamplerOutput(sequences=canvas, histories=histories) if settings.return_dict else canvas


class RowNoise:
    """Random numbers of a batch: each row's from its own seed, or all from torch's global generator."""

    def __init__(self, seeds: Sequence[int] | None, rows: int, device: torch.device) -> None:
        if seeds is not None and len(seeds) != rows:
            raise ConfigError(f"{len(seeds)} seeds for {rows} prompts: expected one for each")
        self.seeded = seeds is not None
        own = [torch.Generator(device).manual_seed(seed) for seed in seeds or ()]
        self.generators: Sequence[torch.Generator | None] = own or [None] * rows  #: of each row; none is torch's

    def uniform(self, shape: tuple[int, ...], positions: Positions, dtype: torch.dtype) -> Tensor:
        """Draw uniform numbers for some positions of a canvas. shape (B, T, …), positions [B, M] → [B, M, …].

        The global generator draws the whole canvas, as dllm does; a row's own draws for the row's positions alone.
        """
        index, valid = positions
        if not self.seeded:
            drawn = torch.rand(shape, dtype=dtype, device=index.device)
            return drawn[torch.arange(len(index), device=index.device)[:, None], index]
        drawn = torch.ones(*index.shape, *shape[2:], dtype=dtype, device=index.device)
        for row, count, generator in zip(drawn, valid.sum(1).tolist(), self.generators, strict=True):
            row[:count].uniform_(generator=generator)
        return drawn

    def of_valid(
        self, values: Tensor, valid: Tensor, draw: Callable[[Tensor, torch.Generator | None], Tensor]
    ) -> Tensor:
        """Apply `draw(values [N, …], generator)` → [N] to what is valid, in order: row by row, or all at once.

        values [B, M, …], valid [B, M] bool, true at the first places of a row → [B, M], 0 where nothing is valid.
        """
        rows = [row[:count] for row, count in zip(values, valid.sum(1).tolist(), strict=True)]
        if self.seeded:
            drawn = torch.cat([draw(row, generator) for row, generator in zip(rows, self.generators, strict=True)])
        else:
            drawn = draw(torch.cat(rows), None)
        return drawn.new_zeros(valid.shape).masked_scatter(valid, drawn)


def choice(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one of V for each distribution. [N, V] → [N]."""
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def completions(canvas: Tensor, prompt_lengths: Sequence[int], new_tokens: int, ends: Sequence[int]) -> list[list[int]]:
    """Return the answers on a canvas [B, T]: at most `new_tokens` behind each prompt, up to the first of `ends`."""
    answers = []
    for row, length in zip(canvas.tolist(), prompt_lengths, strict=True):
        answer = row[length : length + new_tokens]
        answers.append(answer[: next((i for i, token in enumerate(answer) if token in ends), len(answer))])
    return answers
