"""The needle format: what is planted is there once, and the response is what the prompt says."""

import re
from dataclasses import replace

import pytest
from data_files import message_of, write

from dllm_memdlm.config import ConfigError, DataConfig
from dllm_memdlm.data import choose_format, load_examples, load_rows, needle_examples, train_tokenizer
from dllm_memdlm.data.needle import KEYS, VALUES, plant

pytestmark = pytest.mark.usefixtures("own_cache")

ROWS = [
    {
        "question": f"Who wrote book {i}?",
        "answer": "Ann",
        "supporting_facts": [["Ann", 0]],
        "context": [
            ["Ann", [f"Ann wrote book {i}.", " It has two parts, and a preface."]],
            ["Bob", ["Bob read it twice.", "  He liked the second part best. ", ""]],
        ],
    }
    for i in range(30)
]
SENTENCES = ["Ann wrote a book.", "It has two parts, and a preface.", "Bob read it twice."]


def config_of(tmp_path, **changes):
    settings = {"format": "needle", "needle_words": (20, 40), "needle_count": 4, **changes}
    return replace(write(tmp_path / "rows.json", ROWS), **settings)


def chats(config):
    rows, _ = load_rows(config)
    to_messages = choose_format(config, rows.column_names).to_messages
    return [[message["content"] for message in to_messages(row, config)] for row in rows]


def parts_of(prompt):
    """The text, the pairs planted in it, and the keys asked for."""
    text, question = prompt.split("\n\n")
    assert re.fullmatch(r"Name the [a-z]+(, [a-z]+)*\.", question)
    return text, re.findall(r"The ([a-z]+) is ([a-z]+)\.", text), question[len("Name the ") : -1].split(", ")


@pytest.mark.parametrize(("words", "count"), [(32, 8), (64, 8), (512, 8), (4, 1), (6, 1), (len(KEYS) * 4, len(KEYS))])
def test_every_needle_is_in_the_text_once_and_the_response_gives_them_back(words, count):
    example = plant(SENTENCES, words, count)
    text, pairs, asked = parts_of(example.prompt)
    assert len(text.split()) == words
    assert len(pairs) == len(dict(pairs)) == count, "each key once"
    assert dict(pairs) == example.values
    assert asked == list(example.values)
    assert example.response == "Named: " + " ".join(f"{key} {dict(pairs)[key]}" for key in asked)
    assert all(value in VALUES[key] for key, value in example.values.items())
    assert all(text.split().count(f"{value}.") == 1 for value in example.values.values())


def test_the_rest_of_the_text_is_the_haystack_repeated_where_it_ends():
    text, _, _ = parts_of(plant(SENTENCES, words=4 * 4 + 20, count=4).prompt)
    rest = re.sub(r"The [a-z]+ is [a-z]+\. ?", "", text).split()
    assert rest == (" ".join(SENTENCES).split() * 2)[:20]


def test_the_needles_depend_on_the_haystack_alone():
    short, long = plant(SENTENCES, 20, 4), plant(SENTENCES, 200, 4)
    assert short == plant(SENTENCES, 20, 4)
    assert (short.values, short.response) == (long.values, long.response)
    assert list(short.values) == list(long.values)
    assert plant(SENTENCES[:2], 20, 4).values != short.values


def test_the_order_of_the_question_is_not_that_of_the_text():
    orders = [
        [[key for key, _ in pairs], asked]
        for _, pairs, asked in (parts_of(plant([f"Row {i}.", *SENTENCES], 60, 6).prompt) for i in range(20))
    ]
    assert sum(planted == asked for planted, asked in orders) <= 2


def test_needles_come_before_between_and_after_the_sentences():
    texts = [parts_of(plant([f"Row {i} begins."], 3 + 4, 1).prompt)[0] for i in range(30)]
    assert {text.startswith("The") for text in texts} == {True, False}


