"""What is shipped: the version, said once; the wheel and the source distribution; the workflows; the pinned tools."""

from __future__ import annotations

import configparser
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from fresh_python import printed, run
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dllm_memdlm

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def test_the_version_is_said_once():
    declared = configparser.ConfigParser()
    assert declared.read(ROOT / "setup.cfg")
    assert declared["metadata"]["version"] == "attr: dllm_memdlm.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", dllm_memdlm.__version__)
    others = ("pyproject.toml", "setup.py", "CITATION.cff", "Dockerfile", "dllm_memdlm/cli.py", "dllm_memdlm/info.py")
    assert not [name for name in others if dllm_memdlm.__version__ in (ROOT / name).read_text(encoding="utf-8")]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of a wheel and a source distribution, of a copy of what they are made of."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools")
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    for name in ("dllm_memdlm", "recipes", "tests", "reproduce", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copy(ROOT / "memdlm_for_torch.py", source)
    code = "from setuptools import build_meta as b; b.build_wheel('..'); b.build_sdist('..')"
    command = [sys.executable, "-W", "error:::setuptools", "-c", code]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr, done.stderr
    return folder


def files_below(folder: str, pattern: str = "*") -> set[str]:
    paths = (path.relative_to(ROOT) for path in (ROOT / folder).rglob(pattern))
    return {str(path) for path in paths if (ROOT / path).is_file() and "__pycache__" not in path.parts}


USERS_RECIPES = {str(path.relative_to(ROOT)) for path in ROOT.glob("recipes/*.yaml")} | {"recipes/base/tiny.yaml"}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    info = f"dllm_memdlm-{dllm_memdlm.__version__}"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith(f"{info}.dist-info/")}
    assert wheel.name == f"{info}-py3-none-any.whl"
    beside = {f"{info}.data/purelib/memdlm_for_torch.py"}
    assert names == files_below("dllm_memdlm") | {f"dllm_memdlm/training/{name}" for name in USERS_RECIPES} | beside
    files = ("py.typed", "training/engines/zero2.json", "training/model_card.md.jinja")
    assert {f"dllm_memdlm/{file}" for file in files} < names


def test_the_source_distribution_holds_what_it_takes_to_build(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {member.name.partition("/")[2] for member in tar if member.isfile()}
    made = {name for name in names if ".egg-info/" in name} | {"PKG-INFO"}
    top = {"LICENSE", "README.md", "MANIFEST.in", "memdlm_for_torch.py", "pyproject.toml", "setup.cfg", "setup.py"}
    assert names - made == files_below("dllm_memdlm") | USERS_RECIPES | top


def test_recipes_have_names_in_a_folder_that_is_no_checkout(built, tmp_path):
    """The wheel unpacked, as pip does. `make wheel` installs it in an environment of its own, and trains."""
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import json; from dllm_memdlm.training import shipped as s; print(json.dumps([str(s.FOLDER), s.names()]))"
    names = sorted(path.stem for path in ROOT.glob("recipes/*.yaml"))
    assert printed(run("-c", code, paths=(tmp_path,))) == [str(tmp_path / "dllm_memdlm/training/recipes"), names]
    done = run("-m", "dllm_memdlm.cli", "recipes", "copy", "tiny_llada2", "mine", paths=(tmp_path,))
    assert done.stdout.split() == ["mine/tiny_llada2.yaml", "mine/base/tiny.yaml"], done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_name_only_targets_that_exist(path):
    targets = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
    named = set()
    for job in jobs:
        choices = job.get("strategy", {}).get("matrix", {}).get("target", [])
        for command in (step["run"] for step in job["steps"] if "run" in step):
            for name in re.findall(r"\bmake (\$\{\{.*?\}\}|[^=\s]+)(?=\s|$)", command):
                named |= set(choices) if name == "${{ matrix.target }}" else {name}
    assert named and named <= targets


def test_pre_commit_checks_as_make_lint_does():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    hooks = repo["hooks"]
    assert [hook["additional_dependencies"] for hook in hooks] == [[str(constraints()["ruff"])]] * 2
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    checks = re.findall(r"\$\(BIN\)/(ruff \w+)", lint)
    assert [" ".join(hook["entry"].split()[:2]) for hook in hooks] == checks == ["ruff check", "ruff format"]


def test_the_lock_file_agrees_with_the_constraints():
    """On Linux and Python 3.11, which the constraints are of; and it names no index but PyPI."""
    tomllib = pytest.importorskip("tomllib")
    text = (ROOT / "uv.lock").read_text(encoding="utf-8")
    here = {
        "python_version": "3.11",
        "python_full_version": "3.11.9",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    locked = {}
    for package in tomllib.loads(text)["package"]:
        markers = package.get("resolution-markers")
        if markers is None or any(Marker(marker).evaluate(here) for marker in markers):
            locked[package["name"]] = package.get("version")
    wrong = {name: locked.get(name) for name, pin in constraints().items() if locked.get(name, "") not in pin.specifier}
    assert not wrong
    assert set(re.findall(r"https?://([^/\"]+)", text)) == {"pypi.org", "files.pythonhosted.org"}
