"""dllm itself, or the subset of it that this package needs."""