def test_an_answer_is_scored_by_key():
    example = plant(SENTENCES, 60, 3)
    (first, value), *rest = example.values.items()
    assert example.right(example.response) == 3
    assert example.right(f"{first} {value}") == 1
    assert example.right(f"Named: {first} {value}s {first} {value}") == 0, "the first value named counts"
    assert example.right(" ".join(f"{key} {value}" for key, _ in rest)) == 0
    assert example.right("") == 0


def test_rows_give_the_same_chats_again_of_every_length_configured(tmp_path):
    config = config_of(tmp_path)
    assert chats(config) == chats(config)
    lengths = {len(parts_of(prompt)[0].split()) for prompt, _ in chats(config)}
    assert lengths == {20, 40}
    assert len({response for _, response in chats(config)}) == len(ROWS)


def test_training_examples_and_those_to_evaluate_on_have_one_form_and_share_no_row(tmp_path):
    config = config_of(tmp_path, eval_fraction=0.2, needle_words=(40,))
    training, (_, held_out) = chats(config), load_rows(config)
    examples = needle_examples(held_out, words=40, count=4)
    assert len(examples) == 6
    own = replace(config, eval_fraction=0)
    assert sorted([*training, *([e.prompt, e.response] for e in examples)]) == sorted(chats(own))


def test_keys_and_values_become_one_token_each(tmp_path):
    rows = [
        {**row, "context": [["Ann", [f"Ann wrote book {i} of {j}."]]]} for i, row in enumerate(ROWS) for j in range(9)
    ]
    config = replace(config_of(tmp_path), needle_count=8, needle_words=(40,))
    write(tmp_path / "rows.json", rows)
    tokenizer = train_tokenizer((text for chat in chats(config) for text in chat), 1024)
    examples = load_examples(config, tokenizer).train
    # Named, :, eight pairs, and the end of the turn
    assert {sum(label != -100 for label in labels) for labels in examples["labels"]} == {2 + 2 * 8 + 1}


def test_no_value_has_two_keys():
    values = [value for own in VALUES.values() for value in own]
    assert len(values) == len(set(values)) == 12 * len(KEYS)
    assert not set(values) & set(KEYS)


def test_auto_never_takes_it(tmp_path):
    assert message_of(choose_format, DataConfig(dataset="some/rows"), ["context"]).count("needle") == 0
    [[_, response], *_] = chats(config_of(tmp_path, format="auto"))
    assert not response.startswith("Named")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"needle_words": (64, 15)},
            "data.needle_words=15: expected at least 16, 4 for each of the 4 needles",
        ),
        ({"needle_count": 11}, f"data.needle_count=11: expected 1 to {len(KEYS)}, as many as there are keys"),
        ({"needle_count": 0}, f"data.needle_count=0: expected 1 to {len(KEYS)}, as many as there are keys"),
    ],
)
def test_settings_that_do_not_fit_are_told_in_one_line(tmp_path, changes, message):
    config = config_of(tmp_path, **changes)
    assert message_of(chats, config) == message
    with pytest.raises(ConfigError, match="^" + re.escape(message) + "$"):
        needle_examples([], changes.get("needle_words", (300,))[-1], config.needle_count)


def test_lengths_are_whole_numbers_and_at_least_one():
    for value, expected in (
        ((), "at least one length"),
        (("a",), "list of whole number"),
        (64, "list of whole number"),
    ):
        assert message_of(lambda value=value: DataConfig(dataset="x", needle_words=value)) == (
            f"data.needle_words={value!r}: expected {expected}"
        )


@pytest.mark.parametrize("context", [[], [["Ann", []]], [["Ann", [" "]]]])
def test_rows_without_text_are_told_with_their_number(tmp_path, context):
    config = config_of(tmp_path)
    write(tmp_path / "rows.json", [{**ROWS[0], "context": context}])
    tokenizer = train_tokenizer([], 263)
    assert message_of(load_examples, config, tokenizer) == (
        f"data.dataset='{config.dataset}', train row 0: context is not as in HotpotQA: expected paragraphs, at least "
        "one, in lists of sentences"
    )
