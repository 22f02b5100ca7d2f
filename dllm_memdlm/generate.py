"""Ask a trained model about a document, and watch it unmask the answer.

python -m dllm_memdlm.generate --model runs/mine --prompt-file doc.txt --question "Who wrote it?" --memory
python -m dllm_memdlm.generate --model runs/mine --prompt-file book.txt --chat --memory --window 4096
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import track
from rich.text import Text

from .cli import check_writable, exit_code
from .config import ConfigError

#: Ends a chat, beside the end of the input.
GOODBYE = ("/exit", "/quit")


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Exits with 2 where it makes no sense."""
    parser = argparse.ArgumentParser(prog="memdlm generate", description="Ask a model about a document.")
    parser.add_argument("--model", required=True, metavar="DIR", help="a run's folder, a hub name, or an adapter")
    parser.add_argument("--adapter", metavar="DIR", help="a PEFT adapter for the model")
    parser.add_argument("--prompt-file", metavar="FILE", help="the document; - reads it from the standard input")
    parser.add_argument("--question", metavar="TEXT", help="what to ask")
    parser.add_argument("--chat", action="store_true", help="keep asking: a question a line, until the input ends")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of an answer (default: 128)")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--memory", action="store_true", help="adapt to the document before answering")
    memory.add_argument("--window", type=int, metavar="N", help="read so many tokens at a time, a text of any length")
    either = memory.add_mutually_exclusive_group()
    either.add_argument("--save-memory", metavar="FILE", help="adapt, and keep the fast weights (.safetensors)")
    either.add_argument("--load-memory", metavar="FILE", help="use what --save-memory kept; nothing is adapted")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="name=value",
        help="settings of the sampler (temperature=0.7 steps=64), of the memory (memory_inner_lr=0.05), and dtype, "
        "device, seed, max_length: the names that lm_eval --model memdlm takes",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_intermixed_args(argv)
    if args.question is None and not args.chat:
        parser.error("nothing to ask: give --question or --chat")
    if args.chat and args.prompt_file == "-":
        parser.error("--chat reads the questions from the standard input: --prompt-file cannot be -")
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {args.max_new_tokens}: expected at least 1")
    if args.save_memory and args.prompt_file is None and args.question is None:
        parser.error("--save-memory: nothing to remember; give --prompt-file or --question")
    if args.window is not None:
        if not (args.memory or args.save_memory):
            parser.error("--window: it is how a memory reads; give --memory or --save-memory, too")
        args.settings.append(f"memory_window={args.window}")
    if args.memory and args.load_memory:
        parser.error("--memory adapts, --load-memory uses what was kept: give one of them")
    return args


def read_document(path: str | None, question: str | None) -> str:
    """Return the document, or nothing. Raises ConfigError where it or the question is no text, or both say nothing."""
    what, text, advice = f"--question {question!r}", question, ", or a document in --prompt-file"
    try:
        (question or "").encode()
        if path is not None:
            what, advice = f"--prompt-file {path}", ""
            text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except UnicodeError:
        raise ConfigError(f"{what}: not a text in UTF-8; expected one") from None
    except OSError as error:
        raise ConfigError(f"{what}: {error.strerror}; expected a text file in UTF-8") from None
    if text is not None and not text.strip():
        raise ConfigError(f"{what}: empty; expected a text{advice}")
    return "" if path is None else text or ""


def questions(args: argparse.Namespace, console: Console) -> Iterator[str]:
    """Yield what is asked, one after the other."""
    if args.question is not None:
        yield args.question
    while args.chat:
        try:
            line = console.input("[bold]› [/bold]") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if line.strip() in GOODBYE:
            return
        if line.strip():
            yield line.strip()


def answer(conversation: Any, question: str, out: Console) -> None:
    """Decode an answer: on a terminal as it is unmasked, otherwise as plain text once it is there."""
    if not out.is_terminal:
        for _ in conversation.ask(question):
            pass
        out.print(conversation.turns[-1][1], markup=False, highlight=False, soft_wrap=True)
        return
    states, started = conversation.ask(question), time.perf_counter()
    first = next(states)  # a memory has been written by then, under a progress bar of its own
    with Live(console=out, refresh_per_second=20) as live:
        for steps, tokens in enumerate(itertools.chain([first], states)):
            text = Text(conversation.text_of(tokens, mask="░"))
            text.highlight_regex("░+", "dim")
            live.update(text, refresh=steps == 0)  # at once, however short the answer
        live.update(Text(conversation.turns[-1][1]))
    out.print(f"{steps} steps, {time.perf_counter() - started:.1f} s", style="dim", highlight=False)


def reading(windows: list[list[Any]], notes: Console) -> Iterator[list[Any]]:
    """Yield the windows of a text under a progress bar, and say how many tokens were read in what time."""
    started, tokens = time.perf_counter(), sum(len(row) for rows in windows for row in rows)
    yield from track(windows, "reading", console=notes, transient=True)
    many = f"{len(windows)} window{'s' if len(windows) > 1 else ''}"
    notes.print(f"read {tokens:,} tokens in {many}, {time.perf_counter() - started:.1f} s")


def run(args: argparse.Namespace) -> None:
    """Load, adapt if asked to, and answer. Raises ConfigError for what the user can correct."""
    # Here, not above: these imports take seconds.
    from .inference.arguments import from_command_line
    from .inference.conversation import Conversation
    from .method.prompt_memory import save_snapshot

    document = read_document(args.prompt_file, args.question)
    parsed = from_command_line(args)
    if args.save_memory:
        check_writable("--save-memory", args.save_memory)
    notes, out = Console(stderr=True, highlight=False), Console()
    with notes.status("loading"):
        decoder = parsed.open()
    if decoder.memory is not None and decoder.reads_windows:
        decoder.memory.progress = lambda windows: reading(windows, notes)
    conversation = Conversation(decoder, document, args.max_new_tokens, parsed.arguments.seed)
    if args.save_memory:
        _, text = conversation.parts(args.question or "")  # what cannot be asked about is not written
        assert decoder.memory is not None  # --save-memory needs one
        fast_weights, config = decoder.memory.recall([text]), decoder.memory.memory.config
        save_snapshot(args.save_memory, fast_weights, decoder.pretrained.name, config, text)
        notes.print(f"memory of {len(text)} tokens saved to {args.save_memory}", soft_wrap=True)
    for question in questions(args, out):
        answer(conversation, question, out)
    if decoder.memory is not None and (lost := decoder.memory.tally.failures()):
        notes.print(f"without memory: {lost}", style="yellow")
    if left := decoder.unfinished():
        notes.print(left, style="yellow", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `memdlm generate` and return its exit code."""
    args = arguments_of(argv)
    return exit_code(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
