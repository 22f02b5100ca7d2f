"""The patch for a plain install: the wheel of a copy of dllm, and what importing it needs."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from fresh_python import printed, run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from patched_dllm import ALL, INSTALL, files, with_patches

#: Only the distributions given are there, others' modules are hidden. Then the code given runs.
HIDING = """
import json, re, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

kept, hidden, code = json.loads(sys.argv[1])

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *args, **kwargs):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, *args, **kwargs)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        named = ((re.sub(r"[-_.]+", "-", d.name).lower(), d) for d in super().find_distributions(*args, **kwargs))
        return (distribution for name, distribution in named if name in kept)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Finder]
exec(code)
"""
#: But for the scripts in tools, which run when they are imported.
IMPORT_EVERYTHING = """
import importlib
from pathlib import Path
import dllm

root, names, missing = Path(dllm.__file__).parents[1], [], {}
for path in sorted(path for path in root.glob("dllm/**/*.py") if path.parent.name != "tools"):
    names.append(".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))
    try:
        importlib.import_module(names[-1])
    except ModuleNotFoundError as error:
        missing[names[-1]] = error.name
print(json.dumps([str(root), len(names), missing]))
"""
#: As attributes first: an import statement would set them.
RESOLVE = """
import json, sys
import dllm
early = [name for name in ("lm_eval", "trl") if name in sys.modules]
found = [dllm.core.eval.mdlm.MDLMEvalConfig, dllm.pipelines.rl.DiffuGRPOTrainer]
from dllm.core.eval import MDLMEvalHarness
from dllm.pipelines.rl import DiffuGRPOConfig
found += [MDLMEvalHarness, DiffuGRPOConfig]
print(json.dumps([early, [f"{cls.__module__}.{cls.__name__}" for cls in found], hasattr(dllm.core, "evil")]))
"""


def plain_install(tree: Path) -> tuple[Path, list[str]]:
    """The wheel of this tree, unpacked as pip does it, and what it declares to need."""
    build = shutil.copytree(tree, tree.parent / "build")
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tree.parent))
    done = run("-m", "pip", "wheel", *options, str(build), PIP_DISABLE_PIP_VERSION_CHECK="1")
    if re.search("No module named pip|BackendUnavailable|invalid command 'bdist_wheel'", done.stderr):
        pytest.skip("needs pip and setuptools 70.1 to build a wheel")
    assert done.returncode == 0, done.stderr[-3000:]
    [wheel], site = tree.parent.glob("dllm-*.whl"), tree.parent / "site"
    zipfile.ZipFile(wheel).extractall(site)
    [distribution] = metadata.distributions(path=[str(site)])
    return site, distribution.requires


def brought_in(requirements: list[str]) -> set[str]:
    """The distributions that these bring along, where they are installed."""
    seen, waiting = set(), [(text, "") for text in requirements]
    while waiting:
        text, extra = waiting.pop()
        needed = Requirement(text)
        if needed.marker is None or needed.marker.evaluate({"extra": extra}):
            for pair in {(canonicalize_name(needed.name), wanted) for wanted in ("", *needed.extras)} - seen:
                seen.add(pair)
                with contextlib.suppress(metadata.PackageNotFoundError):
                    waiting += [(text, pair[1]) for text in metadata.requires(needed.name) or []]
    return {name for name, _ in seen}


def run_with(requirements: list[str], code: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run code where only these are installed, and what they bring along."""
    kept = brought_in(requirements)
    owners = {**metadata.packages_distributions(), "lm_eval": ["lm_eval"], "trl": ["trl"]}
    hidden = [module for module, names in owners.items() if kept.isdisjoint(map(canonicalize_name, names))]
    hidden = [module for module in hidden if module != "dllm"]  # here it comes from the path
    return run("-c", HIDING, json.dumps([sorted(kept), hidden, code]), paths=(path,))


@pytest.mark.dllm
@with_patches((INSTALL,), ALL)
def test_a_plain_install_works(tree):
    site, declared = plain_install(tree)
    assert files(site / "dllm") == files(tree / "dllm")
    place, modules, missing = printed(run_with(declared, IMPORT_EVERYTHING, site))
    assert place == str(site) and modules > 100
    assert {"dllm.core.eval": "lm_eval", "dllm.pipelines.rl": "trl"}.items() <= missing.items()
    for name, module in missing.items():
        assert module == ("trl" if ".rl" in name else "lm_eval" if ".eval" in name else None), name
    early, found, misspelt = printed(run("-c", RESOLVE, paths=(site,)))
    assert early == [] and misspelt is False
    harness, grpo = "dllm.core.eval.mdlm.MDLMEval", "dllm.pipelines.rl.grpo.trainer.DiffuGRPO"
    assert found == [f"{harness}Config", f"{grpo}Trainer", f"{harness}Harness", f"{grpo}Config"]
