"""A plain checkpoint of a trained model: the adapter added to the weights, nothing left that needs PEFT."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PretrainedConfig

from ..backbones import DECODERS
from ..config import ConfigError
from ..training.model_card import Training, label, write_card
from ..training.recipe import FILE_NAME
from ..versions import readable_by_both
from .pretrained import Pretrained, Source, file_beside, find_source, load_pretrained


def export(
    model: str, out: str | Path, adapter: str | None = None, dtype: str = "auto", shard_size: str = "5GB"
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

    Returns:
        The folder.

    Raises:
        ConfigError: a model or adapter is not there or does not fit, its weights are quantised, or `out` cannot be
            written.
    """
    out = _free_folder(out)
    source = find_source(model, adapter)
    if "quantization_config" in source.config.to_dict():
        raise ConfigError(
            f"pretrained={source.base!r}: quantised weights, which take no sum; give the model that they were made "
            f"from: --model BASE{f' --adapter {source.adapter}' if source.adapter else ''}"
        )
    dtype = source.dtype if dtype == "auto" else dtype
    own = dtype == source.dtype
    loaded = load_pretrained(model, adapter, dtype=dtype if own else "float32", merge_adapter=True)
    if not own:
        loaded.model.to(getattr(torch, dtype))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            folder = Path(scratch) / out.name
            _write(folder, loaded, source, dtype, shard_size)
            folder.rename(out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--out {out}: {getattr(error, 'strerror', None) or error}") from error
    return out


def _free_folder(out: str | Path) -> Path:
    """Return the whole path of `out`. Raises ConfigError unless it can be made, or is empty."""
    if not str(out):
        raise ConfigError("--out '': expected a folder that is empty or not there yet")
    out = Path(out).expanduser().absolute()
    above = next(folder for folder in (out, *out.parents) if os.path.exists(folder))
    if not above.is_dir():
        found = "a file" if above == out else f"{above} is a file"
        raise ConfigError(f"--out {out}: {found}; expected a folder that is empty or not there yet")
    if not os.access(above, os.W_OK):
        raise ConfigError(f"--out {out}: {above} may not be written to; expected a folder that may")
    if above == out and any(out.iterdir()):
        raise ConfigError(f"--out {out}: not empty; expected a folder that is empty or not there yet")
    return out


def _write(folder: Path, loaded: Pretrained, source: Source, dtype: str, shard_size: str) -> None:
    generation = file_beside(source.base, "generation_config.json")
    if generation is not None:  # copied as it is: transformers does not save again all that it reads
        loaded.model.generation_config = GenerationConfig()
    loaded.model.save_pretrained(folder, max_shard_size=shard_size)
    loaded.tokenizer.save_pretrained(folder)
    _keep_conversion(folder / "config.json", source)
    readable_by_both(folder)
    for found in (generation, source.recipe_file):
        if found is not None:
            shutil.copyfile(found, folder / found.name)
    home = source.folders[0]
    training = Training.of(file_beside(home, FILE_NAME), file_beside(home, "trainer_state.json"))
    what, base = f"{label(source.base)} in {dtype}.", training.section("model").get("path") or source.base
    if source.adapter is not None:
        base = source.base
        what = f"{label(base)} with the adapter {label(source.adapter)} added to its weights, in {dtype}."
        if training.section("model").get("load_in_4bit"):
            what += " The adapter was trained on the same weights in 4 bit, and is added to the full ones."
    write_card(folder, folder.name, what, training, base)


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
