"""Answers to prompts: a trained model, the sampler that suits it, and, if wanted, a memory of each prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import Tensor

from ..backbones import DreamModel, LLaDA2MoeModelLM, staged_backbone
from ..config import ConfigError, require
from ..method.inner_loop import ParametricMemory
from ..method.prompt_memory import PromptMemory, Text, at_inference, load_snapshot
from .pretrained import Pretrained
from .samplers import DreamSampler, LLaDA2Sampler, LLaDA21Sampler, MDLMSampler, SamplerConfig, completions

SamplerName = Literal["auto", "mdlm", "llada2", "llada21", "dream"]

#: By the name that `sampler=` takes.
SAMPLERS = {"mdlm": MDLMSampler, "llada2": LLaDA2Sampler, "llada21": LLaDA21Sampler, "dream": DreamSampler}

#: What a model was made for, if not for low-confidence remasking. LLaDA2.0 has the architecture of 2.1, and no file
#: that tells it apart: it is asked for by `sampler=llada2`.
MADE_FOR: dict[type, SamplerName] = {LLaDA2MoeModelLM: "llada21", DreamModel: "dream"}

#: What the number of new tokens decides for each prompt; the rest of a sampler's settings are the user's.
PER_PROMPT = {"max_new_tokens", "max_length", "return_dict", "right_shift_logits"}

#: Settings that are the number of new tokens unless they are given, and others that differ from dllm's defaults: the
#: paper's decoding, and of Dream the one that its authors recommend, with nothing drawn.
ONE_BLOCK = {"mdlm": ("block_size", "steps"), "dream": ("steps",)}
RECOMMENDED = {"dream": {"alg": "entropy", "temperature": 0.0}}

#: Settings that name tokens.
TOKEN_LISTS = {"suppress_tokens", "begin_suppress_tokens", "cfg_keep_tokens"}


def sampler_settings(sampler: str) -> set[str]:
    """Return the settings of a sampler that a user may choose."""
    return {f.name for f in fields(SAMPLERS[sampler].CONFIG)} - PER_PROMPT


@dataclass
class Decoder:
    """Answers prompts.

    Args:
        pretrained: model and tokenizer.
        sampler: which one; auto is what the model was made for.
        settings: of the sampler. `block_size` and `steps` of the MDLM sampler default to the paper's decoding: one
            block, and as many steps as tokens; Dream's to as many steps, and the tokens of least entropy.
        memory: writes or holds the fast weights; none decodes with the model as it is.
        max_length: tokens of a prompt and its answer; what the model declares if none.
        visible: tokens of a prompt that the model sees, counted from its end; as it was trained if none.
    """

    pretrained: Pretrained
    sampler: SamplerName = "auto"
    settings: dict[str, Any] = field(default_factory=dict)
    memory: PromptMemory | None = None
    max_length: Any = None  #: an int once it is made
    visible: int | None = None
    answered: int = field(default=0, init=False)  #: answers so far
    left_masked: int = field(default=0, init=False)  #: those among them in which a mask is left

    def __post_init__(self) -> None:
        model, tokenizer = self.pretrained.model, self.pretrained.tokenizer
        if self.sampler == "auto":
            backbone = staged_backbone(model)
            self.sampler = next((name for cls, name in MADE_FOR.items() if isinstance(backbone, cls)), "mdlm")
        self._sampler = SAMPLERS[self.sampler](model, tokenizer)
        self._ends = tokenizer.eos_token_id, tokenizer.eot_token_id  # of a text, of a turn
        self.visible = self.visible or self.pretrained.visible
        self.max_length = self.max_length or model.config.max_position_embeddings
        if not isinstance(self.max_length, int) or self.max_length < 2:
            raise ConfigError(
                f"pretrained={self.pretrained.name!r}: config.json has max_position_embeddings={self.max_length!r}; "
                "expected a whole number of at least 2, or max_length=N"
            )
        window = None if self.memory is None else self.memory.memory.config.window
        if window is not None and window > self.max_length:
            raise ConfigError(
                f"memory.window={window}: expected at most max_length={self.max_length}, the "
                "tokens that the model takes at a time"
            )
        self.config_for(1)  # a wrong setting is refused before anything is decoded

    def config_for(self, new_tokens: int, **changes: Any) -> SamplerConfig:
        """Return the sampler's settings for answers of `new_tokens`. Raises ConfigError for one that does not fit."""
        usual = {**dict.fromkeys(ONE_BLOCK.get(self.sampler, ()), new_tokens), **RECOMMENDED.get(self.sampler, {})}
        if hasattr(self._sampler.CONFIG, "right_shift_logits"):
            usual["right_shift_logits"] = self.pretrained.right_shift_logits
        config = self._sampler.CONFIG.of(None, {**usual, "max_new_tokens": new_tokens, **self.settings, **changes})
        vocabulary = self.pretrained.model.config.vocab_size
        for name in TOKEN_LISTS:
            known = all(0 <= token < vocabulary for token in getattr(config, name, None) or ())
            require("sampler", config, name, known, f"tokens below the vocabulary's size, {vocabulary}")
        return config

    @property
    def reads_windows(self) -> bool:
        """Whether a memory reads texts of any length."""
        return self.memory is not None and self.memory.memory.config.window is not None

    def parts(self, prompt: list[int], new_tokens: int) -> tuple[list[int], list[int] | None]:
        """Return what the model sees of a prompt beside an answer of `new_tokens`, and what a memory is written on.

        It sees the last tokens: as many as there is room for, or `visible` of them. Of a prompt that leaves no room for
        the answer only a memory that reads windows is written.
        """
        room = max(0, self.max_length - new_tokens)
        seen = room if self.visible is None else min(room, self.visible)
        text = prompt if len(prompt) <= room or self.reads_windows else None
        return prompt[max(0, len(prompt) - seen) :], text

    def recalled(
        self, texts: Sequence[Text | None], counted: Sequence[bool] | None = None
    ) -> AbstractContextManager[None]:
        """Hold the memory of these texts in the model, if there is a memory. See `PromptMemory.recall`."""
        return nullcontext() if self.memory is None else self.memory.recalled(texts, counted)

    def stream(
        self, prompts: Sequence[Text], new_tokens: int, seeds: Sequence[int] | None = None, **changes: Any
    ) -> Iterator[Tensor]:
        """Yield the canvas [B, T] before the first step and after each one. See `CanvasSampler.steps`."""
        for canvas in self._sampler.steps(prompts, self.config_for(new_tokens, **changes), seeds):
            yield canvas
        self._count(completions(canvas, [len(prompt) for prompt in prompts], new_tokens, self._ends))

    def answers(
        self,
        prompts: Sequence[Text],
        new_tokens: int,
        seeds: Sequence[int] | None = None,
        *,
        whole: bool = False,
        **changes: Any,
    ) -> list[list[int]]:
        """Return the tokens that follow each prompt: all of them, or up to the end of the text or of the turn."""
        if self.pretrained.right_shift_logits:  # the first token is predicted from what stands before it
            prompts = [prompt if len(prompt) else [self.pretrained.tokenizer.bos_token_id] for prompt in prompts]
        canvas = self._sampler.sample(prompts, self.config_for(new_tokens, **changes), seeds)
        answers = completions(canvas, [len(prompt) for prompt in prompts], new_tokens, () if whole else self._ends)
        if not whole:
            self._count(answers)
        return answers

    def unfinished(self) -> str:
        """Say how many answers have masks left in them, and what to do about it; nothing if none has."""
        if not self.left_masked:
            return ""
        return (
            f"{self.left_masked} of {self.answered} answers have masks left, which the model chose as tokens and the "
            f"text leaves out; suppress_tokens=[{self.pretrained.tokenizer.mask_token_id}] keeps it from that"
        )

    def _count(self, answers: list[list[int]]) -> None:
        self.answered += len(answers)
        self.left_masked += sum(self.pretrained.tokenizer.mask_token_id in answer for answer in answers)


def memory_for(
    pretrained: Pretrained, changes: dict[str, Any], snapshot: str | None = None, **settings: Any
) -> PromptMemory:
    """Return a memory of prompts with the settings the model was trained with, but for `changes`; or a saved one.

    Args:
        pretrained: the model.
        changes: `MemoryConfig` fields that differ.
        snapshot: a file that holds the fast weights for all prompts; its own settings stand.
        settings: of `PromptMemory`.

    Raises:
        ConfigError: the settings, or the snapshot, do not fit the model.
    """
    fast_weights, config = None, at_inference(pretrained.memory, **changes)
    if snapshot is not None:
        if changes:
            raise ConfigError(f"{snapshot} brings its memory settings along; give no others ({', '.join(changes)})")
        device = next(pretrained.model.parameters()).device
        fast_weights, config = load_snapshot(snapshot, pretrained.name, device)
    mask, shift = pretrained.tokenizer.mask_token_id, pretrained.right_shift_logits
    memory = ParametricMemory(pretrained.model, config, mask, right_shift_logits=shift)
    if fast_weights is not None:
        memory.check(fast_weights)
    return PromptMemory(memory, fixed=fast_weights, **settings)
