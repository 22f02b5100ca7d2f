"""The recipes that come with the package: found by name, listed, extended from elsewhere, and copied."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import error_of
from recipe_files import assert_same, write

from dllm_memdlm import recipes
from dllm_memdlm.config import ConfigError
from dllm_memdlm.training import shipped
from dllm_memdlm.training.recipe import load_recipe, resolve

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in ROOT.glob("recipes/*.yaml"))


@pytest.mark.parametrize("name", ["llada2_mini", "tiny_llada_moe_mdlm"])
def test_a_name_stands_for_the_file_in_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(f"recipe:{name}", ["memory.rank=4"])
    assert_same(recipe, load_recipe(ROOT / f"recipes/{name}.yaml", ["memory.rank=4"]))
    assert recipe.training.output_dir == f"runs/{name}" and recipe.memory.rank == 4


def test_ones_own_recipe_extends_one_by_name(tmp_path):
    mine = write(tmp_path / "mine.yaml", "extends: recipe:llada2_mini\ndata: {dataset: mine.jsonl}\n")
    values = resolve(mine)
    assert values.pop("data") == {"dataset": "mine.jsonl", "max_length": 4096}
    assert values.items() <= resolve("recipe:llada2_mini").items() and set(values) == {
        *("model", "lora", "memory", "training")
    }


def test_an_unknown_name_is_one_line_with_those_that_are_known(tmp_path, capsys):
    line = f"recipe:llada3: no such recipe; known: {', '.join(NAMES)}"
    assert error_of(capsys, "recipe:llada3") == line
    mine = write(tmp_path / "mine.yaml", "extends: recipe:llada3\n")
    assert error_of(capsys, str(mine)) == f"{mine}: {line}"
    assert recipes.main(["copy", "llada3", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("path", ["llada2_mini", "recipes/llada2_mini.yaml"])
def test_a_file_that_is_not_there_but_has_the_name_of_one_of_them(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert error_of(capsys, path) == f"{path}: no such recipe file: {tmp_path / path}; did you mean recipe:llada2_mini?"


def test_the_list_has_every_recipe_and_its_first_sentence(capsys):
    assert recipes.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(NAMES)]] == NAMES
    for name, line in zip(NAMES, lines, strict=False):
        said = line.removeprefix(name).strip()
        assert said.count(". ") == 0 and said.endswith(".") and len(said) > 20, line
    assert shipped.about("dream_7b") == (  # over two lines of the file
        "The paper's inner loop on Dream-7B, which the paper does not have: fast weights on the dense feed-forward "
        "layers 25, 26 and 27."
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_needs_no_other_file_and_trains_the_same(name, tmp_path, capsys):
    assert recipes.main(["copy", f"recipe:{name}", str(tmp_path / "mine")]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert files[0] == tmp_path / "mine" / f"{name}.yaml"
    assert set(files) == {path for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    assert "extends: recipe:" not in "".join(file.read_text(encoding="utf-8") for file in files)
    assert_same(load_recipe(files[0]), load_recipe(f"recipe:{name}"))


def test_a_file_that_was_changed_is_never_overwritten(tmp_path):
    first = shipped.copy("llada2_mini", tmp_path)
    assert [path.name for path in first] == ["llada2_mini.yaml", "llada_moe.yaml"]
    assert shipped.copy("llada2_mini", tmp_path) == first, "what is the same is there already"
    first[1].write_text("memory: {rank: 8}\n")
    with pytest.raises(ConfigError) as error:
        shipped.copy("llada20_mini", tmp_path)
    assert str(error.value) == f"{first[1]}: there is another file of this name; expected a folder without it"
    assert first[1].read_text() == "memory: {rank: 8}\n" and not (tmp_path / "llada20_mini.yaml").exists()
    for folder in (first[0], first[0] / "below"):
        with pytest.raises(ConfigError, match="expected a folder that can be written to"):
            shipped.copy("llada2_mini", folder)
