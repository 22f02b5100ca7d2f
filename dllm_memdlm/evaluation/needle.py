"""Retrieval by context length: how many planted words a model finds in texts that it has not seen.

python -m dllm_memdlm.evaluation.needle --model runs/mine --memory --words 80 160 --output needle.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..cli import exit_code
from ..config import ConfigError, DataConfig
from .command import finish, of_a_run, read

if TYPE_CHECKING:
    from ..data.needle import Needles
    from ..inference.decoding import Decoder


def held_out(data: DataConfig, words: int, questions: int) -> list[Needles]:
    """Texts of one length from the first `questions` rows behind those that training evaluates on.

    No choice was made by looking at them.

    Raises:
        ConfigError: there is no such row, or they or the needles do not fit.
    """
    from ..data import load_rows, needle_examples

    rows = load_rows(replace(data, eval_size=None))[1]
    if rows is None:
        raise ConfigError(f"data.eval_fraction={data.eval_fraction}: the run holds no row of {data.dataset} out")
    first = len(rows) if data.eval_size is None else data.eval_size
    if first >= len(rows):
        raise ConfigError(
            f"data.eval_size={data.eval_size}: training evaluates on all {len(rows)} rows it holds out; expected fewer"
        )
    if "context" not in rows.column_names:
        fields = ", ".join(rows.column_names)
        raise ConfigError(f"data.dataset={data.dataset!r}: rows with {fields}; expected HotpotQA's, with a context")
    return needle_examples(rows.select(range(first, min(first + questions, len(rows)))), words, data.needle_count)


def found(decoder: Decoder, examples: Sequence[Needles], batch_size: int) -> list[int]:
    """How many of its values each text's answer gives, with a memory of the text if the decoder has one."""
    from ..data.encoding import decode_text, encode_chat

    tokenizer = decoder.pretrained.tokenizer
    chats = [[{"role": "user", "content": example.prompt}] for example in examples]
    prompts = [encode_chat(tokenizer, chat, add_generation_prompt=True) for chat in chats]
    new_tokens = max(len(tokenizer(example.response)["input_ids"]) for example in examples) + 1
    right = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        with decoder.recalled(batch):
            answers = decoder.answers(batch, new_tokens)
        texts = (decode_text(tokenizer, answer) for answer in answers)
        right += [example.right(text) for example, text in zip(examples[start:], texts, strict=False)]
    return right


def run(args: argparse.Namespace) -> None:
    """Ask, and write what was found. Raises ConfigError for what the user can correct."""
    # Trained with full attention, and asked for few words: decoded as LLaDA-MoE is, in one block.
    parsed, data = read(args, sampler="mdlm")
    decoder = parsed.open()
    console, rows = Console(highlight=False), []
    for words in track(args.words, "asking", console=console, transient=True):
        examples = held_out(data, words, args.questions)
        right = found(decoder, examples, args.batch_size)
        rows.append({"words": words, "right": sum(right), "asked": len(right) * data.needle_count})
    report: dict[str, Any] = {"model": args.model, "memory": decoder.memory is not None, "questions": len(examples)}
    finish(args.output, report | {"scores": rows}, decoder, table(rows), console)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One column a length."""
    result = Table(title="Values found")
    for row in rows:
        result.add_column(f"{row['words']} words", justify="right")
    result.add_row(*(f"{row['right'] / row['asked']:.1%}" for row in rows))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 2 after one line about what the user can correct."""
    parser = of_a_run("python -m dllm_memdlm.evaluation.needle", "Retrieval by context length.")
    parser.add_argument("--words", type=int, nargs="+", required=True, metavar="N", help="lengths of the texts")
    parser.add_argument("--questions", type=int, default=50, metavar="N", help="texts of each length (default: 50)")
    parser.add_argument("--batch-size", type=int, default=25, metavar="N", help="texts at a time (default: 25)")
    args = parser.parse_intermixed_args(argv)
    for name in ("questions", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    return exit_code(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
