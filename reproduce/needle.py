"""Words planted in real text, and how many of them a model finds in texts that it has not seen, by their length.

python -m reproduce.needle --model runs/mine --memory --words 80 160 --output needle.json

Where the model sees the end of a text alone (`data.visible`), the words in it and the hidden ones are counted apart.

A task for models of a few hundred thousand parameters: keys and their values are drawn afresh for every text, so that
nothing can be learned by heart; the prompt alone determines the response.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from dllm_memdlm.cli import exit_code
from dllm_memdlm.config import ConfigError, DataConfig
from dllm_memdlm.evaluation.command import WHOSE, finish, of_a_run, read

if TYPE_CHECKING:
    from torch import Tensor

    from dllm_memdlm.data.encoding import Encoder
    from dllm_memdlm.inference.decoding import Decoder

# Each key has values of its own, so that a key finds its value in one step of attention. With values that any key can
# have, the two layers would have to match the key's own word first; no trial run of a tiny model learned that.
TABLE = """\
animal badger beaver camel ferret gazelle hare lynx moose otter panda tapir zebra
bird crane curlew finch heron kestrel magpie osprey puffin raven sparrow stork wren
colour beige crimson indigo ivory lilac magenta maroon ochre scarlet teal turquoise violet
fabric calico cotton denim flannel linen muslin satin silk suede tweed velvet wool
flower aster begonia clover daisy iris jasmine lily lotus peony poppy tulip zinnia
fruit apricot fig lemon lime mango melon papaya peach pear plum quince raisin
herb basil chervil cumin dill fennel mint oregano parsley saffron sage tarragon thyme
stone agate beryl garnet jade jasper onyx opal pearl quartz ruby topaz zircon
tool anvil chisel drill hammer lathe mallet pliers rasp saw spanner spade wrench
tree acacia alder beech birch cedar elm larch maple poplar rowan walnut willow
"""
#: The values that each key can have.
VALUES = {key: tuple(values) for key, *values in map(str.split, TABLE.splitlines())}

NEEDLES = 8  #: in a text, where no other number is asked for
NEEDLE = "The {} is {}."  #: the sentence of each
PLACES = ("visible", "hidden")  #: where a needle is for a model that sees the end of a text


class Planted(NamedTuple):
    """One example. `values` are the right ones by key, in the order asked for."""

    prompt: str
    response: str
    values: dict[str, str]

    def named(self, answer: str) -> dict[str, str]:
        """Return what an answer names first after each key."""
        named: dict[str, str] = {}
        for key, value in itertools.pairwise(re.findall(r"\w+", answer)):
            named.setdefault(key, value)
        return {key: named[key] for key in self.values if key in named}

    def right(self, answer: str) -> set[str]:
        """Return the keys to which an answer gives the right value."""
        named = self.named(answer)
        return {key for key, value in self.values.items() if named.get(key) == value}

    def planted_in(self, text: str) -> set[str]:
        """Return the keys whose value stands in a text, the prompt or its end: no other key has the same one."""
        return {key for key, value in self.values.items() if re.search(rf"\b{value}\b", text)}

    def tokens(self, encoder: Encoder, keys: set[str]) -> tuple[list[int], Tensor]:
        """Return the response's tokens, and which of them are the values of these keys [L] bool."""
        import torch

        ids, ends = encoder.text(self.response)
        spans = [(self.response.index(f"{k} {v}") + len(k), len(v) + 1) for k, v in self.values.items() if k in keys]
        return ids, torch.tensor([any(start < end <= start + length for start, length in spans) for end in ends])


