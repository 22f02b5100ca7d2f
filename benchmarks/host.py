"""What a step costs beside its arithmetic: models of the published numbers of layers and experts, and hardly any width.

Their steps are Python and launches. A dense model of as many layers says what is due to experts. What a GPU has to read
and write is counted at the published widths, by running the trainer's step on tensors without memory.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dllm_memdlm.backbones import layers, model_class, moe
from dllm_memdlm.config import ModelConfig
from dllm_memdlm.data import tokenizer_for
from dllm_memdlm.method.inner_loop import ParametricMemory
from dllm_memdlm.training.planner.live import grouped_output
from dllm_memdlm.training.planner.shapes import shape_model
from dllm_memdlm.training.planner.step import Sizes, fake_model, step
from dllm_memdlm.training.recipe import Recipe, load_recipe

from .device import PRODUCTS
from .full_size import trained
from .random_models import ALONE, random_model
from .report import Section

ATTENTION = tuple(f"aten::_scaled_dot_product_flash_attention_for_cpu{suffix}" for suffix in ("", "_backward"))
#: They compute nothing. Views do not either.
NOTHING = (
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_unsafe_view"),
    *("result_type", "promote_types"),
)
VOCABULARY = 263  #: a token for each byte, and a few more
NARROW = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": VOCABULARY, "pad_token_id": 0}
DENSE = "dense, 20 layers"
#: By name: the recipe, the architecture, and dimensions that differ from the published ones.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LLaDA2.1": (
        "llada2_mini",
        "LLaDA2MoeModelLM",
        NARROW | {"intermediate_size": 64, "moe_intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 16},
    ),
    "LLaDA-MoE": (
        "llada_moe",
        "LLaDAMoEModelLM",
        NARROW | {"dense_intermediate_size": 64, "expert_intermediate_size": 16},
    ),
    DENSE: (
        "llada_moe",
        "LlamaForCausalLM",
        NARROW | {"intermediate_size": 64, "num_key_value_heads": 2, "num_hidden_layers": 20},
    ),
}
#: To try the benchmark itself.
FEW = {"num_hidden_layers": 2}
ONE_EXAMPLE = (
    *("training.use_cpu=true", "training.per_device_train_batch_size=1", "training.dataloader_num_workers=0"),
    *("model.dtype=bfloat16", "data.max_length=30", "lora.r=4", "lora.alpha=8"),
)
UNPACKED = ("model.path=null", "model.load_in_4bit=false")


def host(quick: bool) -> Section:
    """Steps of one example of 30 tokens, in a trainer's own loop, and the way from the command to the first of them."""
    section = Section(
        "Host: hidden 64, one example of 30 tokens, bfloat16, checkpointing, LoRA of rank 4",
        ["model", "modules", "trainable tensors", "plain s", "MemDLM s", "MemDLM ÷ dense", "command to step 1, s"],
        "With the optimizer; the command with all its imports.",
    )
    dense = None
    for name in reversed(MODELS):
        path, architecture, dimensions = MODELS[name]
        dimensions = dimensions | (FEW if quick else {})
        recipe = load_recipe(
            f"recipes/{path}.yaml",
            [*ALONE, *UNPACKED, *ONE_EXAMPLE, f"model.architecture={architecture}", *_settings(dimensions)],
        )
        model = random_model(recipe)
        counts = sum(1 for _ in model.modules()), sum(p.requires_grad for p in model.parameters())
        seconds = [
            trained(model, recipe, dataclasses.replace(recipe.memory, enabled=on)).seconds for on in (False, True)
        ]
        dense = dense or seconds[1]
        start = None if name == DENSE else command_to_first_step(model.unload())
        section.rows.append([name, *counts, *seconds, seconds[1] / dense, start])
    return section


