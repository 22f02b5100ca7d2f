"""Low-rank pairs beside a model, saved as a LoRA of stock PEFT's: alone, or joined with the LoRA of the model.

Where a layer has both, it gets one pair: A = [A1; A2] and B = [s1·B1, s2·B2], with a scaling of 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import ConfigError
from .adapters import adapter_folder, read_adapter_config
from .expert_names import pattern_of, split_names, stack_names
from .lora import is_plain
from .site_weights import SiteWeights
from .staged import unwrapped
from .stock_peft import WEIGHTS, StockLoraConfig


def save_pairs(
    folder: Path, model: nn.Module, pairs: Mapping[str, SiteWeights], base: str, adapter: str | None = None
) -> None:
    """Save low-rank pairs, and the model's LoRA if it has one, as one adapter.

    Args:
        folder: where to; it must be there.
        model: a backbone, or PEFT's wrapper around one.
        pairs: of one sample, by the path of their layer in the backbone.
        base: what the adapter calls the model that it is for.
        adapter: folder or hub name of the LoRA that the model has.

    Raises:
        ConfigError: that adapter is no plain LoRA.
    """
    backbone, rank = unwrapped(model), next(iter(pairs.values())).up.shape[-1]
    layers = {path: layer for path, layer in backbone.named_modules() if isinstance(layer, LoraLayer)}
    config, state = StockLoraConfig(r=rank, lora_alpha=rank), dict[str, Tensor]()
    if adapter is not None:
        config, state = _plain_lora(adapter, layers)
    ranks = {path: layer.r["default"] for path, layer in layers.items()}
    alphas = {path: layer.lora_alpha["default"] for path, layer in layers.items()}
    for path, pair in pairs.items():
        prefix = f"base_model.model.{path}"
        names = [f"{prefix}.lora_{side}.weight" for side in "AB"]
        assert pair.down is not None  # a low-rank pair
        down, up = pair.down[..., 0, :, :], pair.up[..., 0, :, :] * pair.scaling
        if path in layers:
            down = torch.cat([state[names[0]].float(), down], dim=-2)
            up = torch.cat([state[names[1]].float() * layers[path].scaling["default"], up], dim=-1)
        elif f"{prefix}.bias" in state:  # trained, too, and now inside of PEFT's layer
            state[f"{prefix}.base_layer.bias"] = state.pop(f"{prefix}.bias")
        state |= zip(names, (down, up), strict=True)
        ranks[path] = rank = down.shape[-2]
        alphas[path] = rank**0.5 if config.use_rslora else rank
    # Whole paths, of which none fits another's layer: PEFT takes the first that fits, and sorts them when it saves.
    config.rank_pattern = {pattern_of(path): rank for path, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {pattern_of(path): alpha for path, alpha in alphas.items() if alpha != config.lora_alpha}
    if pairs.keys() - layers.keys():
        config.target_modules = "|".join(map(pattern_of, ranks))
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.base_model_name_or_path, config.revision, config.inference_mode = base, None, True
    mapping = {"base_model_class": type(backbone).__name__, "parent_library": type(backbone).__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=mapping)
    save_file(split_names(state), folder / WEIGHTS, {"format": "pt"})


def _plain_lora(adapter: str, layers: Mapping[str, LoraLayer]) -> tuple[StockLoraConfig, dict[str, Tensor]]:
    """The settings and the tensors of an adapter, as its files have them. Raises ConfigError unless it is plain."""
    folder, where = adapter_folder(adapter), f"adapter={adapter!r}"
    config = read_adapter_config(folder, where)
    # Some ways to begin, such as PiSSA, change the base's weights by as many dimensions as there are ranks.
    plain = isinstance(config, StockLoraConfig) and config.init_lora_weights in (True, False, "gaussian")
    if not plain or not all(map(is_plain, layers.values())):
        raise ConfigError(f"{where}: no plain LoRA; only such a one can be joined with a memory in one adapter")
    return config, stack_names(load_file(Path(folder, WEIGHTS)))
