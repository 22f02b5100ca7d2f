"""Decoding: low-confidence remasking (LLaDA, LLaDA-MoE) and block diffusion with token editing (LLaDA2.1)."""

from .base import CanvasSampler, SamplerConfig, completions
from .llada21 import LLaDA21Sampler, LLaDA21SamplerConfig
from .mdlm import MDLMSampler, MDLMSamplerConfig

__all__ = [
    "CanvasSampler",
    "LLaDA21Sampler",
    "LLaDA21SamplerConfig",
    "MDLMSampler",
    "MDLMSamplerConfig",
    "SamplerConfig",
    "completions",
]
