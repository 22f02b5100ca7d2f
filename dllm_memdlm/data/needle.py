"""Needles in a haystack: keys and values planted in real text, all of which the response must give back.

A task for models of a few hundred thousand parameters. Keys and their values are drawn afresh for every row, so that
nothing can be learned by heart: the prompt alone determines the response.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..config import ConfigError

Row = Mapping[str, Any]

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
KEYS = tuple(VALUES)

#: A sentence for each needle.
NEEDLE = "The {} is {}."
WORDS_OF_A_NEEDLE = len(NEEDLE.split())


class Needles(NamedTuple):
    """One example. `values` are the right ones by key, in the order asked for."""

    prompt: str
    response: str
    values: dict[str, str]

    def right(self, answer: str) -> int:
        """How many keys an answer gives the right value: the first one it names after the key."""
        found: dict[str, str] = {}
        words = re.findall(r"\w+", answer)
        for key, value in itertools.pairwise(words):
            found.setdefault(key, value)
        return sum(found.get(key) == value for key, value in self.values.items())


def plant(haystack: list[str], words: int, count: int) -> Needles:
    """`count` needles between the first sentences of a text: exactly `words` words in all, then the question.

    The text is repeated where it is too short, and its last sentence cut. A pure function. Keys, values and their order
    in the question depend on the haystack alone, so they are the same at every length.

        >>> plant(["Ann wrote a book.", "It has two parts."], words=15, count=2)
        Needles(prompt="The bird is sparrow. Ann wrote a book. The fruit is peach. It has two\\n\\nName the fruit, "
                "bird.", response="Named: fruit peach bird sparrow", values={"fruit": "peach", "bird": "sparrow"})
    """
    rng = random.Random(" ".join(haystack))
    keys = rng.sample(KEYS, count)
    values = {key: rng.choice(VALUES[key]) for key in keys}
    sentences = _first_words(haystack, words - count * WORDS_OF_A_NEEDLE)
    gaps = [rng.randint(0, len(sentences)) for _ in keys]
    needles = [NEEDLE.format(key, values[key]) for key in rng.sample(keys, count)]
    text = []
    for gap in range(len(sentences) + 1):
        text += [needle for needle, own in zip(needles, gaps, strict=True) if own == gap]
        text += sentences[gap : gap + 1]
    # One mark follows each key, as one value does in the response: the two lists run at a constant distance.
    question = f"Name the {', '.join(values)}."
    response = "Named: " + " ".join(f"{key} {value}" for key, value in values.items())
    return Needles(f"{' '.join(text)}\n\n{question}", response, values)


def sentences_of(row: Row) -> list[str]:
    """The sentences of a HotpotQA row's paragraphs. Raises ValueError if it has none."""
    context = row["context"]
    paragraphs = context.get("sentences") if isinstance(context, Mapping) else None
    lists = isinstance(paragraphs, list) and all(isinstance(paragraph, list) for paragraph in paragraphs)
    sentences = [sentence for paragraph in paragraphs for sentence in paragraph] if lists else []
    if not all(isinstance(sentence, str) for sentence in sentences) or not any(map(str.strip, sentences)):
        raise ValueError("context is not as in HotpotQA: expected paragraphs, at least one, in lists of sentences")
    return [sentence.strip() for sentence in sentences]


def needle_examples(rows: Iterable[Row], words: int, count: int) -> list[Needles]:
    """The examples of HotpotQA rows at one length, to evaluate on: `needle_examples(load_rows(data)[1], 256, 8)`.

    They have the form of the training examples. The same row has the same keys and values at every length: only the
    haystack grows.

    Raises:
        ConfigError: too few words for the needles, or more needles than keys.
        ValueError: a row has no paragraphs.
    """
    check_needles((words,), count)
    return [plant(sentences_of(row), words, count) for row in rows]


def check_needles(words: Iterable[int], count: int) -> None:
    """Raise ConfigError unless texts of these lengths have room for the needles, and there is a key for each."""
    if not 1 <= count <= len(KEYS):
        raise ConfigError(f"data.needle_count={count}: expected 1 to {len(KEYS)}, as many as there are keys")
    for number in words:
        if number < count * WORDS_OF_A_NEEDLE:
            raise ConfigError(
                f"data.needle_words={number}: expected at least {count * WORDS_OF_A_NEEDLE}, {WORDS_OF_A_NEEDLE} for "
                f"each of the {count} needles"
            )


def _first_words(sentences: list[str], count: int) -> list[str]:
    """The first `count` words as sentences, the last one cut; from the start again where the text ends."""
    kept: list[str] = []
    while count > 0:
        for sentence in sentences:
            words = sentence.split()[:count]
            count -= len(words)
            if words:
                kept.append(" ".join(words))
    return kept