def plant(haystack: Sequence[str], words: int, count: int = NEEDLES) -> Planted:
    """Put `count` needles between the first sentences of a text: exactly `words` words in all, then the question.

    The text is repeated where it is too short, and its last sentence cut. A pure function. Keys, values and their order
    in the question depend on the haystack alone, so they are the same at every length.

        >>> plant(["Ann wrote a book.", "It has two parts."], words=15, count=2)
        Planted(prompt="The bird is sparrow. Ann wrote a book. The fruit is peach. It has two\\n\\nName the fruit, "
                "bird.", response="Named: fruit peach bird sparrow", values={"fruit": "peach", "bird": "sparrow"})
    """
    rng = random.Random(" ".join(haystack))
    values = {key: rng.choice(VALUES[key]) for key in rng.sample([*VALUES], count)}
    sentences = first_words(haystack, words - count * len(NEEDLE.split()))
    gaps = [rng.randint(0, len(sentences)) for _ in values]
    needles = [NEEDLE.format(key, values[key]) for key in rng.sample([*values], count)]
    text = []
    for gap in range(len(sentences) + 1):
        text += [needle for needle, own in zip(needles, gaps, strict=True) if own == gap]
        text += sentences[gap : gap + 1]
    # One mark follows each key, as one value does in the response: the two lists run at a constant distance.
    question = f"Name the {', '.join(values)}."
    response = "Named: " + " ".join(f"{key} {value}" for key, value in values.items())
    return Planted(f"{' '.join(text)}\n\n{question}", response, values)


def first_words(sentences: Sequence[str], count: int) -> list[str]:
    """Return the first `count` words as sentences, the last one cut; from the start again where the text ends."""
    kept: list[str] = []
    while count > 0:
        for sentence in sentences:
            words = sentence.split()[:count]
            count -= len(words)
            kept += [" ".join(words)] if words else []
    return kept


def held_out(data: DataConfig, questions: int) -> list[list[str]]:
    """Return the haystacks of the first `questions` rows behind those that training evaluates on.

    No choice was made by looking at them.

    Raises:
        ConfigError: there is no such row, or none with a haystack.
    """
    from dllm_memdlm.data import load_rows

    _, held = load_rows(replace(data, eval_size=None))
    rows, first = ([] if held is None else held.rows), data.eval_size
    if first is None or first >= len(rows):
        raise ConfigError(
            f"data.eval_size={first}: training evaluates on all {len(rows)} rows that it holds out of {data.dataset}; "
            "expected fewer"
        )
    if "haystack" not in rows.column_names:
        fields = ", ".join(rows.column_names)
        raise ConfigError(f"data.dataset={data.dataset!r}: has the fields {fields}; expected a haystack (`make data`)")
    return [text.split("\n") for text in rows.select(range(first, min(first + questions, len(rows))))["haystack"]]


class Found(NamedTuple):
    """What a model knows of one text, by key."""

    visible: set[str]  #: whose needle it sees
    hidden: set[str]  #: whose needle it does not see
    right: set[str]  #: to which its answer gives the value
    nll: dict[str, float]  #: of the values that it sees, and of those it does not, all of them masked together


def found(decoder: Decoder, examples: Sequence[Planted], batch_size: int, whose: str = "own") -> list[Found]:
    """Ask for the values of each text, with one of the memories of `WHOSE`, if the decoder has any."""
    from dllm_memdlm.data.encoding import Encoder, decode_text, encode_chat
    from dllm_memdlm.evaluation.likelihood import Masked, log_likelihoods

    tokenizer, model = decoder.pretrained.tokenizer, decoder.pretrained.model
    encoder, settings = Encoder(tokenizer), (tokenizer.mask_token_id, decoder.pretrained.right_shift_logits)
    chats = [[{"role": "user", "content": example.prompt}] for example in examples]
    prompts = [encode_chat(tokenizer, chat, add_generation_prompt=True) for chat in chats]
    new_tokens = max(len(tokenizer(example.response)["input_ids"]) for example in examples) + 1
    parts = [decoder.parts(prompt, new_tokens) for prompt in prompts]
    texts = [text for _, text in parts]
    if whose != "own":
        texts = [*texts[1:], texts[0]] if whose == "other" else [None] * len(texts)
    results = []
    for start in range(0, len(prompts), batch_size):
        rows = range(start, min(start + batch_size, len(prompts)))
        seen = [parts[row][0] for row in rows]
        places, states = [], []
        for row, prompt in zip(rows, seen, strict=True):
            visible = examples[row].planted_in(decode_text(tokenizer, prompt))
            places.append((visible, examples[row].values.keys() - visible))
            for place in places[-1]:
                ids, mask = examples[row].tokens(encoder, place)
                states.append(Masked(row, prompt, ids, mask, 1.0))
        with decoder.recalled([texts[row] for row in rows], [whose != "none"] * len(rows)):
            answers = decoder.answers(seen, new_tokens)
        with decoder.recalled([texts[row] for row in rows for _ in PLACES], [False] * len(states)):
            nats = [-value for value in log_likelihoods(model, states, *settings)]
        for row, keys, answer, *own in zip(rows, places, answers, nats[::2], nats[1::2], strict=True):
            right = examples[row].right(decode_text(tokenizer, answer))
            results.append(Found(*keys, right, dict(zip(PLACES, own, strict=True))))
    return results


