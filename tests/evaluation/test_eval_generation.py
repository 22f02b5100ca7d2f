"""From lm-eval's requests to prompts: lengths, settings, seeds, stops; their order and batches; where answers end."""

from __future__ import annotations

import logging
import random
from typing import Any, NamedTuple

import pytest
import torch
from conftest import tiny
from saved_models import pretrained_of

from dllm_memdlm.evaluation.batching import CPU_TOKENS, Batches
from dllm_memdlm.evaluation.generation import Prompt, cut, in_order, read_prompts, share_prefixes
from dllm_memdlm.inference.decoding import Decoder
from dllm_memdlm.method.prompt_memory import shared_prefixes


def encode(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def read(*arguments: tuple[str, dict[str, Any]], sampler: str = "mdlm", **settings: Any) -> list[Prompt]:
    settings = {"default_new_tokens": 8, "max_length": 20, "seed": 0, **settings}
    names = settings.pop("names", [None] * len(arguments))
    decoder = Decoder(pretrained_of(tiny("llama")), sampler, max_length=settings.pop("max_length"))
    return read_prompts(arguments, names, encode, decoder, **settings)


def prompt_of(sampler: str = "mdlm", **settings: Any) -> Prompt:
    return read(("1 2 3", settings), sampler=sampler)[0]


def test_what_a_prompt_is_made_of():
    """Of an over-long prompt the end is decoded, without memory."""
    text = " ".join(map(str, range(100, 113)))
    first, second, fits, long = read(
        ("1 2 3", {}), ("4", {"max_gen_toks": 2}), (text.removeprefix("100 "), {}), (text, {})
    )
    assert (first.number, first.tokens, first.text, first.new_tokens, first.length) == (0, [1, 2, 3], [1, 2, 3], 8, 11)
    assert (second.number, second.tokens, second.new_tokens, second.length) == (1, [4], 2, 3)
    assert fits.text == fits.tokens == list(range(101, 113)) and fits.length == 20
    assert long.tokens == list(range(101, 113)) and long.text is None and long.length == 20


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"new_tokens": 8, "changes": {}, "stops": []}),
        ({"max_new_tokens": 5}, {"new_tokens": 5}),
        ({"max_gen_toks": "5", "max_new_tokens": 6}, {"new_tokens": 5}),
        ({"max_gen_toks": None}, {"new_tokens": 8}),
        ({"max_gen_toks": "1e1"}, {"new_tokens": 10}),
        ({"max_gen_toks": 19}, {"tokens": [3]}),
        ({"temperature": "0.7"}, {"changes": {"temperature": 0.7}}),
        ({"temperature": 0}, {"changes": {"temperature": 0.0}}),
        ({"do_sample": True, "temperature": 0.7}, {"changes": {"temperature": 0.7}}),
        ({"do_sample": True}, {"changes": {"temperature": 1.0}}),
        ({"do_sample": False, "temperature": 0.7}, {"changes": {"temperature": 0.0}}),
        ({"block_size": 2, "steps": 3, "top_p": 0.9, "num_beams": 1}, {"changes": {"block_size": 2, "steps": 3}}),
        ({"sampler": "llada21", "block_size": 2, "steps": 3, "top_p": 1}, {"changes": {"block_size": 2, "top_p": 1}}),
        ({"sampler": "llada21", "editing_threshold": "none"}, {"changes": {"editing_threshold": None}}),
        ({"sampler": "llada21", "threshold": "9e-1"}, {"changes": {"threshold": 0.9}}),
        *(({"until": nothing}, {"stops": []}) for nothing in (None, "")),
        ({"until": "\n"}, {"stops": ["\n"]}),
        ({"until": ["\n", "", "Q:"]}, {"stops": ["\n", "Q:"]}),
    ],
)
def test_what_a_task_may_say(settings, expected):
    prompt = prompt_of(**settings)
    assert {name: getattr(prompt, name) for name in expected} == expected


def test_an_answer_ends_at_the_first_of_its_stops():
    assert cut("one two", []) == cut("one two", ["x"]) == "one two" and cut("", ["x"]) == ""
    assert cut("one two one", ["one"]) == "" and cut("one two three", [" three", " two"]) == "one"


