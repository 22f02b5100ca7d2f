"""Recipes at full size without their weights: the same model, in the same precision, with random ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dllm_memdlm.backbones import config_of, load_model, with_lora
from dllm_memdlm.backbones.experts import ExpertLinear, PackedExpertLinear
from dllm_memdlm.backbones.loading import keep_4bit_weights_as_packed
from dllm_memdlm.training.planner import Plan, make_plans
from dllm_memdlm.training.planner.shapes import packable
from dllm_memdlm.training.recipe import Recipe, load_recipe

#: A step, and nothing around it; every response token masked, as the planner assumes.
ALONE = (
    *("training.gradient_accumulation_steps=1", "training.engine=auto", "training.time_epsilon=0.999"),
    *("training.eval_strategy='no'", "training.save_strategy='no'", "training.disable_tqdm=true"),
    *("training.logging_steps=1000", "training.logging_first_step=false"),
)
#: In 4 bit a recipe has to name a checkpoint. This one is never looked for.
BITS = {
    16: ("model.path=null", "model.load_in_4bit=false"),
    4: ("model.path=random", "model.load_in_4bit=true"),
}
#: Dimensions to try a benchmark with on a CPU.
SMALL: dict[str, dict[str, Any]] = {
    "LLaDAMoEModelLM": {"expert_intermediate_size": 64, "dense_intermediate_size": 64},
    "LLaDA2MoeModelLM": {
        **{"moe_intermediate_size": 64, "intermediate_size": 64},
        **{"num_key_value_heads": 2, "n_group": 2, "topk_group": 1},
    },
}
SMALL_COMMON = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512},
    **{"num_experts": 4, "num_experts_per_tok": 2},
}
SMALL_RECIPE = (
    *("training.use_cpu=true", "training.per_device_train_batch_size=2", "data.max_length=64"),
    *("lora.r=8", "lora.alpha=16", "memory.rank=8", "memory.alpha=16", "memory.layer_fraction=0.3"),
)
RATIO = 7  #: prompt tokens to one of the response


def recipe_of(path: str, bits: int, overrides: Sequence[str] = (), small: bool = False) -> Recipe:
    """A recipe whose steps stand alone, its base in 16 or 4 bit. `small` cuts it down for a CPU."""
    cut: list[str] = []
    if small:
        architecture = load_recipe(path).model.architecture
        dimensions = {**SMALL_COMMON, **SMALL[architecture]}
        cut = [*SMALL_RECIPE, *(f"model.dimensions.{name}={value}" for name, value in dimensions.items())]
    return load_recipe(path, [*ALONE, *BITS[bits], *cut, *overrides])


def random_model(recipe: Recipe) -> nn.Module:
    """The recipe's model with its LoRA, made on the recipe's device."""
    bare = _bare(recipe)
    with recipe.training.device:
        model = load_model(bare.model, config_of(bare.model), seed=recipe.training.seed)
        if recipe.model.load_in_4bit:
            quantise(model, recipe.training.device)
        return with_lora(model, recipe.lora) if recipe.lora.enabled else model


def quantise(model: nn.Module, device: torch.device) -> None:
    """Pack every linear layer but the output, as `from_pretrained` does: NF4, the scales packed too."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    settings = {"quant_type": "nf4", "compress_statistics": True}
    for parent, name, linear in packable(model):
        if isinstance(linear, ExpertLinear):
            packed = [quantize_4bit(matrix.to(device), **settings) for matrix in linear.weight.data]
            setattr(parent, name, PackedExpertLinear(packed, linear.weight.dtype))
            continue
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        packed = Linear4bit(*sizes, compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta")
        weight = Params4bit(linear.weight.data, requires_grad=False, **settings)
        packed.weight, packed.bias = weight.to(device), linear.bias
        linear.weight = None  # before the next one is packed
        setattr(parent, name, packed)
    keep_4bit_weights_as_packed(model)
    model.is_loaded_in_4bit = True


def plans_of(recipe: Recipe) -> dict[bool, Plan]:
    """What the planner says of a step without memory and with it; for a GPU, unless the recipe is for a CPU."""
    config, device = config_of(_bare(recipe).model), "cpu" if "use_cpu" in recipe.values["training"] else "cuda"
    return make_plans(recipe, config, response_share=1 / (RATIO + 1), device=device)


def _bare(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, path=None, load_in_4bit=False))
