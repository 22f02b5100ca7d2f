"""lm-eval finds `memdlm`: the import hook on stand-ins of lm-eval and on itself, its stock commands, and our own."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_python import MODELS, REGISTRY, ROOT, needs_lm_eval, printed, run, write_lm_eval

import memdlm_for_torch
from dllm_memdlm import cli, evaluate
from dllm_memdlm.evaluation import plugin

#: The start and the end of what runs in an interpreter of its own.
BEFORE = """
import importlib, json, os, sys
from dllm_memdlm.evaluation import plugin
finders = list(sys.meta_path)
"""
AFTER = """
from lm_eval.api.registry import model_registry
loaders = {type(lm_eval.models.__loader__).__name__, type(lm_eval.models.__spec__.loader).__name__}
clean = sys.meta_path == finders and not {"exec_module"} & vars(lm_eval.models.__spec__.loader).keys()
print(json.dumps({"models": dict(model_registry), "clean": clean, "loaders": sorted(loaders)}))
"""
ORDERS = {
    "before": "plugin.install(); assert 'lm_eval' not in sys.modules; import lm_eval.models",
    "after": "import lm_eval.models; plugin.install()",
    "between": "import lm_eval.api.registry; plugin.install(); import lm_eval.models",
    "twice": "plugin.install(); plugin.install(); import lm_eval.models; plugin.install()",
    "looked for first": "plugin.install(); importlib.util.find_spec('lm_eval.models'); import lm_eval.models",
    "reloaded": "plugin.install(); import lm_eval.models; importlib.reload(lm_eval.models)",
}
before_or_after = pytest.mark.parametrize("code", [ORDERS["before"], ORDERS["after"]], ids=["before", "after"])


@pytest.fixture
def stand_in(tmp_path):
    """Runs code with a stand-in of lm-eval. Warnings are errors there."""

    def run_with(code: str, **modules: str) -> subprocess.CompletedProcess[str]:
        write_lm_eval(tmp_path, **modules)
        return run("-W", "error", "-c", BEFORE + code, paths=(tmp_path, ROOT))

    return run_with


@pytest.mark.parametrize("code", ORDERS.values(), ids=ORDERS)
def test_the_model_is_registered_after_the_built_in_ones(code, stand_in):
    done = stand_in(code + AFTER)
    found = printed(done)
    assert list(found["models"].items()) == [
        ("dummy", "lm_eval.models.dummy:DummyLM"),
        ("memdlm", "dllm_memdlm.evaluation.lm_eval_model:MemDLMEvalLM"),
    ]
    assert found["clean"] and done.stderr == "", "the hook has gone"
    assert found["loaders"] == ["SourceFileLoader"], "the module is as it would be without it"


@before_or_after
def test_a_release_that_takes_plugins_and_a_taken_name_are_left_alone(code, stand_in):
    found = printed(stand_in(code + AFTER, registry=REGISTRY + "def import_plugins(module_names): ..."))
    assert list(found["models"]) == ["dummy"] and found["clean"]
    done = stand_in(code + AFTER, models=MODELS + 'model_registry.register("memdlm", target="another:Model")')
    assert printed(done)["models"]["memdlm"] == "another:Model" and done.stderr == ""


REFUSALS = {
    "an old release": ("MODEL_REGISTRY = {}", "", "AttributeError"),
    "without a registry": ("", "import sys; del sys.modules['lm_eval.api.registry']", "KeyError"),
    "frozen": (REGISTRY.replace("self[name] = target", "raise TypeError('frozen')"), "", "TypeError('frozen')"),
}


@before_or_after
@pytest.mark.parametrize(("registry", "models", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_one_line_and_breaks_no_import(registry, models, reason, code, stand_in):
    models = "import lm_eval.api.registry\n" + models
    done = stand_in(code + "\nprint(json.dumps(sys.meta_path == finders))", registry=registry, models=models)
    assert printed(done) is True
    assert done.stderr.count("\n") == 1 and reason in done.stderr and "lm-eval 0.4.13" in done.stderr, done.stderr


def test_what_breaks_in_lm_eval_breaks_as_without_it(stand_in):
    """The error is lm-eval's own; where a second attempt succeeds, it ends with the model registered."""
    models = "import os\nif os.environ.pop('BROKEN', ''): raise OSError('broken')" + MODELS
    code = """
os.environ["BROKEN"] = "1"
plugin.install()
try:
    import lm_eval.models
except OSError as error:
    assert error.args == ("broken",) and "lm_eval.models" not in sys.modules
else:
    raise AssertionError
import lm_eval.models
"""
    found = printed(stand_in(code + AFTER, models=models))
    assert list(found["models"]) == ["dummy", "memdlm"] and found["clean"]


def test_it_imports_none_of_the_libraries_and_without_lm_eval_its_import_fails_as_ever():
    code = """
plugin.install()
loaded = sorted({"torch", "transformers", "lm_eval", "numpy"} & sys.modules.keys())
sys.path.clear()
try:
    import lm_eval.models
except ModuleNotFoundError as error:
    print(json.dumps([loaded, error.name]))
"""
    assert printed(run("-W", "error", "-S", "-c", BEFORE + code, paths=(ROOT,))) == [[], "lm_eval"]


