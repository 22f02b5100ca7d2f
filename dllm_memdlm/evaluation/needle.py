"""Retrieval by context length: `python -m dllm_memdlm.evaluation.needle` (or `make needle`).

Trains `tiny_needle_mdlm` and `tiny_needle` from three seeds each, asks every model for the needles in texts that it has
not seen, at several lengths, with and without memory of the prompt, and writes needle.json and a table. A run that has
finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..demo import find_recipe, train, wanted_steps
from ..info import package_versions
from ..reporting import is_finished

RECIPES = {"MDLM": "tiny_needle_mdlm", "MemDLM": "tiny_needle"}
LENGTHS = (40, 80, 160, 320)  #: words; the recipe trains on 40 and 80


class Score(NamedTuple):
    """How many of the values that were asked for an answer gave."""

    method: str
    seed: int
    memory: bool
    words: int
    right: int
    asked: int


def score(
    run_dir: Path, method: str, seed: int, lengths: Sequence[int], questions: int, batch_size: int
) -> list[Score]:
    """Ask one model for the needles in the first `questions` held-out texts, at every length, memory off and on."""
    from ..data import load_rows, needle_examples
    from ..recipe import load_recipe
    from .arguments import parse

    data = load_recipe(run_dir / "recipe.yaml").data
    # The rows behind those that training evaluates on: no choice was made by looking at them.
    rows = load_rows(replace(data, eval_size=None))[1]
    rows = rows.select(range(data.eval_size, min(data.eval_size + questions, len(rows))))
    # Trained with full attention, and asked for few words: decoded as LLaDA-MoE is, in one block.
    decoders = {
        memory: parse({"pretrained": str(run_dir), "memory": memory, "sampler": "mdlm"}).open()
        for memory in ((False, True) if method == "MemDLM" else (False,))
    }
    scores = []
    for words in lengths:
        examples = needle_examples(rows, words, data.needle_count)
        for memory, decoder in decoders.items():
            tokenizer = decoder.pretrained.tokenizer
            chats = [[{"role": "user", "content": example.prompt}] for example in examples]
            prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
            right, new_tokens = 0, max(len(tokenizer(example.response)["input_ids"]) for example in examples) + 1
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                with decoder.recalled(batch):
                    answers = decoder.answers(batch, new_tokens)
                for example, answer in zip(examples[start:], answers, strict=False):
                    right += example.right(tokenizer.decode(answer, skip_special_tokens=True))
            scores.append(Score(method, seed, memory, words, right, len(examples) * data.needle_count))
    return scores


def summary(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """For each method and length the share of right values: mean and spread over the seeds."""
    rows = []
    for method, memory, words in dict.fromkeys((s.method, s.memory, s.words) for s in scores):
        shares = [s.right / s.asked for s in scores if (s.method, s.memory, s.words) == (method, memory, words)]
        spread = statistics.stdev(shares) if len(shares) > 1 else None
        rows.append(
            {"method": method, "memory": memory, "words": words, "seeds": shares}
            | {"mean": statistics.mean(shares), "stdev": spread}
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line a method, one column a length."""
    lengths = sorted({row["words"] for row in rows})
    result = Table(title="Values found, % (mean ± standard deviation over the seeds)")
    result.add_column("")
    for words in lengths:
        result.add_column(f"{words} words", justify="right")
    for method, memory in dict.fromkeys((row["method"], row["memory"]) for row in rows):
        name = method if method == "MDLM" else f"{method}, memory {'on' if memory else 'off'}"
        cells = {row["words"]: row for row in rows if (row["method"], row["memory"]) == (method, memory)}
        result.add_row(name, *(_cell(cells[words]) for words in lengths))
    return result


def _cell(row: dict[str, Any]) -> str:
    spread = "" if row["stdev"] is None else f" ± {100 * row['stdev']:.1f}"
    return f"{100 * row['mean']:.1f}{spread}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code of a training that fails."""
    parser = argparse.ArgumentParser(prog="memdlm-needle", description="Retrieval by context length.")
    parser.add_argument("--seeds", type=int, nargs="+", default=(42, 43, 44), metavar="SEED")
    parser.add_argument("--words", type=int, nargs="+", default=LENGTHS, metavar="N", help="lengths of the texts")
    parser.add_argument("--questions", type=int, default=100, metavar="N", help="texts at each length")
    parser.add_argument("--batch-size", type=int, default=20, metavar="N")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps of each run (default: the recipe's)")
    parser.add_argument("--output", type=Path, default=Path("runs/needle"), help="where to write")
    args = parser.parse_args(argv)
    console = Console(highlight=False)
    runs = []
    for seed in args.seeds:
        for method, name in RECIPES.items():
            recipe, run_dir = find_recipe(name), args.output / f"{name}-{seed}"
            if is_finished(run_dir, wanted_steps(recipe, args.steps)):
                console.print(f"{run_dir} has finished", soft_wrap=True)
            else:
                train(recipe, run_dir, args.steps, console, [f"training.seed={seed}"])
            runs.append((run_dir, method, seed))
    scores = []
    for run_dir, method, seed in track(runs, "asking", console=console):
        scores += score(run_dir, method, seed, args.words, args.questions, args.batch_size)
    rows = summary(scores)
    report = {"rows": rows, "scores": [s._asdict() for s in scores], "versions": package_versions()}
    (args.output / "needle.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(table(rows))
    console.print(str(args.output / "needle.json"), soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
