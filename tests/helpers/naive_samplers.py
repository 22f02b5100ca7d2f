"""Decoding written plainly, to compare with: one prompt, full forwards, logits everywhere, loops over positions.

It shares no code with the package's samplers. Only the random numbers come from torch's generators, drawn in the same
order: a sampler is free in that, and its tokens depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from conftest import EOS, MASK, VOCABULARY, tiny
from torch import Tensor, nn

Canvas = list[int]
#: α(t): the probability that a token is still clean at time t. In float32, as dllm computes it: 10 masks over 4 steps
#: are 2.5, and the last digit of 1 - s/t decides whether the first step reveals 2 or 3.
Schedule = Callable[[Tensor], Tensor]


def linear(t: Tensor) -> Tensor:
    return 1 - t


def cosine(t: Tensor) -> Tensor:
    return 1 - torch.cos(math.pi / 2 * (1 - t))


def moves(canvases: list[Canvas]) -> list[Canvas]:
    """Without the steps that changed nothing."""
    return [canvas for i, canvas in enumerate(canvases) if i == 0 or canvas != canvases[i - 1]]


def of_row(histories: list[Tensor], row: int, length: int) -> list[Canvas]:
    """The canvases of one row of a batch without its padding, and without the steps in which it stood still."""
    canvases = [canvas[row].tolist() for canvas in histories]
    assert all(set(canvas[length:]) <= {EOS} for canvas in canvases)
    return moves([canvas[:length] for canvas in canvases])


def assert_every_step(sampler: Any, naive: Callable[[int | None], Any], settings: Any, drawn: bool) -> None:
    """The sampler goes step by step as the plain one of a seed, and by the seed where something is `drawn`.

    Alone with torch's global generator, in the order in which dllm draws from it; in a batch each row with its seed.
    """
    inputs, seeds, new = prompts(9, 4, 12), [7, 8, 7], settings.max_new_tokens
    torch.manual_seed(5)
    expected = naive(None).sample(inputs[0], new)
    torch.manual_seed(5)
    output = sampler.sample(inputs[:1], settings)
    assert [canvas.tolist() for canvas in output.histories] == [[canvas] for canvas in expected]
    assert output.sequences.tolist() == [expected[-1]]
    assert settings.temperature > 0 or MASK not in expected[-1]
    assert len(set(expected[-1][9:])) > 2, "a canvas of one token would hide mistakes"

    together = sampler.sample(inputs, settings, seeds)
    assert together.sequences.shape == (3, 12 + new)
    for row, (prompt, seed) in enumerate(zip(inputs, seeds, strict=True)):
        assert of_row(together.histories, row, len(prompt) + new) == moves(naive(seed).sample(prompt, new))
    if drawn:
        others = sampler.sample(inputs, settings, [1, 2, 3])
        assert [h.tolist() for h in others.histories] != [h.tolist() for h in together.histories]


def assert_filled_in(sampler: Any, naive: Callable[[int | None], Any], settings: Any, seeded: bool) -> None:
    """Masks are filled in as by the plain sampler of a seed; in a prompt that is only followed they are text, and stay.

    dllm fills in the masks of a prompt in place of as many of the answer.
    """
    inputs, new = prompts(14, 6, 9), settings.max_new_tokens
    for row in inputs:
        row[2:5] = [MASK] * 3
    inputs[0][8:13] = [MASK] * 5
    inputs[2][0] = MASK
    for batch in [inputs] if seeded else [[row] for row in inputs]:
        seeds, longest = [3, 4, 5] if seeded else None, max(map(len, batch))
        for way in ("infill", "sample"):
            torch.manual_seed(2)
            output = getattr(sampler, way)(batch, settings, seeds)
            for row, canvas in enumerate(batch):
                torch.manual_seed(2)
                plain, length = naive(seeds and seeds[row]), len(canvas) + new * (way == "sample")
                expected = plain.infill(canvas, longest) if way == "infill" else plain.sample(canvas, new)
                assert of_row(output.histories, row, length) == moves(expected)
                kept = {i for i, token in enumerate(canvas) if way == "sample" or token != MASK}
                assert all(expected[-1][i] == canvas[i] for i in kept)
                filled = {token for i, token in enumerate(expected[-1]) if i not in kept}
                assert settings.temperature > 0 or MASK not in filled


def prompts(*lengths: int) -> list[Canvas]:
    """Random prompts without special tokens."""
    drawn = {"generator": torch.Generator("cpu").manual_seed(1), "device": "cpu"}  # the same ones on every device
    return [torch.randint(3, VOCABULARY, (length,), **drawn).tolist() for length in lengths]


def decoder(kind: str, dtype: torch.dtype = torch.float64, **dimensions: Any) -> nn.Module:
    """A tiny backbone whose answers vary; never chooses the mask.

    In float64, where no two confidences are so close that the order of a sum decides.
    """
    model = tiny(kind, dtype, **dimensions).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[MASK] = 0
        # What a masked position predicts should come from where it looks, and it should look at few positions.
        model.get_input_embeddings().weight[MASK] *= 0.1
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "q_norm.weight", "query_layernorm.weight")):
                parameter *= 8
    return model


class Draws:
    """Random numbers for some positions of a canvas: from a seed, or from torch's global generator.

    The global one draws for every position, and those that are not asked for are thrown away.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def uniform(self, length: int, positions: list[int], *width: int, dtype: torch.dtype) -> Tensor:
        """[positions, *width]."""
        if self.generator is None:
            return torch.rand(length, *width, dtype=dtype)[positions]
        return torch.rand(len(positions), *width, dtype=dtype, generator=self.generator)

    def binomial(self, count: int, probability: float) -> int:
        n, p = torch.tensor([count, probability], dtype=torch.float64)
        return int(torch.binomial(n, p, generator=self.generator))

    def token(self, probabilities: Tensor) -> list[int]:
        """One token for each distribution [M, V]."""
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0].tolist()


