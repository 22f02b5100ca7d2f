"""Lets lm-eval (up to 0.4.13, which takes no plugins) find the model `memdlm` as soon as this package is installed.

lm-eval imports `lm_eval.models`, which registers the built-in models, when a model is looked up and none is registered
yet. So the name must be added after that module has run, never before: `install` waits for it with an import hook.
torch calls `install` when it is imported, as it does with every entry point of the group `torch.backends` (setup.cfg),
and lm-eval imports torch before it looks a model up. Newer releases read the entry point of the group `lm_eval.models`.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "memdlm"
TARGET = "dllm_memdlm.evaluation.lm_eval_model:MemDLMEvalLM"

_MODELS = "lm_eval.models"
_logger = logging.getLogger(__name__)


def install() -> None:
    """Register the model once `lm_eval.models` has been imported, at once if it has been. Imports nothing itself."""
    if sys.modules.get(_MODELS) is not None:
        register()
    elif _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def register() -> None:
    """Add the model to lm-eval's registry, unless this release takes plugins. A failure is logged, never raised."""
    try:
        registry = sys.modules["lm_eval.api.registry"]  # looked up, not imported: this runs no code of others
        if not hasattr(registry, "import_plugins") and NAME not in registry.model_registry:
            registry.model_registry.register(NAME, target=TARGET)
    # Releases before 0.4.10 have no such registry (AttributeError; KeyError where lm_eval is a stand-in), a frozen one
    # refuses (TypeError), so does one where the name was just taken (ValueError). Raised here, these would break the
    # import of lm-eval, or of torch, in programs that have no use for this model.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _logger.warning("lm-eval cannot take the model %s, which was made for lm-eval 0.4.13: %r", NAME, error)


class _Loader:
    """What `loader` is, but registers the model after `lm_eval.models` has run."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self.loader  # nothing of ours stays on the module
        self.loader.exec_module(module)
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        register()


class _Finder:
    """Finds `lm_eval.models` where the other finders do, and nothing else."""

    searching = False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODELS or self.searching:
            return None
        self.searching = True  # the search comes through here again
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


_finder = _Finder()
