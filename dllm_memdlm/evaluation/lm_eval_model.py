"""The lm-evaluation-harness model `memdlm`: a masked diffusion model, with or without a memory of the prompt.

lm_eval --model memdlm --model_args pretrained=runs/mine,memory=true --tasks ruler_vt
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import accelerate
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from ..data.encoding import decode_text, turn_of
from ..inference.arguments import parse
from .batching import Batches
from .generation import Prompt, cut, in_order, read_prompts, share_prefixes
from .likelihood import Masked, log_likelihoods, states
from .texts import Pair, Texts

# lm-eval shows the messages of its own loggers only.
_logger = logging.getLogger("lm_eval.models.memdlm")


class MemDLMEvalLM(LM):
    """What it takes is declared in `EvalArguments`.

    The same seed gives the same answers for every batch size and number of processes, up to rounding; with
    `memory_scope=prefix` what is shared depends on the prompts that a process is given.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        with _random_state_kept():  # tasks such as RULER's draw their data after this
            parsed = parse(arguments)
            self.arguments = parsed.arguments
            state = accelerate.PartialState(cpu=not torch.cuda.is_available())
            self._rank, self._world_size = state.process_index, state.num_processes
            # lm-eval leaves the group open, and gloo's threads may abort at the end
            atexit.register(state.destroy_process_group)
            self.decoder = parsed.open(state.device if self._world_size > 1 else None)
        self.pretrained, self.memory = self.decoder.pretrained, self.decoder.memory
        self.tokenizer, self.max_length = self.pretrained.tokenizer, self.decoder.max_length
        self.texts = Texts(self.tokenizer, self.pretrained.template)
        self._device = self.pretrained.model.device
        self.batches = Batches(self.arguments.batch_size, self.arguments.max_batch_size, self._device)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Decode an answer to every prompt, and cut it at the first of its stop strings."""
        arguments = [request.args for request in requests]
        prompts = read_prompts(
            arguments,
            [(request.task_name, request.doc_id, request.idx) for request in requests],
            lambda context: self.texts.context(context).ids,
            self.decoder,
            self.arguments.max_gen_toks,
            self.arguments.seed,
        )
        for prompt in prompts:  # a wrong setting is refused before anything is decoded
            self.decoder.config_for(prompt.new_tokens, **prompt.changes)
        if self.arguments.memory_scope == "prefix":
            share_prefixes(prompts)  # of this process alone: others may have theirs from lm-eval's cache
        answers = [""] * len(prompts)
        for prompt, answer in self._answers(prompts, "decoding", disable_tqdm):
            text = cut(turn_of(self.tokenizer, decode_text(self.tokenizer, answer)), prompt.stops)
            answers[prompt.number] = text
            self.cache_hook.add_partial("generate_until", arguments[prompt.number], text)
        self._report()
        return answers

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Estimate the log-likelihood of each continuation (nats), and whether decoding would give it."""
        pairs = [self.texts.pair(*request.args) for request in requests]
        if empty := sum(not continuation for _, continuation in pairs):
            _logger.warning("%d of %d continuations are empty, and score 0", empty, len(pairs))
        values = self._log_likelihoods(pairs, "likelihood", disable_tqdm)
        greedy = self._is_greedy(pairs, disable_tqdm) if self.arguments.check_greedy else [False] * len(pairs)
        results = list(zip(values, greedy, strict=True))
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        self._report()
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Estimate the log-likelihood of whole texts, in windows of `max_length`. There is no prompt to adapt to."""
        pairs, owners = list[Pair](), list[int]()
        for number, request in enumerate(requests):
            tokens = self.texts.whole(request.args[0])
            windows = get_rolling_token_windows(tokens, self.texts.first(), self.max_length - 1, context_len=1)
            pairs += map(make_disjoint_window, windows)
            owners += [number] * (len(pairs) - len(owners))
        totals = [0.0] * len(requests)
        values = self._log_likelihoods(pairs, "rolling", disable_tqdm, adapt=False)
        for owner, value in zip(owners, values, strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the chat as text. From here on contexts are such texts; see `texts`."""
        return self.texts.render(chat_history, begun=not add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template that is used from here on; true is the usual one. lm-eval keeps it with the results."""
        if not chat_template:
            return None
        return self.texts.use_template(chat_template if isinstance(chat_template, str) else "default")

    def get_model_info(self) -> dict[str, Any]:
        """Return settings, and what became of this process's memories; lm-eval keeps it with the results."""
        model = self.pretrained.model
        info: dict[str, Any] = {
            "model_num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "model_dtype": str(model.dtype),
            "max_length": self.max_length,
            "visible": self.decoder.visible,
            "sampler": self.decoder.sampler,
            "sampler_settings": self.decoder.settings,
            "answers_left_masked": self.decoder.left_masked,
        }
        if self.memory is not None:
            info["memory"] = dataclasses.asdict(self.memory.memory.config)
            info["memory_tally"] = dataclasses.asdict(self.memory.tally) | {"hit_rate": self.memory.tally.hit_rate}
        return info

    def all_gather(self, tensor: Tensor) -> Tensor:
        return accelerate.utils.gather(tensor.reshape(-1)) if self.world_size > 1 else tensor

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return what every process has, on process `dst`; none on the others."""
        gathered = accelerate.utils.gather_object([obj]) if self.world_size > 1 else [obj]
        return gathered if self.rank == dst else None

    def barrier(self) -> None:
        accelerate.PartialState().wait_for_everyone()

    def _answers(
        self, prompts: Sequence[Prompt], title: str, quiet: bool, whole: bool = False
    ) -> Iterable[tuple[Prompt, list[int]]]:
        """Decode; give each prompt with the tokens that follow it: with `whole` all, else up to the end of the text."""

        def decode(batch: list[Prompt]) -> list[list[int]]:
            first, tokens, seeds = batch[0], [prompt.tokens for prompt in batch], [prompt.seed for prompt in batch]
            with self.decoder.recalled([prompt.text for prompt in batch]):
                return self.decoder.answers(tokens, first.new_tokens, seeds, whole=whole, **first.changes)

        def alike(prompt: Prompt) -> tuple:
            return prompt.settings, prompt.text if self.arguments.memory_scope == "prefix" else None

        results = self.batches.run(decode, in_order(prompts), alike)
        return tqdm(results, title, total=len(prompts), disable=quiet or self.rank != 0)

    def _log_likelihoods(self, pairs: Sequence[Pair], title: str, quiet: bool, adapt: bool = True) -> list[float]:
        items, texts = list[Masked](), []
        for number, (context, continuation) in enumerate(pairs):
            kept = continuation[-self.max_length :]
            seen, text = self.decoder.parts(context, len(kept))
            texts.append(text)
            items += states(number, seen, kept, self.arguments.mc_num, self.arguments.seed)
        items.sort(key=lambda item: (-item.length, item.prompt, item.request))
        counted: set[int] = set()  #: requests that the memory's tally has seen
        adapt = adapt or (self.memory is not None and self.memory.fixed is not None)

        def score(batch: list[Masked]) -> list[float]:
            requests = [item.request for item in batch]
            first = [number not in requests[:row] and number not in counted for row, number in enumerate(requests)]
            counted.update(requests)
            with self.decoder.recalled([texts[number] for number in requests], first) if adapt else nullcontext():
                mask, shift = self.tokenizer.mask_token_id, self.pretrained.right_shift_logits
                return log_likelihoods(self.pretrained.model, batch, mask, shift)

        totals = [0.0] * len(pairs)
        results = self.batches.run(score, items)
        for item, value in tqdm(results, title, total=len(items), disable=quiet or self.rank != 0):
            totals[item.request] += value
        return totals

    def _is_greedy(self, pairs: Sequence[Pair], quiet: bool) -> list[bool]:
        """Tell whether the tokens that decoding gives are those of the continuation."""
        prompts = []
        for number, (context, continuation) in enumerate(pairs):
            seen, text = self.decoder.parts(context, len(continuation))
            prompts.append(Prompt(number, seen, text, len(continuation), {"temperature": 0.0}, seed=0, stops=[]))
        decoded = self._answers([prompt for prompt in prompts if prompt.new_tokens], "greedy", quiet, whole=True)
        found = {prompt.number: answer for prompt, answer in decoded}
        return [found.get(number, []) == continuation for number, (_, continuation) in enumerate(pairs)]

    def _report(self) -> None:
        if self.memory is not None:
            _logger.info("rank %d: %s", self.rank, self.memory.tally.describe())
        if left := self.decoder.unfinished():
            _logger.warning("rank %d: %s", self.rank, left)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Let Python's, numpy's and torch's global generators go on as if nothing had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):  # no task draws on a GPU
        yield
    random.setstate(python)
    np.random.set_state(numpy)