def reveal_counts(masked: int, steps: int, schedule: Schedule, draws: Draws | None) -> list[int]:
    """How many of a block's masks each step reveals; steps that reveal none do not take place."""
    counts, left = [], masked
    for step in range(steps):
        if left == 0:
            break
        before, after = torch.tensor((steps - step) / steps), torch.tensor((steps - step - 1) / steps)
        share = 1 - ((1 - schedule(after)) / (1 - schedule(before))).item()
        count = round(left * share) if draws is None else draws.binomial(left, share)
        count = min(count, left)
        left -= count
        if count > 0:
            counts.append(count)
    return counts


@torch.no_grad()
def full_logits(model: nn.Module, canvas: Canvas, visible: Tensor | None = None) -> Tensor:
    """Logits everywhere [L, V]; `visible` [L, L] says which position sees which."""
    mask = None if visible is None else visible[None, None]
    return model(input_ids=torch.tensor([canvas]), attention_mask=mask).logits[0]


class Denoiser:
    """Fills in one canvas. Settings are those of `MDLMSamplerConfig`."""

    def __init__(self, model: nn.Module, settings: Any, mask: int, schedule: Schedule, draws: Draws) -> None:
        self.model, self.settings, self.mask, self.schedule, self.draws = model, settings, mask, schedule, draws

    def sample(self, prompt: Canvas, new: int) -> list[Canvas]:
        """The canvas before the first step and after each one."""
        width = self.settings.block_size or new
        starts = range(len(prompt), len(prompt) + new, width)
        blocks = [(start, min(start + width, len(prompt) + new)) for start in starts]
        # A mask that an earlier block has left may be filled in too; not so in our approximations.
        exact = self.settings.cache == "none" and self.settings.threshold is None
        canvas = prompt + [self.mask] * new
        return self.fill(canvas, [(start, end, len(prompt) if exact else start, end) for start, end in blocks])

    def infill(self, canvas: Canvas, longest: int) -> list[Canvas]:
        """The same for the masks of a canvas, blocks counted from its start in a batch of that length."""
        width = self.settings.block_size or longest
        bounds = [(min(first, len(canvas)), min(first + width, len(canvas))) for first in range(0, longest, width)]
        return self.fill(canvas, [(start, end, start, end) for start, end in bounds])

    def fill(self, canvas: Canvas, blocks: list[tuple[int, int, int, int]]) -> list[Canvas]:
        settings = self.settings
        canvas, keep = list(canvas), settings.cfg_keep_tokens or []
        hidden = [i for i, token in enumerate(canvas) if token != self.mask and token not in keep]
        history = [list(canvas)]
        for start, end, low, high in blocks:
            steps = math.ceil(settings.steps / len(blocks))
            masked = canvas[start:end].count(self.mask)
            counts = reveal_counts(masked, steps, self.schedule, self.draws if settings.stochastic_transfer else None)
            with outside_as_first_seen(self.model, settings, start, end) as forward:
                for count in [None] * (end - start) if settings.threshold is not None else counts:
                    open_positions = [i for i in range(low, high) if canvas[i] == self.mask]
                    if not open_positions:
                        break
                    found = self.propose(forward, canvas, open_positions, hidden)
                    surest = sorted(found, key=lambda i: found[i][0], reverse=True)
                    if count is None:
                        chosen = [i for i in surest if found[i][0] > settings.threshold] or surest[:1]
                    else:
                        chosen = surest[:count]
                    for i in chosen:
                        canvas[i] = found[i][1]
                    history.append(list(canvas))
        return history

    def propose(
        self, forward: Callable[[Canvas, int], Tensor], canvas: Canvas, positions: list[int], hidden: list[int]
    ) -> dict[int, tuple[float, int]]:
        """Confidence and token of each position."""
        settings = self.settings
        logits = forward(canvas, 0)
        if settings.cfg_scale > 0:
            unguided = forward([self.mask if i in hidden else token for i, token in enumerate(canvas)], 1)
            logits = unguided + (settings.cfg_scale + 1) * (logits - unguided)
        uniform, sure = None, None
        if settings.temperature > 0:
            uniform = self.draws.uniform(len(canvas), positions, logits.shape[1], dtype=torch.float64)
        if settings.remasking == "random":
            sure = self.draws.uniform(len(canvas), positions, dtype=torch.float32)
        found = {}
        for number, position in enumerate(positions):
            row = logits[max(position - 1, 0) if settings.right_shift_logits else position].double().clone()
            # With a threshold a block goes on until it has no mask left, so the mask is no answer.
            endless = [] if settings.threshold is None else [self.mask]
            for token in [*(settings.suppress_tokens or []), *endless]:
                row[token] = -math.inf
            noised = row if uniform is None else row.exp() / (-uniform[number].log()) ** settings.temperature
            token = int(noised.argmax())
            for other in settings.begin_suppress_tokens or []:
                row[other] = -math.inf
            confidence = float(row.softmax(0)[token]) if sure is None else float(sure[number])
            found[position] = (confidence, token)
        return found