def test_what_is_ignored_is_said_once(caplog):
    with caplog.at_level(logging.WARNING, "dllm_memdlm.evaluation"):
        read(("1", {"until": ["x"], "max_gen_toks": 4, "max_new_tokens": 4, "do_sample": True, "temperature": 1}))
        assert caplog.messages == []
        read(("1", {"num_beams": 1, "until": []}), ("2", {"num_beams": 1, "top_p": 0.9, "do_sample": False}))
    (message,) = caplog.messages
    assert "mdlm sampler" in message and message.endswith(": num_beams, top_p")


def test_a_seed_belongs_to_the_prompt_and_to_how_often_it_was_asked():
    first, other, again, third = (p.seed for p in read(("1 2", {}), ("3", {}), ("1 2", {}), ("1 2", {})))
    assert len({first, other, again, third}) == 4
    assert [p.seed for p in read(("3", {}), ("1 2", {}), ("1 2", {}))] == [other, first, again]
    assert read(("1 2", {}), seed=1)[0].seed != first
    # The same words of another document are another question, whichever process reads them.
    one, two = (read(("1 2", {}), names=[("task", document, 0)])[0].seed for document in (0, 1))
    assert one != two and all(0 <= seed < 2**63 for seed in (first, other, again, one))


@pytest.mark.parametrize("seed", range(40))
def test_shared_prefixes_are_shared_and_long(seed):
    """Of questions about a few documents; some documents have a beginning in common, some prompts no company."""
    draw = random.Random(seed)

    def words(least: int, most: int) -> list[int]:
        return [draw.randrange(3, 9) for _ in range(draw.randint(least, most))]

    opening = words(0, 12)
    documents = [opening + words(5, 30) for _ in range(draw.randint(1, 4))]
    prompts = [document + words(0, 6) for document in documents for _ in range(draw.randint(1, 4))]
    prompts += [words(0, 20) for _ in range(draw.randint(0, 3))]
    draw.shuffle(prompts)
    lengths = shared_prefixes(prompts)
    groups: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        assert 0 <= length <= len(prompt)
        groups.setdefault(tuple(prompt[:length]), []).append(prompt)
    for prefix, members in groups.items():
        assert all(tuple(member[: len(prefix)]) == prefix for member in members)
        assert 2 * len(prefix) >= max(map(len, members)), "at least half of the longest"
        if len(members) == 1:
            assert list(prefix) == members[0], "no company, so the whole prompt"
        elif len(prefix) < min(map(len, members)):
            assert len({member[len(prefix)] for member in members}) > 1, "as long as what all of them share"
    order = draw.sample(range(len(prompts)), len(prompts))
    assert shared_prefixes([prompts[i] for i in order]) == [lengths[i] for i in order]


def test_prompts_share_the_document_they_begin_with():
    assert shared_prefixes([[], [1]]) == [0, 1] and shared_prefixes([[1, 2, 3], [1, 2, 3]]) == [3, 3]
    assert shared_prefixes([[1, 2, 3, 4, 5], [1, 2, 8, 9, 9]]) == [5, 5], "less than half in common"
    document = "1 2 3 4 5 6"
    prompts = read((f"{document} 7", {}), ("9 9", {}), (f"{document} 8 8", {}), ("5 " * 30, {}))
    share_prefixes(prompts)
    assert [p.text for p in prompts] == [encode(document), [9, 9], encode(document), None]
    assert prompts[0].tokens == encode(f"{document} 7"), "what is decoded stays"


def test_the_longest_come_first_and_those_of_one_memory_together():
    """By their settings, as only those that agree in them can be decoded in one batch."""
    few, document = {"max_gen_toks": 2}, "1 2 3 4 5 6"
    requests = [("8", {}), (f"{document} 7", few), ("9 9 9", {}), ("8", {}), ("5 " * 7, few), (f"{document} 8 8", few)]
    prompts = read(*requests, ("", few), ("7 " * 40, few), ("6 " * 8, few))
    assert [p.number for p in in_order(prompts)] == [7, 6, 5, 8, 1, 4, 2, 0, 3], "7 has no memory, and 6 none to have"
    share_prefixes(prompts)
    assert [p.number for p in in_order(prompts)] == [7, 6, 5, 1, 8, 4, 2, 0, 3]


