"""Exposure bias (figure 11): how much worse a model predicts from states that it has reached by itself.

R_EB(step) = L_seq / L_static, both the mean NLL (nats) of the clean tokens at a response's masked positions: L_static
on the true x_t, the clean response under a random mask; L_seq on the state that the model reached from a response of
masks, committing its most confident tokens. At every step both have as many masks.

python -m dllm_memdlm.evaluation.exposure_bias --model runs/mine --memory --output exposure_bias.json
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table

from ..cli import exit_code
from ..config import ConfigError, DataConfig
from .command import WHOSE, finish, of_a_run, read

if TYPE_CHECKING:  # what needs torch is imported where it is used: --help should not wait for it
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..inference.decoding import Decoder


class Example(NamedTuple):
    """A prompt, and the response that is masked, in token ids."""

    prompt: list[int]
    response: list[int]
    read: list[int] | None = None  #: what a memory is written on; none is the prompt

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)

    @property
    def noise_id(self) -> int:
        """The number by which its mask is drawn: of its tokens, wherever it stands among the others."""
        digest = hashlib.blake2b(str((self.prompt, self.response)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)

    def fits(self, max_length: int) -> bool:
        """Whether there is a response, and no more than `max_length` tokens."""
        return len(self.response) > 0 and self.length <= max_length


class DenoisingStep(NamedTuple):
    """One step, over all examples."""

    step: int
    masked_ratio: float  #: 1 - step/steps
    static: float  #: L_static, nats a token
    sequential: float  #: L_seq, nats a token
    tokens: int  #: masked ones, over which both are means

    @property
    def ratio(self) -> float | None:
        """R_EB; none where the model is certain of every token, so that there is nothing to divide by."""
        return self.sequential / self.static if self.static else None


class Rows(NamedTuple):
    """A batch of examples, padded on the right, and the K states that differ among its S steps."""

    clean: Tensor  #: [B, L] int64
    masks: Tensor  #: the random ones, nested; the first is the whole response [B, K, L] bool
    state_of: Tensor  #: the state of each step [S] int64
    visible: Tensor | None  #: false on padding [B, L] bool; none where there is none


class Prediction(NamedTuple):
    """What the model says of the masked tokens of a state; the last two mean nothing elsewhere."""

    nll: Tensor  #: of the clean tokens, summed [B] float64
    tokens: Tensor  #: the likeliest [B, L] int64
    confidence: Tensor  #: their probabilities [B, L]


def exposure_bias(
    decoder: Decoder, examples: Sequence[Example], steps: int = 48, batch_size: int | str = 8, seed: int = 0
) -> list[DenoisingStep]:
    """Measure R_EB at each of the steps, of which the paper has 48; the same, up to rounding, for any batches.

    With a memory, that of each example is in place in both trajectories (section 3.4). The random masks depend on the
    seed and the example's tokens alone. `batch_size` is halved where the GPU has no room; auto is as many as fit.

    Raises:
        ConfigError: there is nothing to denoise, an example does not fit, or an NLL is not finite.
    """
    from .batching import Batches

    unfit = sum(not example.fits(decoder.max_length) for example in examples)
    if steps < 1 or not examples or unfit:
        raise ConfigError(
            f"{steps} steps of {len(examples)} examples, {unfit} of which have no response or more than max_length="
            f"{decoder.max_length} tokens: expected at least one step and one example, and none such"
        )
    batches = Batches(batch_size, None, decoder.pretrained.model.device)
    longest_first = sorted(examples, key=lambda example: -example.length)
    results = batches.run(lambda batch: _denoise(decoder, batch, steps, seed), longest_first)
    static, sequential, tokens = sum(sums for _, sums in results)  # [S] each
    if not (static + sequential).isfinite().all():
        raise ConfigError("the NLL of some tokens is not finite; dtype=float32 helps where the model's has no range")
    rows = zip((static / tokens).tolist(), (sequential / tokens).tolist(), tokens.long().tolist(), strict=True)
    return [DenoisingStep(step, (steps - step) / steps, *row) for step, row in enumerate(rows)]


def _denoise(decoder: Decoder, batch: Sequence[Example], steps: int, seed: int) -> list[Tensor]:
    """Return for each example its static and sequential NLL and its masked tokens, by step [3, S]."""
    import torch

    from ..method.trajectory import smallest

    rows = _rows(decoder, batch, steps, seed)
    canvas, (masked, *later) = rows.clean, rows.masks.unbind(1)
    texts = [example.prompt if example.read is None else example.read for example in batch]
    with torch.no_grad(), decoder.recalled(texts):
        own = _predict(decoder, rows, canvas, masked)
        sums = [torch.stack([own.nll, own.nll, masked.sum(-1)], 1)]  # where all is masked, the two states are one
        for true in later:
            # The most confident, of equals the first, until as many are masked as in the true x_t
            surest = smallest(-own.confidence, masked, (masked.sum(-1) - true.sum(-1))[:, None])[:, 0]
            canvas, masked = own.tokens.where(surest, canvas), masked & ~surest
            own, static = _predict(decoder, rows, canvas, masked), _predict(decoder, rows, rows.clean, true)
            sums.append(torch.stack([static.nll, own.nll, true.sum(-1)], 1))
    return list(torch.stack(sums, -1)[..., rows.state_of].cpu())


def _rows(decoder: Decoder, batch: Sequence[Example], steps: int, seed: int) -> Rows:
    """Put a batch on the model's device. Steps that reveal nothing in any row share a state."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from ..method import noise
    from ..method.trajectory import smallest

    lengths, prompts = torch.tensor([[example.length, len(example.prompt)] for example in batch]).T[..., None]
    clean = pad_sequence([torch.tensor([*example.prompt, *example.response]) for example in batch], batch_first=True)
    place = torch.arange(clean.shape[1])
    visible = place < lengths
    counts = -(-(lengths - prompts) * torch.arange(steps, 0, -1) // steps)  # ceil(n · (1 - s/S)), in exact arithmetic
    counts, state_of = counts.unique_consecutive(dim=1, return_inverse=True)
    ids = torch.tensor([example.noise_id for example in batch])
    drawn = noise.uniform(noise.example_keys(seed, noise.EVALUATION, ids), noise.ANCHOR, clean.shape[1])
    masks, device = smallest(drawn, visible & (place >= prompts), counts), decoder.pretrained.model.device
    seen = None if visible.all() else visible.to(device)
    return Rows(clean.to(device), masks.to(device), state_of.to(device), seen)


def _predict(decoder: Decoder, rows: Rows, canvas: Tensor, masked: Tensor) -> Prediction:
    """Ask the model about a canvas [B, L] under a mask [B, L]: all see all, as in training, but for padding."""
    from ..backbones.output import token_nll, widened
    from ..method.losses import positions_of

    pretrained, positions = decoder.pretrained, positions_of(masked)
    logits = pretrained.model(
        input_ids=canvas.masked_fill(masked, pretrained.tokenizer.mask_token_id),
        attention_mask=rows.visible,
        positions=positions.logit_index(pretrained.right_shift_logits),
    ).logits
    nll = (token_nll(logits, positions.gather(rows.clean)) * positions.valid).double().sum(-1)
    logits[..., pretrained.tokenizer.mask_token_id] = -math.inf  # a mask is no answer
    sure, likeliest = widened(logits).softmax(-1).max(-1)
    tokens = canvas.scatter(1, positions.index, likeliest)
    return Prediction(nll, tokens, sure.new_zeros(canvas.shape).scatter(1, positions.index, sure))


def held_out(data: DataConfig, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Example]:
    """Return the first `count` examples that a run evaluates on, or all. Raises ConfigError where it holds none out."""
    from ..data import load_examples
    from ..data.examples import IGNORED

    rows = load_examples(data, tokenizer).eval
    if rows is None:
        raise ConfigError(f"data.eval_fraction={data.eval_fraction}: the run holds no example of {data.dataset} out")
    pairs = [(row["input_ids"], row["labels"].count(IGNORED)) for row in rows.select(range(min(count, len(rows))))]
    return [Example(tokens[:prompt], tokens[prompt:]) for tokens, prompt in pairs]


def run(args: argparse.Namespace) -> None:
    """Load, measure and write. Raises ConfigError for what the user can correct."""
    parsed, data = read(args, batch_size=args.batch_size, seed=args.seed)
    own, console = parsed.arguments, Console(highlight=False)
    if unused := parsed.sampler.keys() - {"block_size"}:  # with which memory_attention=block_causal is written
        raise ConfigError(f"{min(unused)}: a setting of the samplers, none of which is used here; steps are --steps N")
    with console.status("measuring"):
        decoder = parsed.open()
        examples = held_out(data, decoder.pretrained.tokenizer, args.examples)
        kept = [example for example in examples if example.fits(decoder.max_length)]
        whose = args.whose or ("none" if decoder.memory is None else "own")
        if whose == "none" and decoder.memory is not None:
            raise ConfigError("--whose none: expected no setting of a memory beside it")
        if whose == "other" and len(kept) < 2:
            raise ConfigError(f"--whose other: expected at least two examples, of which there are {len(kept)}")
        if whose == "other":
            kept = [own._replace(read=other.prompt) for own, other in zip(kept, [*kept[1:], *kept[:1]], strict=True)]
        # Where none is left, the others say what is wrong with them
        steps = exposure_bias(decoder, kept or examples, args.steps, own.batch_size, own.seed)
    report = {
        "model": own.adapter or own.pretrained,
        "memory": decoder.memory is not None,
        "whose": whose,
        "examples": len(kept),
        "dropped": len(examples) - len(kept),
        "seed": own.seed,
        "steps": [step._asdict() | {"ratio": step.ratio} for step in steps],
    }
    finish(args.output, report, decoder, table(steps), console)
    console.print(f"{len(kept)} examples, {report['dropped']} dropped as too long")


def table(steps: Sequence[DenoisingStep]) -> Table:
    """Show about eight of the steps, counted back from the last."""
    result = Table("step", "masked", "L_static", "L_seq", "R_EB", title="Exposure bias (nats a masked token)")
    for step in steps[:: -max(1, len(steps) // 8)][::-1]:
        cells = ("-" if value is None else f"{value:.4f}" for value in (step.static, step.sequential, step.ratio))
        result.add_row(str(step.step), f"{step.masked_ratio:.0%}", *cells)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 2 after one line about what the user can correct."""
    prog = "python -m dllm_memdlm.evaluation.exposure_bias"
    parser = of_a_run(prog, "Measure exposure bias, as in figure 11 of the paper.")
    parser.add_argument("--examples", type=int, default=64, metavar="N", help="of those it held out (default: 64)")
    parser.add_argument("--whose", choices=WHOSE, help="memory: none, of another prompt (the control), or of its own")
    parser.add_argument("--steps", type=int, default=48, metavar="N", help="of denoising (default: 48)")
    parser.add_argument("--batch-size", default="8", metavar="N", help="examples at a time, or auto (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the masks, and of the memory (default: 0)")
    args = parser.parse_intermixed_args(argv)
    if args.examples < 1 or args.steps < 1:
        parser.error(f"--examples {args.examples} --steps {args.steps}: expected at least 1 of each")
    args.memory = args.memory or args.whose in WHOSE[1:]
    return exit_code(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
