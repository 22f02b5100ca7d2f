"""A recipe's model as shapes, as it would be loaded, in 4 bit too; parts of it can be run on fake tensors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..backbones import load_model, staged_backbone, with_lora
from ..backbones.moe import RoutedExperts
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
        setattr(parent, name, PackedLinear(linear, compute_dtype))
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def packable(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers that loading in 4 bit packs, all but the output: parent, name, layer."""
    output = staged_backbone(model).get_output_embeddings()
    children = [(parent, *child) for parent in model.modules() for child in parent.named_children()]
    return [found for found in children if type(found[2]) is nn.Linear and found[2] is not output]


class PackedLinear(nn.Linear):
    """Stands in for bitsandbytes' Linear4bit, which cannot be made without a device: the same bytes at the same times.

    Forward and backward each unpack the weight for the moment of the product; nothing of it is kept for the backward.
    """

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute_dtype = linear.in_features, linear.out_features, compute_dtype
        numel = linear.weight.numel()
        blocks = math.ceil(numel / BLOCK)
        packed = torch.empty(math.ceil(numel / 2), 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        constants = blocks + 4 * math.ceil(blocks / SCALES) + TABLES
        self.register_buffer("constants", torch.empty(constants, dtype=torch.uint8), persistent=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        output = _PackedProduct.apply(x.to(self.compute_dtype), self.weight, (self.out_features, self.in_features))
        return (output if self.bias is None else output + self.bias.to(output.dtype)).to(x.dtype)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return F.linear(x, packed.new_empty(shape, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ gradient.new_empty(ctx.shape), None, None


class ShapeExperts(RoutedExperts):
    """Routed experts whose tensors have no addresses: their stacked weights are found by name."""

    def _pack(self, name: str, weights: list[Tensor]) -> Tensor | None:
        return self._packed.get(name)

    @staticmethod
    def _is_packed(linear: nn.Module) -> bool:
        return isinstance(linear, PackedLinear)

    @staticmethod
    def _unpack(linears: list[PackedLinear]) -> Tensor:
        first = linears[0]
        return torch.empty(len(linears), first.out_features, first.in_features, dtype=first.compute_dtype)

    @classmethod
    def put_into(cls, module: nn.Module, packs: bool) -> None:
        """In place of all routed experts. `packs`: frozen weights are stacked already."""
        for experts in [part for part in module.modules() if isinstance(part, RoutedExperts)]:
            experts.__class__ = cls
            for name, child in experts[0].named_children() if packs else ():
                linear = _base(child)
                if type(linear) is nn.Linear and not linear.weight.requires_grad:
                    experts._packed[name] = linear.weight.new_empty(len(experts), *linear.weight.shape)


def _base(linear: nn.Module) -> nn.Module:
    """The layer inside PEFT's wrapper, or the layer itself."""
    return linear.get_base_layer() if isinstance(linear, BaseTunerLayer) else linear


class FusedDropout(nn.Module):
    """Dropout as a GPU does it: the mask takes a byte an element. On a CPU it is of the input's dtype."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, True)[0] if self.training and self.p > 0 else x

    @classmethod
    def put_into(cls, module: nn.Module) -> None:
        """In place of every dropout layer."""
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Dropout:
                    setattr(parent, name, cls(child.p).train(child.training))


def materialise(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn a module's tensors from meta into fake ones, in place; to be called under FakeTensorMode.

    `dtype`, if given, becomes that of all floating tensors.
    """

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=dtype if dtype and tensor.is_floating_point() else tensor.dtype)

    module._apply(fake)


def held_bytes(module: nn.Module, trainable: bool = False, cast: torch.dtype | None = None) -> int:
    """Bytes of a module's tensors, or of the parameters that train; with `cast` all floating ones are of that dtype."""
    tensors = [p for p in module.parameters() if p.requires_grad or not trainable]
    tensors += [] if trainable else module.buffers()
    return sum(t.numel() * (cast.itemsize if cast and t.is_floating_point() else t.element_size()) for t in tensors)


def parameter_count(module: nn.Module, trainable: bool = False) -> int:
    """Parameters, or those that train; a packed weight counts as what it stands for."""
    packed = [part for part in module.modules() if isinstance(part, PackedLinear)]
    hidden = 0 if trainable else sum(p.in_features * p.out_features - p.weight.numel() for p in packed)
    return hidden + sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def active_count(model: nn.Module) -> int:
    """Parameters that one token passes through: of routed experts as many as it is sent to."""
    chosen = staged_backbone(model).config.to_dict().get("num_experts_per_tok")
    idle = 0
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            idle += parameter_count(module) * (len(module) - chosen) // len(module)
    return parameter_count(model) - idle
