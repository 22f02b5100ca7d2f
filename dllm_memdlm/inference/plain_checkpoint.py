"""A trained model for others: a plain checkpoint, with adapter and memory in its weights; or a memory as an adapter."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PretrainedConfig

from ..backbones import DECODERS
from ..backbones.joined_lora import save_pairs
from ..config import ConfigError, DType, MemoryConfig
from ..method.inner_loop import ParametricMemory
from ..method.prompt_memory import load_snapshot
from ..training.model_card import Training, label, write_card
from ..training.recipe import FILE_NAME
from ..versions import readable_by_both
from .pretrained import Pretrained, Source, file_beside, find_source, load_pretrained


def export(
    model: str,
    out: str | Path,
    adapter: str | None = None,
    dtype: DType = "auto",
    shard_size: str = "5GB",
    memory: str | None = None,
) -> Path:
    """Write a full checkpoint with the adapter added to the weights, tokenizer, recipe and model card included.

    The sum is taken in float32 and rounded once. A model without an adapter is written as it is, in the dtype asked
    for. `out` appears when everything is in it.

    Args:
        model: folder or hub name of a full model, or of an adapter, whose base is then taken from it.
        out: a folder that does not exist, or is empty.
        adapter: folder or hub name of an adapter for the model.
        dtype: float32, bfloat16, float16, or auto: the base's.
        shard_size: the most that one file of weights holds.
        memory: a file of fast weights that were written with this model; they are added, too.

    Returns:
        The folder.

    Raises:
        ConfigError: a model, adapter or memory is not there or does not fit, the weights are quantised, or `out`
            cannot be written.
    """
    out = _free_folder(out)
    source = find_source(model, adapter)
    if "quantization_config" in source.config.to_dict():
        raise ConfigError(
            f"pretrained={source.base!r}: quantised weights, which take no sum; give the model that they were made "
            f"from: --model BASE{f' --adapter {source.adapter}' if source.adapter else ''}"
        )
    dtype = source.dtype if dtype == "auto" else dtype
    snapshot = None if memory is None else load_snapshot(memory, source.name)
    own = dtype == source.dtype and memory is None
    loaded = load_pretrained(model, adapter, dtype=dtype if own else "float32", merge_adapter=True)
    if snapshot is not None:
        fast_weights, settings = snapshot
        _memory_of(loaded, settings).merge(fast_weights)
    if not own:
        loaded.model.to(getattr(torch, dtype))
    with _appearing(out) as folder:
        _write(folder, loaded, source, dtype, shard_size, memory)
    return out


def export_adapter(model: str, out: str | Path, memory: str, adapter: str | None = None) -> Path:
    """Write a memory as a stock PEFT adapter in float32; of a model with an adapter, joined with that one.

    Args:
        model: as of `export`; the adapter's base is this model, or the base of the one that it is.
        out: as of `export`.
        memory: a file of fast weights that were written with this model.
        adapter: as of `export`.

    Returns:
        The folder.

    Raises:
        ConfigError: a model, adapter or memory is not there or does not fit; the memory is of full-size differences, or
            the adapter no plain LoRA; or `out` cannot be written.
    """
    out = _free_folder(out)
    source = find_source(model, adapter)
    fast_weights, settings = load_snapshot(memory, source.name)
    if settings.kind != "lora":
        raise ConfigError(f"{memory}: full-size differences (memory.kind: full), no LoRA; go without --as-adapter")
    loaded = load_pretrained(model, adapter)
    holder = _memory_of(loaded, settings)
    holder.check(fast_weights)
    pairs = {f"model.{shape.name}": fast_weights.site(shape.name) for shape in holder.shapes}
    with _appearing(out) as folder:
        folder.mkdir()
        save_pairs(folder, loaded.model, pairs, source.base, source.adapter)
        joined = "" if source.adapter is None else f", joined with the adapter {label(source.adapter)}"
        what = f"A PEFT LoRA adapter for {label(source.base)}: the memory {label(memory)}{joined}."
        _write_beside(folder, loaded, source, what, memory, is_adapter=True)
    return out


def _memory_of(loaded: Pretrained, settings: MemoryConfig) -> ParametricMemory:
    return ParametricMemory(loaded.model, settings, loaded.tokenizer.mask_token_id)


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Give a folder that is there when everything is in it. Raises ConfigError where it cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            folder = Path(scratch) / out.name
            yield folder
            folder.rename(out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--out {out}: {getattr(error, 'strerror', None) or error}") from error


def _free_folder(out: str | Path) -> Path:
    """Return the whole path of `out`. Raises ConfigError unless it can be made, or is empty."""
    path = Path(out).expanduser().absolute()
    above = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
    if not str(out):
        found = "no name"
    elif not above.is_dir():
        found = f"{above} is a file"
    elif not os.access(above, os.W_OK):
        found = f"{above} may not be written to"
    elif above == path and any(path.iterdir()):
        found = "not empty"
    else:
        return path
    raise ConfigError(f"--out {str(out)!r}: {found}; expected a folder that is empty or not there yet")


def _write(folder: Path, loaded: Pretrained, source: Source, dtype: str, shard_size: str, memory: str | None) -> None:
    generation = file_beside(source.base, "generation_config.json")
    if generation is not None:  # copied as it is: transformers does not save again all that it reads
        loaded.model.generation_config = GenerationConfig()
    loaded.model.save_pretrained(folder, max_shard_size=shard_size)
    _keep_conversion(folder / "config.json", source)
    if generation is not None:
        shutil.copyfile(generation, folder / generation.name)
    parts = {"adapter": source.adapter, "memory": memory}
    added = " and ".join(f"the {kind} {label(name)}" for kind, name in parts.items() if name is not None)
    what = f"{label(source.base)} with {added} added to its weights," if added else label(source.base)
    _write_beside(folder, loaded, source, f"{what} in {dtype}.", memory)


def _write_beside(
    folder: Path, loaded: Pretrained, source: Source, what: str, memory: str | None, is_adapter: bool = False
) -> None:
    """Write what is beside the weights: tokenizer, recipe and card; `what` is the card's first sentence."""
    loaded.tokenizer.save_pretrained(folder)
    readable_by_both(folder)
    if source.recipe_file is not None:
        shutil.copyfile(source.recipe_file, folder / FILE_NAME)
    home = source.folders[0]
    training = Training.of(file_beside(home, FILE_NAME), file_beside(home, "trainer_state.json"))
    base, of_run = source.base, training.section("model")
    if source.adapter is None and not is_adapter:
        base = of_run.get("path") or base
    elif not is_adapter and of_run.get("load_in_4bit"):
        what += " The adapter was trained on the same weights in 4 bit, and is added to the full ones."
    write_card(folder, folder.name, what, training, base, is_adapter, has_memory=memory is not None)


def _keep_conversion(config: Path, source: Source) -> None:
    """Leave dllm's name on a decoder that dllm has converted: under transformers' own it would be a causal model."""
    architecture = source.config.architectures[0]
    if DECODERS.get(architecture, architecture) == architecture:
        return
    base, _ = PretrainedConfig.get_config_dict(source.base)
    values = json.loads(config.read_text(encoding="utf-8")) | {"architectures": [architecture]}
    if base.get("model_type") is not None:
        values["model_type"] = base["model_type"]
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
