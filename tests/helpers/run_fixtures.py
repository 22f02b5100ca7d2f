"""Caches that all tests share, and a run of a tiny recipe that the tests of a module share."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from small_run import recipe_for, write_recipe

from dllm_memdlm.training import run


@pytest.fixture(scope="session", autouse=True)
def caches_of_runs(tmp_path_factory):
    """No cache outside of the tests' folder is read or written, and no bar is drawn."""
    cache = tmp_path_factory.mktemp("cache")
    datasets.config.HF_DATASETS_CACHE, run.TOKENIZER_CACHE = cache / "datasets", cache / "tokenizers"
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    """A recipe that the tests of a module share."""
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def finished(recipe_file, tmp_path_factory) -> Path:
    """The folder of a run from scratch that nothing stopped."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run.train(recipe_for(recipe_file, folder))
    return folder
