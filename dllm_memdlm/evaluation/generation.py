"""From lm-eval's requests to answers: prompts of tokens, what the task says of its answers, and where they are cut."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ..config import ConfigError, check_types, require
from ..inference.arguments import NONE_IS_A_CHOICE, as_meant
from ..inference.decoding import Decoder, sampler_settings
from ..method.prompt_memory import shared_prefixes

_logger = logging.getLogger(__name__)

_Tokens = Annotated[int, BeforeValidator(as_meant), Field(strict=False, ge=1, description="whole number of at least 1")]
_Number = Annotated[float, Field(strict=False, description="number")]
_Texts = Annotated[str | list[Any] | tuple[Any, ...] | None, Field(description="text or a list of texts")]


@dataclass
class Asked:
    """What a task may say beside the settings of a sampler, in lm-eval's words or transformers'; numbers as text, too.

    Raises ConfigError for a value that is not what it should be.
    """

    until: _Texts = None  #: where answers end
    max_gen_toks: _Tokens | None = None
    max_new_tokens: _Tokens | None = None
    do_sample: Any = None
    temperature: _Number | None = None

    def __post_init__(self) -> None:
        for name in ("max_gen_toks", "max_new_tokens", "temperature"):
            require("gen_kwargs", self, name, not isinstance(getattr(self, name), bool), "a number")
        check_types(self, "gen_kwargs")


@dataclass
class Prompt:
    """One request to generate."""

    number: int  #: among the requests
    tokens: list[int]  #: what the model sees
    text: list[int] | None  #: what its memory is written on; see `Decoder.parts`
    new_tokens: int
    changes: dict[str, Any]  #: settings of the sampler that the task makes
    seed: int
    stops: list[str]

    @property
    def length(self) -> int:
        return len(self.tokens) + self.new_tokens

    @property
    def settings(self) -> tuple:
        """Prompts that agree here can be decoded in one batch."""
        return self.new_tokens, tuple(sorted((name, str(value)) for name, value in self.changes.items()))

    @property
    def memory(self) -> tuple:
        """Prompts that agree here can share a memory in one batch."""
        return str(self.settings), tuple(self.text or ())


def read_prompts(
    arguments: Sequence[tuple[str, dict[str, Any]]],
    names: Sequence[Any],
    encode: Callable[[str], list[int]],
    decoder: Decoder,
    default_new_tokens: int,
    seed: int,
) -> list[Prompt]:
    """Return the prompts of lm-eval's (context, generation settings) pairs.

    Of an over-long prompt the model sees the last tokens, as lm-eval's own models do. `names` tell the questions apart
    everywhere: a prompt's random numbers depend on its name, its tokens, and how often it was asked before.

    Raises:
        ConfigError: a setting is not what it should be, or the answers alone leave no room.
    """
    prompts, seen, ignored, sampler, limit = [], Counter[str](), set(), decoder.sampler, decoder.max_length
    own, words = sampler_settings(sampler), {field.name for field in fields(Asked)}
    for number, (context, settings) in enumerate(arguments):
        asked = Asked(**{name: settings[name] for name in words & settings.keys()})
        new_tokens = asked.max_gen_toks or asked.max_new_tokens or default_new_tokens
        if limit <= new_tokens:
            raise ConfigError(
                f"model_args.max_length={limit}: answers of {new_tokens} tokens leave no room for a prompt; "
                "expected a larger one, or --gen_kwargs max_gen_toks=N"
            )
        changes = {name: as_meant(value, name in NONE_IS_A_CHOICE) for name, value in settings.items() if name in own}
        ignored |= settings.keys() - changes.keys() - words
        if asked.do_sample is False:
            changes["temperature"] = 0.0
        elif "temperature" in settings or asked.do_sample:
            changes["temperature"] = 1.0 if asked.temperature is None else asked.temperature
        stops = [asked.until] if isinstance(asked.until, str) else asked.until or ()
        tokens = encode(context)
        name = str((seed, names[number], tokens))
        digest = hashlib.blake2b(f"{name} {seen[name]}".encode(), digest_size=7).digest()
        seen[name] += 1
        shown, text = decoder.parts(tokens, new_tokens)
        own_seed = int.from_bytes(digest, "little")
        stops = [str(stop) for stop in stops if stop]
        prompts.append(Prompt(number, shown, text, new_tokens, changes, own_seed, stops))
    if ignored:
        _logger.warning("ignored, as the %s sampler has no such setting: %s", sampler, ", ".join(sorted(ignored)))
    return prompts


def share_prefixes(prompts: list[Prompt]) -> None:
    """Let prompts about the same document share its memory."""
    lengths = shared_prefixes([prompt.text or [] for prompt in prompts])
    for prompt, length in zip(prompts, lengths, strict=True):
        if prompt.text is not None:
            prompt.text = prompt.text[:length]


def in_order(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Sort: longest first, so that what does not fit shows at once; prompts that share a memory side by side."""
    longest: dict[tuple, int] = {}
    for prompt in prompts:
        longest[prompt.memory] = max(longest.get(prompt.memory, 0), prompt.length)

    def place(prompt: Prompt) -> tuple:
        settings, text = prompt.memory
        return settings, -longest[prompt.memory], text, -prompt.length, prompt.number

    return sorted(prompts, key=place)


def cut(answer: str, stops: Sequence[str]) -> str:
    """Return the answer up to the first stop string in it."""
    return answer[: min((end for stop in stops if (end := answer.find(stop)) >= 0), default=len(answer))]
