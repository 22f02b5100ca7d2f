"""What the backbones are made of, against transformers' own: rotary positions and norms, forward and backward."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close_relative
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

from dllm_memdlm.backbones.layers import RMSNorm, rotate


@pytest.mark.parametrize("turned", [8, 4], ids=["all features", "half of them"])
def test_rotation(turned):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(1, 5, turned // 2, generator=generator, dtype=torch.float64).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    first, rest = x[..., :turned], x[..., turned:]
    expected = torch.cat([first * cos[:, None] + rotate_half(first) * sin[:, None], rest], dim=-1)
    torch.testing.assert_close(rotate(x, cos, sin), expected, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda value: rotate(value, cos, sin), (x,))
    low = rotate(x.detach().bfloat16().requires_grad_(), cos.float(), sin.float())
    assert low.dtype == torch.float32
    low.sum().backward()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("autocast", [False, True])
def test_norm(autocast, dtype, tolerance):
    """In the dtype of its input, under autocast too."""
    results = []
    for kind in (LlamaRMSNorm, RMSNorm):
        norm = kind(16, eps=1e-5)
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        norm.weight.data = torch.linspace(0.5, 1.5, 16).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = norm(x)
        output.float().square().sum().backward()
        results.append((output, x.grad, norm.weight.grad))
    for expected, found in zip(*results, strict=True):
        assert_close_relative(found, expected, tolerance)
        assert found.dtype == dtype
