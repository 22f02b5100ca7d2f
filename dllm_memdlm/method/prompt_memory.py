"""Memory at inference (section 3.4): fast weights written on a prompt, and kept while its answer is decoded.

prompts = PromptMemory(ParametricMemory(model, at_inference(config), mask_token_id))
with prompts.recalled([prompt_ids, …]):
    answers = sampler.sample([prompt_ids, …])
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..backbones.cache import block_causal
from ..backbones.loading import weights_digest
from ..config import ConfigError, MemoryConfig
from . import noise
from .fast_weights import FastWeights
from .inner_loop import ParametricMemory
from .trajectory import Trajectory
from .windows import window_trajectory, windows_of

Text = Tensor | list[int]

#: The name of no text at all.
NOTHING = b""


def at_inference(config: MemoryConfig, **changes: Any) -> MemoryConfig:
    """Turn a training configuration into that for prompts: uniform weights, and fast weights of each prompt's own."""
    settings: dict[str, Any] = {"enabled": True, "source": "prompt", "weighting": "uniform"}
    settings |= {"scope": "sample", "sync": False}
    return replace(config, **settings, **({"dropout": 0.0, "prompt_loss": 0.0} | changes))


@dataclass
class Tally:
    """Counts what became of the prompts."""

    written: int = 0  #: memories written
    reused: int = 0  #: prompts that found theirs written already
    without: int = 0  #: prompts decoded without memory: over-long ones, and empty ones
    out_of_memory: int = 0  #: texts that the device had no room to write a memory of; decoded without
    not_finite: int = 0  #: memories whose inner loss or gradient was not finite, so decoded without

    @property
    def hit_rate(self) -> float:
        """The share of prompts that found their memory, of all that have one."""
        return self.reused / max(1, self.reused + self.written)

    def failures(self) -> str:
        """Say what was decoded without memory, and why; empty if nothing was."""
        reasons = {
            "over-long or empty": self.without,
            "no room on the device": self.out_of_memory,
            "not finite": self.not_finite,
        }
        return ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)

    def describe(self) -> str:
        """Say all of it in one line."""
        line = f"memories: {self.written} written, {self.reused} reused (hit rate {self.hit_rate:.0%})"
        return f"{line}; without: {self.failures()}" if self.failures() else line


@dataclass
class PromptMemory:
    """Writes, keeps and holds the fast weights of prompts.

    A prompt is read in windows of `memory.config.window` tokens. Its memory depends on its tokens, the seed and the
    model alone: not on the batch, nor on its place in it.

    Args:
        memory: the inner loop.
        seed: of the masks and of φ0.
        attention: who sees whom while the memory is written: every token every other (the paper), or the blocks of
            `block_size` before it and its own, as LLaDA2.1 decodes.
        fixed: one memory that was written before, for every prompt; nothing is written then.
        progress: put around the windows of a text while they are read, such as a progress bar.
    """

    memory: ParametricMemory
    seed: int = 0
    attention: Literal["full", "block_causal"] = "full"
    block_size: int = 32
    fixed: FastWeights | None = None
    progress: Callable[[list[Any]], Iterable[Any]] = iter
    tally: Tally = field(default_factory=Tally)
    _kept: dict[bytes, FastWeights] = field(default_factory=dict, repr=False)

    @contextmanager
    def recalled(self, texts: Sequence[Text | None], counted: Sequence[bool] | None = None) -> Iterator[None]:
        """Hold the memory of one text for each row of the batches to come; see `recall`."""
        with self.memory.holding(self.recall(texts, counted)):
            yield

    def recall(self, texts: Sequence[Text | None], counted: Sequence[bool] | None = None) -> FastWeights:
        """Recall the memory of each text: S = len(texts) sets, or a single one where all are the same text.

        No text, or an empty one, means no memory: φ = 0. The texts of a call are kept until the next one, so that
        prompts on the same text, one after another, share its memory. `counted` says which rows are prompts of their
        own in the tally; all of them by default.
        """
        if self.fixed is not None:
            return self.fixed
        names = [_digest(text) if text is not None and len(text) else NOTHING for text in texts]
        distinct = dict(zip(names, texts, strict=True))
        # What is not wanted any more makes room before anything is written.
        self._kept = {name: self._kept[name] for name in distinct if name in self._kept}
        missing = [name for name in distinct if name not in self._kept and name != NOTHING]
        if missing:
            to_write = [text for name, text in distinct.items() if name in missing and text is not None]
            self._kept |= zip(missing, self._write_if_it_fits(to_write), strict=True)
        if NOTHING in distinct:
            self._kept.setdefault(NOTHING, self._nothing())
        rows = [name for name, counts in zip(names, counted or [True] * len(names), strict=True) if counts]
        self.tally.reused += len(rows) - rows.count(NOTHING) - sum(name in rows for name in missing)
        self.tally.without += rows.count(NOTHING)
        if len(distinct) == 1:
            return self._kept[names[0]]
        return FastWeights.stack([self._kept[name] for name in names])

    def _write_if_it_fits(self, texts: list[Text]) -> list[FastWeights]:
        """Write, but a single text that the GPU has no room for goes without; several are left to the caller."""
        try:
            written = self._write([torch.as_tensor(text, dtype=torch.long) for text in texts])
        except torch.OutOfMemoryError:
            if len(texts) > 1:
                raise
            written = None  # and not here: the error still holds what filled the device
        if written is None:
            self.tally.out_of_memory += 1
            return [self._nothing()]
        self.tally.written += len(texts)
        return written

    def _write(self, texts: list[Tensor]) -> list[FastWeights]:
        ids = torch.tensor([int.from_bytes(_digest(text)[:8], "little", signed=True) for text in texts])
        keys = noise.example_keys(self.seed, noise.EVALUATION, ids)
        written = self.memory.write_all(self._trajectories(windows_of(texts, self.memory.config.window), keys))
        self.tally.not_finite += int((~written.finite).sum())
        return [written.fast_weights.select([row]) for row in range(len(texts))]

    def _trajectories(self, windows: list[list[Tensor]], keys: Tensor) -> Iterator[Trajectory]:
        """Make the trajectories of windows, each when its turn has come."""
        for number, rows in enumerate(self.progress(windows)):
            trajectory = window_trajectory(rows, keys, self.memory.config, number, self.memory.right_shift_logits)
            if self.attention == "block_causal":
                mask, length = trajectory.attention_mask, trajectory.input_ids.shape[1]
                if isinstance(mask, Tensor):
                    blocks = block_causal(torch.arange(length)[None], length, self.block_size)
                    trajectory.attention_mask = mask[:, None, None, :] & blocks
                else:
                    trajectory.attention_mask = self.block_size
            yield trajectory.to(self._device)

    def _nothing(self) -> FastWeights:
        """Make φ = 0."""
        key = torch.zeros(1, dtype=torch.long, device=self._device)
        return FastWeights.initial(self.memory.shapes, self.memory.config, key, self._device).keep(key.bool())

    @property
    def _device(self) -> torch.device:
        return next(self.memory.model.parameters()).device