CPU, GPU = torch.device("cpu"), torch.device("cuda")
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 MiB."


class Item(NamedTuple):
    number: int
    length: int = 1


class Work:
    """Answers each item with its double, and remembers the batches; more than `room` tokens do not fit."""

    def __init__(self, room: int = 10**9, error: Exception | None = None) -> None:
        self.room, self.error, self.tried = room, error or torch.OutOfMemoryError(OUT_OF_MEMORY), []

    def __call__(self, batch: list[Item]) -> list[int]:
        self.tried.append([item.number for item in batch])
        if sum(item.length for item in batch) > self.room:
            raise self.error
        return [2 * item.number for item in batch]


def sizes(work: Work, batches: Batches, lengths: list[int]) -> list[int]:
    """How many were tried at a time. Every item comes once, in order, with its own result."""
    items = [Item(number, length) for number, length in enumerate(lengths)]
    assert list(batches.run(work, items)) == [(item, 2 * item.number) for item in items]
    return [len(batch) for batch in work.tried]


@pytest.mark.parametrize(
    ("size", "most", "device", "lengths", "expected"),
    [
        (1, None, CPU, [10**6] * 3, [1] * 3),
        ("3", None, CPU, [10**6] * 7, [3, 3, 1]),
        (100, None, CPU, [10**6] * 7, [7]),
        ("auto", None, CPU, [], []),
        # the first item's length counts for all of a batch, as they are padded to it
        ("auto", None, CPU, [2 * CPU_TOKENS, *[CPU_TOKENS // 2] * 2, CPU_TOKENS // 5, *[1] * 100], [1, 2, 5, 64, 32]),
        ("auto:4", None, CPU, [CPU_TOKENS // 2] * 4, [2, 2]),
        ("auto", 10, CPU, [1] * 25, [10, 10, 5]),
        ("auto", 10, GPU, [1] * 25, [10, 10, 5]),
        ("auto", None, GPU, [10**7] * 70, [64, 6]),  # a GPU says itself when it is full
    ],
)
def test_sizes(size, most, device, lengths, expected):
    assert sizes(Work(), Batches(size, most, device), lengths) == expected


@pytest.mark.parametrize("size", ["auto", 64])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError(OUT_OF_MEMORY), RuntimeError(OUT_OF_MEMORY)])
def test_what_does_not_fit_is_halved_until_it_does(size, error):
    work = Work(room=999, error=error)
    assert sizes(work, Batches(size, None, GPU), [100] * 70) == [64, 32, 16, *[8] * 8, 6]
    assert work.tried[3] == list(range(8)), "it begins again where it failed"
    found = sizes(Work(256, error), Batches("auto", None, GPU), [100] * 4 + [50] * 4 + [10] * 20)
    assert found[:6] == [28, 14, 7, 3, 1, 1] and found[-2:] == [10, 10], "of shorter items as many tokens as fitted"


def test_what_is_not_a_matter_of_size():
    work = Work()
    assert next(Batches(2, None, CPU).run(work, [Item(1), Item(2), Item(3)])) == (Item(1), 2) and work.tried == [[1, 2]]
    with pytest.raises(ValueError, match="shorter"):
        list(Batches(4, None, CPU).run(lambda batch: [0], [Item(1), Item(2)]))
    work = Work(room=0, error=RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        list(Batches(4, None, GPU).run(work, [Item(0), Item(1)]))
    assert len(work.tried) == 1
    with pytest.raises(torch.OutOfMemoryError):
        list(Batches(4, None, GPU).run(Work(room=0), [Item(0), Item(1)]))


@pytest.mark.parametrize(
    ("room", "tried"),
    [
        (9, [[1, 3, 5], [2, 4, 6, 8], [10], [7]]),
        (1, [[1, 3, 5], [1], [3], [5], [2], [4], [6], [8], [10], [7]]),
    ],
)
def test_a_batch_ends_where_the_items_differ(room, tried):
    work, items = Work(room), [Item(number) for number in (1, 3, 5, 2, 4, 6, 8, 10, 7)]
    found = list(Batches(4, None, GPU).run(work, items, alike=lambda item: item.number % 2))
    assert found == [(item, 2 * item.number) for item in items] and work.tried == tried
