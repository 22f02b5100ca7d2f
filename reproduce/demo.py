"""Train one small model in three ways on documents longer than what it sees, then ask it: `python -m reproduce.demo`.

Trained and scored by the commands of `make reproduce-documents SCALE=demo`; then the last model is asked live about
three documents that neither training nor the scores have seen, without a memory and with it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dllm_memdlm.cli import exit_code
from dllm_memdlm.config import ConfigError

from .documents import WAYS, WHOSE, cases
from .needle import PLACES, Planted, held_out, plant
from .scales import DEMO
from .steps import Step

if TYPE_CHECKING:
    from dllm_memdlm.inference.conversation import Conversation

DOCUMENTS, WORDS = 3, 40
#: Of every training, for --quick: too few to learn anything.
QUICK = ("training.max_steps=30", "training.eval_steps=15", "training.save_steps=30", "data.eval_size=20")
LEGEND = "✓ right, ✗ wrong; * the model does not see this word: it is given the end of a document alone"


def train(runs: Path, quick: bool) -> None:
    """Run what has not been run yet, and draw it. Raises ConfigError where a command fails."""
    command = [sys.executable, "-m", "reproduce", "documents", "--scale", DEMO.name, "--runs", str(runs)]
    command += ["--reports", str(runs / "report"), *(["--set", *QUICK] if quick else [])]
    if subprocess.run(command, check=False).returncode:
        raise ConfigError(f"not all of it could be run; what was printed is in {runs}/*/*/*/log.txt")


def scores(points: Path) -> Table:
    """Show the right answers to what a model sees, and to what it does not, by the memory in place."""
    caption = "A guess is right in 8 %. The memory of another text is the control."
    table = Table("trained", "memory", title="Right answers, %", caption=caption)
    table.add_column("seen", justify="right")
    table.add_column("not seen", justify="right")
    asked = pd.read_json(points, lines=True).dropna(subset="place")
    means = asked.groupby(["way", "whose", "place"]).score.mean()
    for way in WAYS:
        for whose, name in WHOSE.items():
            cells = (f"{means[way, whose, place]:.0f}" for place in PLACES)
            table.add_row(way if whose == "none" else "", name, *cells, end_section=whose == "own")
    return table


def marked(answer: str, planted: Planted, visible: set[str]) -> Text:
    """Return what an answer names, marked right or wrong."""
    named, right, text = planted.named(answer), planted.right(answer), Text()
    for key in planted.values:
        said = f"{key} {named.get(key, '-')}{'' if key in visible else '*'} {'✓' if key in right else '✗'}  "
        text.append(said, "green" if key in right else "red")
    return text


def ask(conversation: Conversation, planted: Planted, question: str, label: str, out: Console) -> None:
    """Decode an answer, on a terminal as it is unmasked, and mark it."""
    head, answer = Text(f"{label:12}"), ""
    with Live(console=out, refresh_per_second=20, transient=True) as live:
        for tokens in conversation.ask(question):
            answer = conversation.text_of(tokens, mask="░")
            live.update(head + Text(answer))
    prompt = conversation.prompt(question, [])
    seen, _ = conversation.decoder.parts(prompt, conversation.new_tokens)
    out.print(head + marked(answer, planted, planted.planted_in(conversation.text_of(seen))), soft_wrap=True)


def talk(run: Step, document: Path, out: Console) -> None:
    """Ask a model about the documents behind those that it was scored on, and say how to go on."""
    from dllm_memdlm.inference.arguments import parse
    from dllm_memdlm.inference.conversation import Conversation
    from dllm_memdlm.training.recipe import FILE_NAME, load_recipe

    recipe = load_recipe(run.folder / FILE_NAME)
    haystacks = held_out(recipe.data, DEMO.questions + DOCUMENTS)[-DOCUMENTS:]
    decoders = {
        label: parse({"pretrained": str(run.folder), "memory": memory, "sampler": "mdlm"}).open()
        for label, memory in (("memory off", False), ("memory on", True))
    }
    tokenizer = next(iter(decoders.values())).pretrained.tokenizer
    for haystack in haystacks:
        planted = plant(haystack, WORDS)
        text, question = planted.prompt.rsplit("\n\n", 1)
        out.print(f"\n[bold]{text}[/bold]\n[dim]{question}[/dim]", soft_wrap=True)
        new_tokens = len(tokenizer(planted.response)["input_ids"]) + 1
        for label, decoder in decoders.items():
            ask(Conversation(decoder, text, new_tokens), planted, question, label, out)
    document.write_text(text, encoding="utf-8")
    out.print(f"\n{LEGEND}\n", soft_wrap=True)
    line = f'memdlm generate --model {run.folder} --prompt-file {document} --question "{question}" --memory'
    more = "make reproduce-documents   # a model of four layers, with three seeds, and error bars"
    out.print(f"To go on:\n  {line}\n  {more}", soft_wrap=True)


def run(args: argparse.Namespace) -> None:
    """Train, show, ask. Raises ConfigError for what the user can correct."""
    out, runs = Console(highlight=False), args.runs / "quick" if args.quick else args.runs
    train(runs, args.quick)
    report = runs / "report" / f"documents-{DEMO.name}"
    out.print(scores(report.with_suffix(".jsonl")), f"\n{report.with_suffix('.png')}", sep="\n", soft_wrap=True)
    settings = QUICK if args.quick else ()
    scale = replace(DEMO, runs=runs, settings=(*DEMO.settings, *settings))
    trained = next(case.step for case in cases(scale) if case.labels == {"way": [*WAYS][-1], "seed": DEMO.seeds[0]})
    talk(trained, runs / "document.txt", out)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 2 after one line about what the user can correct."""
    parser = argparse.ArgumentParser(prog="reproduce.demo", description="A memory of documents longer than the window.")
    parser.add_argument("--quick", action="store_true", help="two minutes: shows how it goes, and learns nothing")
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
