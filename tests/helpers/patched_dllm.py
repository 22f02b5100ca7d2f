"""Copies of an installed dllm with our patches on them, and interpreters that use such a copy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fresh_python import ROOT, printed, run

FOLDER = ROOT / "patches"
ALL = ("0001-trainer-registry.patch", "0002-plain-install.patch", "0003-precomputed-noise.patch")
REGISTRY, INSTALL, NOISE = ALL
GIT, PATCH = ("git", "apply", "--whitespace=error-all"), ("patch", "-p1", "-F0", "-i")


def apply(tree: Path, patch: str, command: tuple[str, ...] = GIT) -> subprocess.CompletedProcess[str]:
    # Inside another repository git would skip the files without a word
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    return subprocess.run([*command, FOLDER / patch], cwd=tree, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def unpatched(tmp_path_factory) -> Path:
    """A copy of dllm's sources."""
    import dllm

    root, tree = Path(dllm.__file__).parents[1], tmp_path_factory.mktemp("unpatched")
    if not (root / "pyproject.toml").is_file() or shutil.which("git") is None:
        pytest.skip("needs git, and dllm in its repository")
    shutil.copytree(root / "dllm", tree / "dllm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(root / name, tree)
    for patch in ALL:
        apply(tree, patch, ("git", "apply", "-R"))  # where the repository has it already
    return tree


@pytest.fixture
def tree(request, unpatched, tmp_path) -> Path:
    """A copy with these patches."""
    tree = shutil.copytree(unpatched, tmp_path / "dllm")
    for patch in request.param:
        done = apply(tree, patch)
        assert done.returncode == 0, done.stderr
    return tree


def with_patches(*patches: tuple[str, ...]) -> Any:
    return pytest.mark.parametrize("tree", patches, ids=lambda names: f"{len(names)}", indirect=True)


def files(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def told(function: Callable[[], None], tree: Path) -> Any:
    """What a function of a test module prints in an interpreter whose dllm is the copy."""
    module = function.__module__
    code = f"import {module}; {module}.{function.__name__}()"
    helpers = Path(__file__).parent
    paths = (tree, Path(sys.modules[module].__file__).parent, helpers, helpers.parent, ROOT)
    return printed(run("-c", code, paths=paths))
