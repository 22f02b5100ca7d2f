"""Where fast weights go: which layers, and which linear layers in them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..config import ConfigError, MemoryConfig
from .expert_names import PROJECTIONS
from .experts import without_adapters
from .moe import RoutedExperts
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

    def asked(path: str) -> bool:
        return any(f".{path}".endswith(f".{name}") for name in targets.values())

    names: set[str] = set()
    for index in layers:
        done: list[str] = []  # modules whose insides are spoken for
        for path, module in model.layers[index].named_modules():
            full = f"{model.layers_path}.{index}.{path}"
            if any(path.startswith(f"{outer}.") for outer in done):
                continue
            if isinstance(module, RoutedExperts):
                done.append(path)
                for name in PROJECTIONS:
                    names.add(name)
                    if asked(name):
                        linear = getattr(module, name)
                        shape = SiteShape(f"{full}.{name}", linear.in_features, linear.out_features, len(module))
                        sites.append(Site(shape, module, name))
            elif _is_linear(module):
                done.append(path)  # a PEFT layer holds linear layers of its own
                name = path.rpartition(".")[2]
                names.add(name)
                if asked(path):
                    sites.append(Site(SiteShape(full, module.in_features, module.out_features), module, name))
    for target, name in targets.items():
        if not any(f".{site.shape.name}".endswith(f".{name}") for site in sites):
            raise ConfigError(
                f"memory.target_modules: {target!r} matches nothing in layers {layers.start}-{layers.stop - 1} of "
                f"{type(model).__name__}; linear layers there: {', '.join(sorted(names))}"
            )
    return sites


def _is_linear(module: nn.Module) -> bool:
    return isinstance(without_adapters(module), nn.Linear)
