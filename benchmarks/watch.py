"""Steps of a real training run, measured by a callback: the trainer's own loop, with all that it does around a step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from dllm_memdlm.backbones import staged_backbone
from dllm_memdlm.training.trainer import MemDLMTrainer

from .device import Kernel, Memory, finish, kernels, memory, waits

#: The most steps that are timed together, and the seconds after which no other one is begun.
STEPS, SECONDS = 5, 12.0
#: Steps that a run has to have: the first, those that are timed, and two that are looked at.
NEEDED = STEPS + 3


@dataclass
class Watched:
    """What training steps took. Nothing is measured of the first, which makes the optimizer."""

    first: float = 0.0  #: seconds of the first step
    seconds: float = 0.0  #: of a step, data and optimizer included, with the host free to run ahead
    host: dict[str, float] = field(default_factory=dict)  #: seconds of a step by what the host is doing
    waits: Counter[str] | None = None  #: of one step, by the line that waits
    memory: Memory | None = None  #: of one step
    kernels: list[Kernel] = field(default_factory=list)  #: of one step
    autocast: set[bool] = field(default_factory=set)  #: whether it was on in the layers, of all their passes
    faults: list[str] = field(default_factory=list)  #: what could not be looked at, and why


def watch(trainer: MemDLMTrainer, save: Callable[[Watched], None]) -> Watched:
    """Train until everything is measured; the trainer's `max_steps` must be at least NEEDED.

    `save` gets what there is after the timed steps, and after each step that is looked at. The model is left as it was
    before, without the wrapper in which accelerate trains it.
    """
    found, device = Watched(), trainer.args.device
    trainer.pop_callback(PrinterCallback)
    trainer.add_callback(_Watch(found, device, save))
    try:
        with autocast_seen(found, staged_backbone(trainer.model).layers, device):
            trainer.train()
    finally:
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        vars(trainer.model).pop("_is_accelerate_prepared", None)  # for which accelerate (1.15) would not wrap it again
    return found


@contextmanager
def autocast_seen(found: Watched, layers: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Note whether autocast is on in every pass of these layers."""
    with ExitStack() as stack:
        for layer in layers:
            hook = layer.register_forward_pre_hook(
                lambda *_: found.autocast.add(torch.is_autocast_enabled(device.type))
            )
            stack.callback(hook.remove)
        yield


class _Watch(TrainerCallback):
    """Between any two steps it does the next thing of `_measure`; when that is over, so is the run."""

    def __init__(self, found: Watched, device: torch.device, save: Callable[[Watched], None]) -> None:
        self.found, self.device, self.save = found, device, save
        self._host: Counter[str] = Counter()
        self._script = self._measure()

    def _measure(self) -> Iterator[None]:
        """Goes on with every step: what stands between two yields happens between two steps."""
        start = time.perf_counter()
        yield
        finish(self.device)
        self.found.first = time.perf_counter() - start

        self._host.clear()
        start, steps = time.perf_counter(), 0
        self._since = start
        while steps < STEPS and time.perf_counter() - start < SECONDS:
            yield
            steps += 1
        finish(self.device)
        self.found.seconds = (time.perf_counter() - start) / steps
        self.found.host = {name: seconds / steps for name, seconds in self._host.items()}

        self.save(self.found)

        with self._going_on("waits, memory"):
            with memory(self.device) as taken, waits(self.device) as waited:
                yield
            self.found.memory, self.found.waits = taken, waited
        self.save(self.found)
        with self._going_on("kernels"):
            with kernels(self.device) as listed:
                yield
            self.found.kernels = listed
        self.save(self.found)

    @contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """A tool that fails to look at a step must not cost what was timed."""
        try:
            yield
        except Exception as error:  # whatever it is
            self.found.faults.append(f"{what}: {type(error).__name__}: {error}")

    def _note(self, name: str) -> None:
        now = time.perf_counter()
        self._host[name] += now - self._since
        self._since = now

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()
        next(self._script)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("data")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("loss, gradients, clipping")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("the rest")
        control.should_training_stop = next(self._script, self) is self
