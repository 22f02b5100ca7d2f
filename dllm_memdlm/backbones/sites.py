"""Where fast weights go: which layers, and which linear layers in them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..config import ConfigError, MemoryConfig
from .experts import ExpertLinear, outermost, without_adapters
from .site_weights import SiteShape
from .staged import StagedForward


@dataclass(frozen=True)
class Site:
    """A place for fast weights in a model: a linear layer, or one projection of a layer's routed experts."""

    shape: SiteShape
    module: nn.Module  #: the linear layer as the model calls it (PEFT's wrapper included), or the RoutedExperts
    projection: str  #: its own name, `down_proj`


def adapted_layers(count: int, config: MemoryConfig) -> range:
    """Layers with fast weights, of `count`: from int(n · (1 - fraction)) on."""
    return range(int(count * (1 - config.layer_fraction)), count)


def find_sites(model: StagedForward, config: MemoryConfig) -> list[Site]:
    """The places for fast weights, in the order of the layers.

    Raises:
        ConfigError: a target names no linear layer in the adapted layers; the message lists those there are.
    """
    layers = adapted_layers(len(model.layers), config)
    targets = {target: model.own_names.get(target, target) for target in config.target_modules}
    sites: list[Site] = []
    names: set[str] = set()
    for index in layers:
        for path, module in outermost(model.layers[index]):
            linear = without_adapters(module)
            if not isinstance(linear, (nn.Linear, ExpertLinear)):
                continue
            parent, _, name = path.rpartition(".")
            names.add(name)
            if any(f".{path}".endswith(f".{target}") for target in targets.values()):
                sizes = module.in_features, module.out_features, getattr(linear, "experts", None)
                shape = SiteShape(f"{model.layers_path}.{index}.{path}", *sizes)
                place = module if shape.experts is None else model.layers[index].get_submodule(parent)
                sites.append(Site(shape, place, name))
    for target, name in targets.items():
        if not any(f".{site.shape.name}".endswith(f".{name}") for site in sites):
            raise ConfigError(
                f"memory.target_modules: {target!r} matches nothing in layers {layers.start}-{layers.stop - 1} of "
                f"{type(model).__name__}; linear layers there: {', '.join(sorted(names))}"
            )
    return sites