def _digest(text: Text) -> bytes:
    return hashlib.blake2b(torch.as_tensor(text, dtype=torch.long).cpu().numpy().tobytes(), digest_size=16).digest()


def save_snapshot(
    path: str | os.PathLike[str], fast_weights: FastWeights, model: str, config: MemoryConfig, text: Text
) -> None:
    """Write one memory, with the model, the settings and the text that it belongs to.

    Raises:
        ConfigError: it cannot be written.
    """
    header = {"model": model, "weights": weights_digest(model), "memory": asdict(config)}
    try:
        fast_weights.save(path, header | {"text": _digest(text).hex(), "tokens": len(text)})
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be written ({error})") from None


def load_snapshot(
    path: str | os.PathLike[str], model: str, device: torch.device | str = "cpu"
) -> tuple[FastWeights, MemoryConfig]:
    """Read what `save_snapshot` wrote: the fast weights, on the device, and the settings they were written with.

    Raises:
        ConfigError: another file, one of another model, or one that holds several memories.
    """
    fast_weights, header = FastWeights.load(path, device)
    if not {"model", "memory"} <= header.keys() or fast_weights.samples != 1:
        raise ConfigError(f"{path}: expected the memory of one text, as --save-memory writes it")
    same_name = header["model"] == model
    written_with, weights = header.get("weights"), weights_digest(model)
    if not (written_with == weights if written_with and weights else same_name):  # a model of the hub goes by its name
        other = "the other weights that are there now" if same_name else repr(model)
        raise ConfigError(f"{path}: written with the model {header['model']!r}, not {other}")
    try:
        return fast_weights, MemoryConfig(**header["memory"])
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{path}: not the memory settings of this version ({error})") from None


def shared_prefixes(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return for each prompt the length of the prefix that its memory is written on (`memory_scope=prefix`).

    Prompts about the same document begin alike: those in alphabetical order form a group as long as what all of them
    share is at least half of the longest. A prompt without company gets its full length.
    """
    shared = [len(prompt) for prompt in prompts]
    group: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: tuple(prompts[i])):
        common = min(shared[group[0]], shared_length(prompts[group[-1]], prompts[i])) if group else 0
        group.append(i)
        if 2 * common < max(len(prompts[member]) for member in group):
            group = [i]  # it shares too little: the next group begins
            continue
        for member in group:
            shared[member] = common
    return shared


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that both begin with."""
    limit = min(len(one), len(other))
    return next((n for n in range(limit) if one[n] != other[n]), limit)