@contextmanager
def outside_as_first_seen(
    model: nn.Module, settings: Any, start: int, end: int
) -> Iterator[Callable[[Canvas, int], Tensor]]:
    """A forward, for a guided or an unguided pass, of one block's steps.

    With `cache` the positions outside of the block (dual), or before it (prefix), are to every layer what they were in
    the first step: that is what keeping their keys and values comes to.
    """
    shift = int(settings.right_shift_logits)  # a block's first token is predicted at the position before it
    first: dict[tuple[int, int], Tensor] = {}
    which = 0

    def frozen(index: int) -> Callable[..., tuple[Tensor, ...]]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, *rest = inputs
            if (which, index) not in first:
                first[which, index] = hidden.clone()
                return inputs
            seen = first[which, index].clone()
            until = end if settings.cache == "dual" else hidden.shape[1]
            seen[:, start - shift : until] = hidden[:, start - shift : until]
            return (seen, *rest)

        return hook

    def forward(canvas: Canvas, branch: int) -> Tensor:
        nonlocal which
        which = branch
        return full_logits(model, canvas)

    with ExitStack() as stack:
        if settings.cache != "none":
            for index, layer in enumerate(model.layers):
                stack.callback(layer.register_forward_pre_hook(frozen(index)).remove)
        yield forward
