"""The patches to dllm: their form; on copies of an installed dllm, that they apply, and that the registry resolves."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from patched_dllm import ALL, FOLDER, GIT, PATCH, REGISTRY, apply, files, told, with_patches

import dllm_memdlm
from dllm_memdlm.compat.dllm_api import DLLM_COMMIT


def changes(patch: str) -> str:
    return (FOLDER / patch).read_text().partition("\n---\n")[2]


def test_the_readme_speaks_of_each_patch():
    assert sorted(path.name for path in FOLDER.iterdir()) == [*ALL, "README.md"]
    text = (FOLDER / "README.md").read_text()
    assert DLLM_COMMIT in text and all(f"[`{patch}`]({patch})" in text for patch in ALL)
    for name in ("register_trainer", "get_trainer", "_sample_noise"):
        assert name in text and any(f"def {name}(" in changes(patch) for patch in ALL)


@pytest.mark.dllm
@pytest.mark.parametrize("patches", [*([patch] for patch in ALL), ALL, ALL[::-1]], ids=[*ALL, "all", "all_reversed"])
def test_patches_apply(patches, unpatched, tmp_path):
    before, after = files(unpatched), []
    touched = {name for patch in patches for name in re.findall(r"^\+\+\+ b/(.*)", changes(patch), flags=re.MULTILINE)}
    for command in (GIT, PATCH):
        if shutil.which(command[0]):
            tree = shutil.copytree(unpatched, tmp_path / command[0])
            for patch in patches:
                done = apply(tree, patch, command)
                assert done.returncode == 0 and "offset" not in done.stdout, done.stdout + done.stderr
            after.append(files(tree))
            assert {name for name in after[-1] if after[-1][name] != before.get(name)} == touched
    assert after[1:] in ([], after[:1]), "both tools give the same"


def print_trainers() -> None:
    """What names lead to, before and after `register`, and what a name that is taken says."""
    from dllm.core import trainers

    def answer(function: Any, *args: Any, **named: Any) -> Any:
        try:
            return [f"{cls.__module__}.{cls.__qualname__}" for cls in function(*args, **named)]
        except ValueError as error:
            return str(error)

    early = answer(trainers.get_trainer, "memdlm")
    assert dllm_memdlm.register() and dllm_memdlm.register(), "twice is as good as once"
    ours = {"trainer": dllm_memdlm.MemDLMTrainer, "config": dllm_memdlm.MemDLMConfig}
    taken = answer(trainers.register_trainer, "mdlm", **ours)
    names = ("memdlm", "mdlm", "bd3lm", "dream", "editflow", "mdml")
    print(json.dumps([trainers.__file__, early, taken, *(answer(trainers.get_trainer, name) for name in names)]))


@pytest.mark.dllm
@with_patches((REGISTRY,), ALL)
def test_the_registry_resolves_memdlm(tree):
    place, early, taken, memdlm, mdlm, bd3lm, dream, editflow, misspelt = told(print_trainers, tree)
    assert Path(place).is_relative_to(tree)
    assert early == "Unknown trainer 'memdlm'. Available: ['bd3lm', 'dream', 'editflow', 'mdlm']"
    assert misspelt == "Unknown trainer 'mdml'. Available: ['bd3lm', 'dream', 'editflow', 'mdlm', 'memdlm']"
    assert taken == "Trainer 'mdlm' is already dllm.core.trainers.mdlm.MDLMTrainer"
    ours = (dllm_memdlm.MemDLMTrainer, dllm_memdlm.MemDLMConfig)
    assert memdlm == [f"{cls.__module__}.{cls.__qualname__}" for cls in ours]
    assert mdlm == [f"dllm.core.trainers.mdlm.MDLM{end}" for end in ("Trainer", "Config")]
    assert bd3lm == [f"dllm.core.trainers.bd3lm.BD3LM{end}" for end in ("Trainer", "Config")]
    assert dream == [f"dllm.pipelines.dream.trainer.DreamTrainer{end}" for end in ("", ".DreamConfig")]
    assert editflow == [f"dllm.pipelines.editflow.trainer.EditFlowTrainer{end}" for end in ("", ".EditFlowConfig")]
