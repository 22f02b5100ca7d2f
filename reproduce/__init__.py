"""Commands that make figures, tables and the models they need."""

import dllm_memdlm  # noqa: F401 (before torch, which reads what it sets)
