"""Lets lm-eval 0.4.13 find the model `memdlm` as soon as this package is installed.

Remove this file, memdlm_for_torch.py and their lines in setup.cfg once lm-eval > 0.4.13 is required: it reads the entry
point `lm_eval.models`, and 0.4.13 takes no plugins.

lm-eval imports `lm_eval.models`, which registers the built-in models, when a model is looked up and none is registered
yet. So the name must be added after that module has run, never before: `install` waits for it with an import hook.
torch calls it, through memdlm_for_torch, when it is imported, and lm-eval imports torch before it looks a model up.
"""

from __future__ import annotations

import logging
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

NAME = "memdlm"
TARGET = "dllm_memdlm.evaluation.lm_eval_model:MemDLMEvalLM"
MODELS = "lm_eval.models"


def install() -> None:
    """Register the model once `lm_eval.models` has been imported, at once if it has been. Imports nothing itself."""
    if sys.modules.get(MODELS) is not None:
        register()
    elif Hook not in sys.meta_path:
        sys.meta_path.insert(0, Hook)


def register() -> None:
    """Add the model to lm-eval's registry, unless this release takes plugins. A failure is logged, never raised."""
    try:
        registry = sys.modules["lm_eval.api.registry"]  # looked up, not imported: this runs no code of others
        if not hasattr(registry, "import_plugins") and NAME not in registry.model_registry:
            registry.model_registry.register(NAME, target=TARGET)
    except Exception as error:  # another release's registry; programs without a use for this model shall not break
        log = logging.getLogger(__name__)
        log.warning("lm-eval cannot take the model %s, which was made for lm-eval 0.4.13: %r", NAME, error)


class Hook:
    """Finds `lm_eval.models` as Python does, and registers the model after it has run."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == MODELS else None
        loader: Any = spec and spec.loader
        if loader is not None:
            loader.exec_module = Hook.then_register(loader)
        return spec

    @staticmethod
    def then_register(loader: Any) -> Any:
        def execute(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)  # nothing of ours stays on the module
            loader.exec_module(module)
            if Hook in sys.meta_path:
                sys.meta_path.remove(Hook)
            register()

        return execute