@needs_lm_eval
def test_lm_eval_has_the_model_and_all_of_its_own():
    after = """
from lm_eval.api.registry import get_model, model_registry
differing = sorted(model_registry.keys() ^ lm_eval.models.MODEL_MAPPING.keys())
print(json.dumps([differing, get_model("dummy").__name__, "hf" in model_registry, sys.meta_path == finders]))
"""
    found = printed(run("-c", BEFORE + ORDERS["before"] + after, paths=(ROOT,)))
    assert found == [["memdlm"], "DummyLM", True, True]


def test_setup_cfg_names_what_is_here():
    declared, root = configparser.ConfigParser(), Path(__file__).parents[2]
    assert declared.read(root / "setup.cfg")
    points, beside = declared["options.entry_points"], declared["options.data_files"]["../purelib"]
    assert points["lm_eval.models"].split() == [plugin.NAME, "=", plugin.TARGET]
    assert points["console_scripts"].split() == ["memdlm", "=", f"{cli.__name__}:{cli.command.__name__}"]
    assert (root / beside).samefile(memdlm_for_torch.__file__)
    assert points["torch.backends"].split() == ["dllm_memdlm", "=", f"{Path(beside).stem}:install"]


def test_torch_runs_what_needs_no_package(tmp_path):
    """A copy beside it, as an installation has one: with the package the hook waits, without one nothing happens."""
    (tmp_path / "alone.py").write_text(Path(memdlm_for_torch.__file__).read_text(encoding="utf-8"))
    code = "import json, sys, alone; alone.install(); print(json.dumps([str(finder) for finder in sys.meta_path]))"
    assert any(plugin.__name__ in finder for finder in printed(run("-c", code, paths=(tmp_path, ROOT))))
    gone = run("-W", "error", "-c", f"import sys; sys.modules['dllm_memdlm'] = None; {code}", paths=(tmp_path,))
    assert gone.returncode == 0 and gone.stderr == ""


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """A folder from which torch finds our entry point, as after an installation."""
    folder = tmp_path_factory.mktemp("elsewhere")
    points = 'entry_points(group="torch.backends", name="dllm_memdlm")'
    code = f"import json; from importlib.metadata import *; print(json.dumps([p.value for p in {points}]))"
    if printed(run("-c", code, paths=(folder,))) != ["memdlm_for_torch:install"]:
        pytest.skip("needs this package installed, as it is now: pip install -e .")
    return folder


#: A model that stands in for ours and says that it was asked for. Neither torch nor lm_eval.models is imported here.
RESOLVES = """
import sys, types
from lm_eval.api.model import LM
class MemDLMEvalLM(LM):
    loglikelihood = loglikelihood_rolling = generate_until = None
    def __init__(self, **settings):
        sys.exit("built")
sys.modules["dllm_memdlm.evaluation.lm_eval_model"] = types.SimpleNamespace(MemDLMEvalLM=MemDLMEvalLM)
assert not {"torch", "lm_eval.models"} & sys.modules.keys()
"""
WAITS = f"assert '{plugin.__name__}' in [getattr(finder, '__module__', '') for finder in sys.meta_path]"
BY_NAME = f"import torch; {WAITS}; from lm_eval.api.registry import get_model; get_model('memdlm')()"


@needs_lm_eval
def test_python_resolves_the_model_and_torch_imports_without_a_word(installed):
    done = run("-c", RESOLVES + BY_NAME, paths=(installed,))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "built\n"), done.stderr[-3000:]


def test_without_lm_eval_our_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    finders = list(sys.meta_path)
    assert evaluate.main() == 2 and sys.meta_path == finders
    assert capsys.readouterr() == ("", "error: lm_eval is not installed: pip install 'lm_eval[ruler]==0.4.13'\n")


#: Of lm-eval's 14,000 tasks those of one folder are read.
COMMAND = """
import runpy, sys
from pathlib import Path
from lm_eval.tasks import TaskManager, __file__ as tasks
made = TaskManager.__init__
few = {"include_defaults": False, "include_path": Path(tasks).with_name("arc")}
TaskManager.__init__ = lambda manager, **settings: made(manager, **settings | few)
sys.argv += ["--model", "memdlm", "--model_args", "pretrained=nowhere,memry=true", "--tasks", "arc_easy"]
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@needs_lm_eval
def test_lm_evals_command_knows_the_model_and_ours_without_torchs_help(installed):
    """A wrong argument shows that it was asked; ours says so in one line."""
    says = "unknown model argument 'memry'; did you mean memory?\n"
    done = run("-c", COMMAND, "lm_eval", paths=(installed,))
    assert done.returncode == 1 and done.stderr.endswith(f"ConfigError: {says}"), done.stderr[-3000:]
    done = run("-c", COMMAND, "dllm_memdlm.cli", "evaluate", paths=(ROOT,), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.stderr.endswith(f"\nerror: {says}")
