"""Fast weights of a dense and a routed site, for five samples."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_memdlm.backbones.site_weights import SiteShape
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.method import noise
from dllm_memdlm.method.fast_weights import FastWeights

HERE = torch.get_default_device()
DENSE = SiteShape("layers.3.mlp.up_proj", in_features=24, out_features=16)
EXPERTS = SiteShape("layers.3.mlp.experts.down_proj", in_features=16, out_features=24, experts=5)
KEYS = noise.example_keys(42, 0, torch.arange(5))


def config_of(**values) -> MemoryConfig:
    return MemoryConfig(**({"rank": 4, "alpha": 8.0} | values))


def initial(config: MemoryConfig | None = None, keys: Tensor = KEYS) -> FastWeights:
    return FastWeights.initial([DENSE, EXPERTS], config or config_of(), keys, HERE)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def written(config: MemoryConfig | None = None, keys: Tensor = KEYS) -> FastWeights:
    """Fast weights none of whose tensors is zero."""
    fast = initial(config, keys)
    return FastWeights({k: randn(*v.shape, seed=i) for i, (k, v) in enumerate(fast.tensors.items())}, fast.scaling)