def command_to_first_step(model: nn.Module) -> float:
    """Seconds from the start of `python -m dllm_memdlm.train` on a saved model to the end of its first step.

    Raises:
        RuntimeError: it ended without one.
    """
    rows = [{"instruction": f"Say {number} twice.", "output": f"{number} and {number}"} for number in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        base, data, run, file = (Path(folder, name) for name in ("base", "rows.jsonl", "run", "recipe.yaml"))
        data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        model.save_pretrained(base)
        tokenizer = ModelConfig(architecture="-", tokenizer_vocab_size=VOCABULARY)
        tokenizer_for(tokenizer, lambda: [], base).save_pretrained(base)
        recipe = {
            "model": {"path": str(base), "dtype": "bfloat16"},
            "lora": {"r": 4, "alpha": 8},
            "data": {"dataset": str(data), "eval_fraction": 0.0},
            "training": {
                **{"output_dir": str(run), "max_steps": 1, "logging_steps": 1, "save_strategy": "no"},
                **{"gradient_checkpointing": True, "use_cpu": True, "disable_tqdm": True, "eval_strategy": "no"},
            },
        }
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        command = [sys.executable, "-u", "-m", "dllm_memdlm.train", str(file)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        start, output = time.perf_counter(), ""
        with subprocess.Popen(command, **pipes) as process:
            for line in process.stdout:
                output += line
                if "loss_memory_off" in line:
                    found = time.perf_counter() - start
                    process.stdout.read()
                    return found
    raise RuntimeError(f"no step: {output}")


def traffic(quick: bool) -> Section:
    """What a GPU has to launch, read and write in a step of the recipes, counted on tensors without memory."""
    section = Section(
        "Host: operators of a step at full size, and what those that are no products read and write",
        ["recipe", "bits", "plain operators", "MemDLM operators", "plain GB", "MemDLM GB"],
        "Forward and backward, without views; norms as the one kernel that they are on a GPU. Of a base in "
        "4 bit unpacking is not counted.",
    )
    for name in ("LLaDA2.1", "LLaDA-MoE"):
        for bits in (16, 4):
            counted = [step_traffic(name, bits, on, FEW if quick else {}) for on in (False, True)]
            operators = [sum(one.calls.values()) for one in counted]
            gigabytes = [sum(one.bytes.values()) / 1e9 for one in counted]
            section.rows.append([f"{MODELS[name][0]}.yaml", bits, *operators, *gigabytes])
    return section


def step_traffic(name: str, bits: int, memory: bool, dimensions: dict[str, Any]) -> Traffic:
    """One step of a recipe at the published dimensions, but for `dimensions`."""
    path, architecture, _ = MODELS[name]
    changes = [*ALONE, "training.use_cpu=true", f"model.architecture={architecture}", *(UNPACKED if bits == 16 else ())]
    recipe = load_recipe(f"recipes/{path}.yaml", changes)
    config = model_class(architecture).config_class(**dimensions)
    config.architectures = [architecture]
    config._attn_implementation = recipe.model.attn_implementation
    return _count(recipe, shape_model(recipe, config), memory)


def _count(recipe: Recipe, model: nn.Module, memory: bool) -> Traffic:
    """The planner's step with all operators counted. An eighth of every example is masked."""
    args = recipe.training
    sizes = Sizes(
        batch=args.train_batch_size,
        length=recipe.data.max_length,
        masked=recipe.data.max_length // 8,
        norm=args.loss_norm_type,
        amp=torch.bfloat16 if args.bf16 else None,
        checkpointing=args.gradient_checkpointing,
    )
    own = ParametricMemory(model, recipe.memory, mask_token_id=0) if memory else None
    mode, counted = fake_model(model, sizes), Traffic()
    _FusedNorm.put_into(model)
    # rows are packed as on a GPU, and the LoRA's input is cast as in `train`
    with patch.object(moe, "FEW_ROWS", 0), disable_input_dtype_casting(model):
        step(model, mode, own, sizes, watch=counted)
    return counted


class Traffic(TorchDispatchMode):
    """Counts operators that compute, and the bytes that those which are no products read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            out = grouped_output(*args, **kwargs)  # torch's shape function knows bfloat16 only
        else:
            out = func(*args, **kwargs)
        schema, name = func._schema, func._schema.name
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)
        if is_view or name.startswith("prim") or name.removeprefix("aten::") in NOTHING:
            return out
        self.calls[name] += 1
        if name not in (*PRODUCTS, *ATTENTION):
            written = () if schema.is_mutable else out  # what is changed in place is among the arguments
            self.bytes[name] += sum(t.nbytes for t in tree_iter((args, kwargs, written)) if isinstance(t, Tensor))
        return out


class _FusedNorm(torch.autograd.Function):
    """Reads and writes what a GPU's kernel for a norm does: on a CPU it is made of many operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + ctx.saved_tensors[0]

    @classmethod
    def put_into(cls, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, layers.RMSNorm):
                module.forward = cls.apply


def _settings(dimensions: dict[str, Any]) -> list[str]:
    return [f"model.dimensions.{name}={value}" for name, value in dimensions.items()]