def summary(results: Sequence[Found]) -> dict[str, Any]:
    """Count the right answers; where a model does not see all of a text, those to what it sees and the others apart."""
    asked = {place: sum(len(getattr(r, place)) for r in results) for place in PLACES}
    row: dict[str, Any] = {"right": sum(len(r.right) for r in results), "asked": sum(asked.values())}
    for place in PLACES if asked["hidden"] else ():
        right = sum(len(r.right & getattr(r, place)) for r in results)
        nll = sum(r.nll[place] for r in results) / max(1, asked[place])
        row[place] = {"right": right, "asked": asked[place], "nll": nll}
    return row


def run(args: argparse.Namespace) -> None:
    """Ask, and write what was found. Raises ConfigError for what the user can correct."""
    # Trained with full attention, and asked for few words: decoded as LLaDA-MoE is, in one block.
    parsed, data = read(args, sampler="mdlm")
    haystacks, decoder = held_out(data, args.questions), parsed.open()
    whose = args.whose or (["none"] if decoder.memory is None else ["own"])
    console, rows = Console(highlight=False), []
    for words, own in track([*itertools.product(args.words, whose)], "asking", console=console, transient=True):
        results = found(decoder, [plant(text, words, args.planted) for text in haystacks], args.batch_size, own)
        rows.append({"words": words, "whose": own, **summary(results)})
    report: dict[str, Any] = {"model": args.model, "memory": decoder.memory is not None, "questions": len(haystacks)}
    finish(args.output, report | {"scores": rows}, decoder, table(rows), console)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Show a column for each length, and a row for each memory and place."""
    lengths = dict.fromkeys(row["words"] for row in rows)
    cells = {(row["whose"], row["words"], place): row.get(place, row) for row in rows for place in ("", *PLACES)}
    places = ("", *PLACES) if any(PLACES[0] in row for row in rows) else ("",)
    result = Table("memory", "", *(f"{words} words" for words in lengths), title="Values found")
    for whose in dict.fromkeys(row["whose"] for row in rows):
        for place in places:
            own = (cells[whose, words, place] for words in lengths)
            result.add_row(whose, place, *(f"{cell['right'] / max(1, cell['asked']):.1%}" for cell in own))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 2 after one line about what the user can correct."""
    parser = of_a_run("python -m reproduce.needle", "Retrieval by context length.")
    parser.add_argument("--words", type=int, nargs="+", required=True, metavar="N", help="lengths of the texts")
    parser.add_argument("--planted", type=int, default=NEEDLES, metavar="N", help="needles in each (default: 8)")
    parser.add_argument("--whose", nargs="+", choices=WHOSE, help="memories to compare (default: own with --memory)")
    parser.add_argument("--questions", type=int, default=50, metavar="N", help="texts of each length (default: 50)")
    parser.add_argument("--batch-size", type=int, default=25, metavar="N", help="texts at a time (default: 25)")
    args = parser.parse_intermixed_args(argv)
    args.memory = args.memory or bool({"own", "other"} & set(args.whose or ()))
    if args.planted not in range(1, len(VALUES) + 1):
        parser.error(f"--planted {args.planted}: expected 1 to {len(VALUES)}")
    for name, values, least in (
        ("words", args.words, args.planted * len(NEEDLE.split())),  # they have room
        ("questions", [args.questions], 1),
        ("batch-size", [args.batch_size], 1),
    ):
        if min(values) < least:
            parser.error(f"--{name} {min(values)}: expected at least {least}")
    return exit_code(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
