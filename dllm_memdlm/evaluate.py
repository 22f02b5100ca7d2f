"""The command line of the lm-evaluation-harness, certain to know the model `memdlm`.

python -m dllm_memdlm.evaluate --model memdlm --model_args pretrained=runs/mine --tasks gsm8k
"""

from __future__ import annotations

import importlib.util
import sys

from .evaluation import plugin
from .launch import work_offline_without_hub


def main() -> int:
    """Entry point of `memdlm-evaluate`. Returns 2 where lm-eval is missing; else lm-eval reads `sys.argv`."""
    if importlib.util.find_spec("lm_eval") is None:
        print("error: lm_eval is not installed: pip install 'dllm-memdlm[eval]'", file=sys.stderr)
        return 2
    work_offline_without_hub()
    plugin.install()  # torch has done so already, unless TORCH_DEVICE_BACKEND_AUTOLOAD=0
    # Here, not above: datasets looks at the offline switch when it is imported.
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
