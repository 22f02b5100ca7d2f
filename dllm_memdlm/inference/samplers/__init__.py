"""Decoding: low-confidence remasking (LLaDA, LLaDA-MoE), block diffusion (LLaDA2.0, and 2.1 with editing), Dream's."""

from .base import CanvasSampler, SamplerConfig, completions
from .dream import DreamSampler, DreamSamplerConfig
from .llada21 import LLaDA2Sampler, LLaDA2SamplerConfig, LLaDA21Sampler, LLaDA21SamplerConfig
from .mdlm import MDLMSampler, MDLMSamplerConfig

__all__ = [
    "CanvasSampler",
    "DreamSampler",
    "DreamSamplerConfig",
    "LLaDA2Sampler",
    "LLaDA2SamplerConfig",
    "LLaDA21Sampler",
    "LLaDA21SamplerConfig",
    "MDLMSampler",
    "MDLMSamplerConfig",
    "SamplerConfig",
    "completions",
]
