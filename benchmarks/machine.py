"""What the check runs on: the device, the versions, every module of the package, and whether 4 bit works there.

`python -m benchmarks.machine FOLDER` writes machine.json and machine.md. Exit code 1 where something does not work.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import dllm_memdlm
from dllm_memdlm.machine import devices, package_versions

from .report import Section, write


def gpu() -> str:
    """The GPU, in words. Raises RuntimeError without one."""
    if not torch.cuda.is_available():
        raise RuntimeError(f"none; torch {torch.__version__} is built for CUDA {torch.version.cuda}")
    card = torch.cuda.get_device_properties(0)
    kernels = "kernels for grouped products" if card.major in (9, 10) else "no kernel for grouped products: a loop"
    return (
        f"compute capability {card.major}.{card.minor}, {card.multi_processor_count} multiprocessors, "
        f"{torch.cuda.device_count()} of them, CUDA {torch.version.cuda}, {kernels}"
    )


def modules() -> str:
    """Every module of the package imports. Raises ImportError for the first that does not."""
    names = [module.name for module in pkgutil.walk_packages(dllm_memdlm.__path__, "dllm_memdlm.")]
    for name in names:
        importlib.import_module(name)
    return f"{len(names)} imported"


def four_bit(device: torch.device) -> str:
    """Weights packed on the device are those packed on a CPU. Raises RuntimeError where they are not."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    pairs = [quantize_4bit(weight.to(where), compress_statistics=True, quant_type="nf4") for where in ("cpu", device)]
    (packed, state), (own, own_state) = pairs
    same = (own.cpu() == packed).float().mean().item()
    away = (dequantize_4bit(own, own_state).cpu().float() - dequantize_4bit(packed, state).float()).abs().max().item()
    if same < 0.999:
        raise RuntimeError(f"{1 - same:.2%} of the packed bytes are not those of the CPU")
    return f"{same:.2%} of the packed bytes are those of the CPU; unpacked, {away:.1e} apart at most"


def main(argv: list[str] | None = None) -> int:
    folder, *rest = sys.argv[1:] if argv is None else argv
    device = torch.device("cpu" if "--cpu" in rest else "cuda")
    checks: dict[str, Callable[[], str]] = {"modules": modules, "4 bit": lambda: four_bit(device)}
    if device.type == "cuda":
        checks = {"GPU": gpu, **checks}
    table, failed = Section(title="The machine", columns=["what", "found"]), 0
    table.rows.append(["system", f"{platform.platform()}, {os.cpu_count()} cores"])
    table.rows += [["version", f"{name} {version}"] for name, version in package_versions().items()]
    about = {"card": devices()[0], "torch": torch.__version__}
    for name, check in checks.items():
        try:
            table.rows.append([name, check()])
        except Exception as error:  # whatever it is, it is what the check is for
            failed = 1
            table.rows.append([name, f"FAILED: {type(error).__name__}: {error}"[:300]])
        write([table], "The machine", about, Path(folder), "machine")
    print(*(f"{what}: {found}" for what, found in table.rows), sep="\n")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
