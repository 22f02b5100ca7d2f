"""A run of a tiny recipe that the tests of a module share."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from small_run import recipe_for, write_recipe

from dllm_memdlm.training import run


@pytest.fixture(scope="module")
def caches_of_runs(tmp_path_factory):
    """No cache outside of the tests' folder is read or written, and no bar is drawn."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # where training arguments leave theirs for the next ones
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
        patch.setattr(run, "TOKENIZER_CACHE", cache / "tokenizers")
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    """A recipe that the tests of a module share."""
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def finished(recipe_file, caches_of_runs, tmp_path_factory) -> Path:
    """The folder of a run from scratch that nothing stopped."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run.train(recipe_for(recipe_file, folder))
    return folder
