"""A recipe's model as shapes, as it would be loaded, in 4 bit too; parts of it can be run on fake tensors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from ...backbones import load_model, staged_backbone, with_lora
from ...backbones.experts import ExpertLinear
from ...backbones.moe import RoutedExperts
from ..recipe import Recipe

#: NF4 as bitsandbytes stores it: blocks of 64 weights share a scale of one byte, and 256 scales a float32.
BLOCK, SCALES = 64, 256
#: Its tables beside each matrix: 16 levels, 256 levels of the scales and their mean, float32.
TABLES = 4 * (16 + 256 + 1)


def shape_model(recipe: Recipe, config: PretrainedConfig) -> nn.Module:
    """The model of a recipe on the meta device, LoRA included: nothing is allocated, and no weight is read."""
    architecture = (config.architectures or [recipe.model.architecture])[0]
    bare = dataclasses.replace(recipe.model, path=None, load_in_4bit=False, architecture=architecture)
    with torch.device("meta"):
        model = load_model(bare, config)
        if recipe.model.load_in_4bit:
            quantise(model, getattr(torch, recipe.model.dtype))
        return with_lora(model, recipe.lora) if recipe.lora.enabled else model


def quantise(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """What loading in 4 bit does: linear layers but the output are packed, PEFT makes all else float32."""
    for parent, name, linear in packable(model):
        packed = PackedExperts if isinstance(linear, ExpertLinear) else PackedLinear
        setattr(parent, name, packed(linear, compute_dtype))
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def packable(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """The linear layers that loading in 4 bit packs, all but the output: parent, name, layer."""
    output = staged_backbone(model).get_output_embeddings()
    children = [(parent, *child) for parent in model.modules() for child in parent.named_children()]
    return [found for found in children if type(found[2]) in (nn.Linear, ExpertLinear) and found[2] is not output]


class PackedLinear(nn.Linear):
    """Stands in for bitsandbytes' Linear4bit, which cannot be made without a device: the same bytes at the same times.

    Forward and backward each unpack the weight for the moment of the product; nothing of it is kept for the backward.
    """

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute_dtype = linear.in_features, linear.out_features, compute_dtype
        self.weight, self.constants = _packed(linear.weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        output: Tensor = _PackedProduct.apply(x.to(self.compute_dtype), self.weight, shape)
        return (output if self.bias is None else output + self.bias.to(output.dtype)).to(x.dtype)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return F.linear(x, packed.new_empty(shape, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ gradient.new_empty(ctx.shape), None, None


class PackedExperts(ExpertLinear):
    """Stands in for the experts' layers in 4 bit, as PackedLinear for others."""

    def __init__(self, linear: ExpertLinear, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.experts, self.in_features, self.out_features = linear.experts, linear.in_features, linear.out_features
        self.computes_in = compute_dtype
        self.weight, self.constants = _packed(linear.weight[0], self.experts)

    @property
    def matrices(self) -> Any:
        shape = (self.experts, self.out_features, self.in_features)
        return lambda: self.weight.new_empty(shape, dtype=self.computes_in)


def _packed(matrix: Tensor, count: int = 1) -> tuple[nn.Parameter, nn.Parameter]:
    """The bytes of so many packed matrices of a size, and those of what belongs to them."""
    numel = matrix.numel()
    blocks = math.ceil(numel / BLOCK)
    constants = count * (blocks + 4 * math.ceil(blocks / SCALES) + TABLES)
    packed = (torch.empty(size, dtype=torch.uint8) for size in (count * math.ceil(numel / 2), constants))
    weight, others = (nn.Parameter(part, requires_grad=False) for part in packed)
    return weight, others


def held_bytes(module: nn.Module, trainable: bool = False, cast: torch.dtype | None = None) -> int:
    """Bytes of a module's tensors, or of the parameters that train; with `cast` all floating ones are of that dtype."""
    tensors: list[Tensor] = [p for p in module.parameters() if p.requires_grad or not trainable]
    tensors += [] if trainable else module.buffers()
    return sum(t.numel() * (cast.itemsize if cast and t.is_floating_point() else t.element_size()) for t in tensors)


def parameter_count(module: nn.Module, trainable: bool = False) -> int:
    """Parameters, or those that train; a packed weight counts as what it stands for."""
    count = sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)
    for part in [] if trainable else module.modules():
        if isinstance(part, (PackedLinear, PackedExperts)):
            stands_for = getattr(part, "experts", 1) * part.in_features * part.out_features
            count += stands_for - part.weight.numel() - part.constants.numel()
    return count


def active_count(model: nn.Module) -> int:
    """Parameters that one token passes through: of routed experts as many as it is sent to."""
    chosen = staged_backbone(model).config.to_dict().get("num_experts_per_tok")
    idle = 0
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            idle += parameter_count(module) * (len(module) - chosen) // len(module)
    return parameter_count(model) - idle
