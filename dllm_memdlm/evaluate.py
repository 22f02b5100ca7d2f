"""The command line of the lm-evaluation-harness, certain to know the model `memdlm`.

python -m dllm_memdlm.evaluate --model memdlm --model_args pretrained=runs/mine --tasks gsm8k
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from .config import ConfigError
from .evaluation import plugin
from .launch import prepare_to_load


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `memdlm evaluate`. Returns 2 after one line about what the user can correct."""
    if argv is not None:
        sys.argv[1:] = argv  # where lm-eval looks
    if importlib.util.find_spec("lm_eval") is None:
        print("error: lm_eval is not installed: pip install 'lm_eval[ruler]==0.4.13'", file=sys.stderr)
        return 2
    prepare_to_load()
    plugin.install()  # torch has done so already, unless TORCH_DEVICE_BACKEND_AUTOLOAD=0
    # Here, not above: datasets looks at the offline switch when it is imported.
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
