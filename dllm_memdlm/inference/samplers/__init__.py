"""Decoding: low-confidence remasking (LLaDA, LLaDA-MoE), block diffusion with token editing (LLaDA2.1), Dream's."""

from .base import CanvasSampler, SamplerConfig, completions
from .dream import DreamSampler, DreamSamplerConfig
from .llada21 import LLaDA21Sampler, LLaDA21SamplerConfig
from .mdlm import MDLMSampler, MDLMSamplerConfig

__all__ = [
    "CanvasSampler",
    "DreamSampler",
    "DreamSamplerConfig",
    "LLaDA21Sampler",
    "LLaDA21SamplerConfig",
    "MDLMSampler",
    "MDLMSamplerConfig",
    "SamplerConfig",
    "completions",
]
