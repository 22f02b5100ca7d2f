"""The command line of the lm-evaluation-harness, certain to know the model `memdlm`.

python -m dllm_memdlm.evaluate --model memdlm --model_args pretrained=runs/mine --tasks gsm8k
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from .cli import exit_code
from .config import ConfigError
from .evaluation import plugin


def main(argv: Sequence[str] | None = None) -> int:
    """Run `memdlm evaluate` and return its exit code."""
    if argv is not None:
        sys.argv[1:] = argv  # where lm-eval looks
    return exit_code(run)


def run() -> None:
    """Run lm-eval's own command. Raises ConfigError for what the user can correct."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm_eval is not installed: pip install 'lm_eval[ruler]==0.4.13'")
    plugin.install()  # torch has done so already, unless TORCH_DEVICE_BACKEND_AUTOLOAD=0
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
