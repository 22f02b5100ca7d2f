"""What the memory must know of a model: its two stages, its layers, and the places for fast weights."""

from .adapters import load_adapter
from .adopt import adopt
from .decoder import DECODERS, bidirectional
from .dream import DreamConfig, DreamModel
from .llada import LLaDAConfig, LLaDAModelLM
from .llada2_moe import LLaDA2MoeConfig, LLaDA2MoeModelLM
from .llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM
from .loading import BUNDLED, config_of, load_model, model_class, read_config, staged_backbone, with_lora
from .modernbert import ModernBertForMaskedLM
from .sites import Site, adapted_layers, find_sites
from .staged import StagedForward, StageOutput

__all__ = [
    "BUNDLED",
    "DECODERS",
    "DreamConfig",
    "DreamModel",
    "LLaDA2MoeConfig",
    "LLaDA2MoeModelLM",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAMoEModelLM",
    "LLaDAModelLM",
    "ModernBertForMaskedLM",
    "Site",
    "StageOutput",
    "StagedForward",
    "adapted_layers",
    "adopt",
    "bidirectional",
    "config_of",
    "find_sites",
    "load_adapter",
    "load_model",
    "model_class",
    "read_config",
    "staged_backbone",
    "with_lora",
]
