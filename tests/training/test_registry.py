"""What importing the package does, which is nothing to others; and what `register` does, on request."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from fresh_python import ROOT, printed, run

import dllm_memdlm
from dllm_memdlm.compat import dllm_api
from dllm_memdlm.training import registry
from dllm_memdlm.training.collator import AnchorTrajectoryCollator
from dllm_memdlm.training.trainer import MemDLMConfig, MemDLMTrainer

NAMES = ("MemDLMTrainer", "MemDLMConfig")


def test_importing_is_light():
    """Neither torch nor transformers, and hardly any time: a command can ask for --help at once."""
    code = """
import json, sys, time
started = time.perf_counter()
import dllm_memdlm
seconds = time.perf_counter() - started
dir(dllm_memdlm), dllm_memdlm.__all__, dllm_memdlm.__version__
heavy = {"torch", "transformers", "peft", "datasets", "accelerate", "numpy", "dllm"} & sys.modules.keys()
print(json.dumps([seconds, sorted(heavy)]))
"""
    seconds, heavy = printed(run("-c", code, paths=(ROOT,)))
    assert heavy == []
    assert seconds < 0.3


def test_importing_everything_changes_no_other_library():
    """Names, the objects behind them, and the attributes of every class, before and after."""
    assert printed(run("-c", CHANGES, paths=(ROOT,))) == []


CHANGES = """
import inspect, json, sys, warnings
warnings.simplefilter("ignore")
import accelerate, datasets, peft, torch, transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, Trainer
from transformers.models.llama import modeling_llama
try:
    import dllm
except ImportError:
    pass

LIBRARIES = ("dllm", "transformers", "peft", "accelerate", "datasets", "torch")

def snapshot():
    seen = {}
    for name, module in list(sys.modules.items()):
        if module is not None and name.partition(".")[0] in LIBRARIES:
            seen[name] = dict(vars(module))
            for cls in [v for v in vars(module).values() if inspect.isclass(v) and v.__module__ == name]:
                seen[f"{name}:{cls.__qualname__}"] = dict(vars(cls))
    return seen

def registered():
    auto = transformers.models.auto
    mappings = [*vars(auto.modeling_auto).items(), *vars(auto.configuration_auto).items()]
    return {name: set(mapping._extra_content) for name, mapping in mappings if hasattr(mapping, "_extra_content")}

auto_classes, before, changes = registered(), snapshot(), []
listed = {name: dir(sys.modules[name]) for name in LIBRARIES if name in sys.modules}
import dllm_memdlm
for name in dllm_memdlm.__all__:
    getattr(dllm_memdlm, name)
import dllm_memdlm.training.run, dllm_memdlm.training.dry_run, dllm_memdlm.info
after = snapshot()
for place, attributes in before.items():
    for name, value in attributes.items():
        if not name.startswith("_abc") and name not in ("__warningregistry__", "__annotations__"):
            if name not in after[place] or after[place][name] is not value:
                changes.append(f"{place}.{name} is gone or another")
    for name in after[place].keys() - attributes.keys():
        value, shown = after[place][name], not name.startswith("_")
        ours = str(getattr(value, "__module__", "")).startswith("dllm_memdlm")
        added = place in listed and shown and name not in listed[place] and not inspect.ismodule(value)
        if ours or added or ":" in place and not name.startswith("__"):
            changes.append(f"{place}.{name} is new")
if registered() != auto_classes:
    changes.append("transformers' auto classes know another model")
print(json.dumps(changes))
"""


def test_every_public_name_is_there():
    for name in dllm_memdlm.__all__:
        assert getattr(dllm_memdlm, name) is not None
        assert name in dir(dllm_memdlm)
    assert dllm_memdlm.MemDLMTrainer is MemDLMTrainer
    with pytest.raises(AttributeError, match="module 'dllm_memdlm' has no attribute 'MemDLM'"):
        dllm_memdlm.MemDLM  # noqa: B018


@pytest.mark.skipif(dllm_api.HAS_DLLM, reason="dllm is installed")
def test_without_dllm_there_is_nothing_to_register_with():
    assert dllm_memdlm.register() is False
    assert "dllm" not in sys.modules


@pytest.fixture
def stand_in(monkeypatch) -> types.SimpleNamespace:
    """A module called dllm with the two places that names are set on."""
    dllm = types.ModuleType("dllm")
    dllm.core = types.SimpleNamespace(trainers=types.SimpleNamespace())
    dllm.utils = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "dllm", dllm)
    monkeypatch.setattr(registry, "HAS_DLLM", True)
    return dllm


def test_names_are_set_and_a_registry_of_trainers_is_used_where_dllm_has_one(stand_in):
    classes, registered = {"MemDLMTrainer": MemDLMTrainer, "MemDLMConfig": MemDLMConfig}, {}
    for _ in range(2):  # a second time changes nothing
        assert registry.register() is True
        assert vars(stand_in.core.trainers) == classes
        assert vars(stand_in.utils) == {"AnchorTrajectoryCollator": AnchorTrajectoryCollator}
    stand_in.core.trainers.register_trainer = lambda name, **classes: registered.update({name: classes})
    assert registry.register() is True
    assert registered == {"memdlm": {"trainer": MemDLMTrainer, "config": MemDLMConfig}}


@pytest.fixture
def dllm(monkeypatch) -> Any:
    """dllm, without our names, which it has again lost after the test."""
    import dllm

    for place, names in ((dllm.core.trainers, NAMES), (dllm.utils, ("AnchorTrajectoryCollator",))):
        for name in names:
            monkeypatch.setattr(place, name, None, raising=False)
            monkeypatch.delattr(place, name)
    return dllm


@pytest.mark.dllm
def test_with_dllm_its_names_lead_here(dllm):
    assert not any(hasattr(dllm.core.trainers, name) for name in NAMES), "importing the package sets nothing"
    before = [dict(vars(place)) for place in (dllm.core.trainers, dllm.utils)]
    assert dllm_memdlm.register() is True
    assert dllm.core.trainers.MemDLMTrainer is MemDLMTrainer
    assert issubclass(dllm.core.trainers.MemDLMTrainer, dllm.core.trainers.MDLMTrainer)
    assert issubclass(dllm.core.trainers.MemDLMConfig, dllm.core.trainers.MDLMConfig)
    assert dllm.utils.AnchorTrajectoryCollator is AnchorTrajectoryCollator
    assert issubclass(AnchorTrajectoryCollator, dllm.utils.CollatorWrapper)
    for attributes, place in zip(before, (dllm.core.trainers, dllm.utils), strict=True):
        assert {name: vars(place)[name] for name in attributes} == attributes, "its own names are left alone"
