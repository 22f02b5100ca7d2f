"""Engines: DDP, FSDP2 or a ZeRO stage of DeepSpeed, chosen by a recipe's `training.engine` or by accelerate's launcher.

The files beside this one hold their settings, in accelerate's and in DeepSpeed's own words.
"""

from __future__ import annotations

import importlib.util
import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, patch_environment
from torch import nn
from torch.distributed.fsdp import StateDictType

from ...backbones.moe import RoutedExperts
from ...config import ConfigError

#: `auto` is what the launcher was configured for, DDP by default.
Engine = Literal["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"]

FILES = Path(__file__).parent


def prepare(args: Any) -> None:
    """Check `args.engine` and set what transformers reads of it. For arguments that transformers has not read yet.

    With one process there is nothing to share out, and the engine is left out.

    Raises:
        ConfigError: the launcher or another argument has chosen an engine too; DeepSpeed is not installed.
    """
    launched = launched_engine()
    if args.engine != "auto":
        for other, chosen in (("deepspeed", args.deepspeed), ("fsdp", args.fsdp)):
            if chosen:
                raise ConfigError(
                    f"training.engine={args.engine!r} and training.{other} are both set; give one of them"
                )
        if launched is not None:
            raise ConfigError(
                f"training.engine={args.engine!r}: accelerate's configuration has chosen {launched} already; leave one "
                "of them out (training.engine=auto takes accelerate's)"
            )
    if args.engine.startswith("zero") and _several():
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError(
                f"training.engine={args.engine!r}: expected deepspeed (pip install 'dllm-memdlm[deepspeed]')"
            )
        args.deepspeed = json.loads((FILES / f"{args.engine}.json").read_text(encoding="utf-8"))
        if args.use_cpu:
            args.deepspeed["zero_optimization"]["overlap_comm"] = False  # which needs streams
    if args.use_cpu and (args.deepspeed or launched == "DeepSpeed"):
        with in_force(args):
            import deepspeed

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles a kernel for minutes
            if "RANK" in os.environ:  # ZeRO-3 loads a checkpoint in parts before accelerate tells of other processes
                deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def in_force(args: Any) -> AbstractContextManager[None]:
    """Put what accelerate, transformers and DeepSpeed read of an engine into the environment, for a while.

    They leave it there for good, and the next run of this process would go on with it.
    """
    low = "bf16" if args.bf16 else "fp16" if args.fp16 else os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    found = {"ACCELERATE_MIXED_PRECISION": low}
    if args.use_cpu:  # and not cpu:1, which checkpoints are not loaded to; DeepSpeed must know before it is imported
        found |= {name: os.environ.get(name, "cpu") for name in ("ACCELERATE_TORCH_DEVICE", "DS_ACCELERATOR")}
    if args.deepspeed:
        found["ACCELERATE_USE_DEEPSPEED"] = "true"
    if args.engine == "fsdp2" and _several():
        # As accelerate's launcher does. transformers' own arguments reach FSDP1's settings only.
        settings = yaml.safe_load((FILES / "fsdp2.yaml").read_text(encoding="utf-8"))["fsdp_config"]
        found["ACCELERATE_USE_FSDP"] = "true"
        found |= {name: str(v).lower() if isinstance(v, bool) else str(v) for name, v in settings.items()}
    environment: AbstractContextManager[None] = patch_environment(**found)
    return environment


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def launched_engine() -> str | None:
    """The engine that accelerate's launcher, or somebody's environment, has chosen."""
    for name, variable in (("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"), ("FSDP", "ACCELERATE_USE_FSDP")):
        if os.environ.get(variable, "").lower() in ("true", "1"):
            return name
    return None


def _fsdp(args: Any) -> bool:
    return launched_engine() == "FSDP" or (args.engine == "fsdp2" and _several())


def describe(accelerator: Accelerator) -> str:
    """What runs, in a few words, as accelerate has it: `ZeRO-2, 8 processes`."""
    kind, count = accelerator.distributed_type, accelerator.num_processes
    if kind == DistributedType.NO:
        return "one process"
    if kind == DistributedType.DEEPSPEED:
        name = f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    elif kind == DistributedType.FSDP:
        name = f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}"
    else:
        name = "DDP"
    return f"{name}, {count} process{'es' if count > 1 else ''}"


def check(accelerator: Accelerator, args: Any) -> None:
    """Refuse what could not be saved or trained. Raises ConfigError."""
    state = accelerator.state
    if state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ConfigError(
            f"dynamo_backend={state.dynamo_plugin.backend.value}: expected none; fast weights come and go, "
            "which a compiled model does not see"
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        if _fsdp(args) and accelerator.num_processes > 1:
            raise ConfigError(
                "FSDP2: expected GPUs, as accelerate has DDP in its place on CPUs; take ddp or a zero stage"
            )
        return
    plugin = state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ConfigError(f"FSDP{plugin.fsdp_version}: expected FSDP2 (training.engine=fsdp2, or fsdp_version: 2)")
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ConfigError(
            f"fsdp_state_dict_type={plugin.state_dict_type.name}: expected FULL_STATE_DICT, with which weights are "
            "saved whole (as under training.engine=fsdp2)"
        )


def shares_weights(args: Any) -> bool:
    """Whether the weights themselves are in parts (ZeRO-3, FSDP), by training arguments."""
    return _fsdp(args) or (args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3)


def fit(model: nn.Module, args: Any) -> None:
    """Prepare a model's experts for ZeRO-3: the forward of the layers that hold their weights is never called."""
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3 and any(isinstance(m, RoutedExperts) for m in model.modules()):
        import deepspeed

        deepspeed.utils.set_z3_leaf_modules(model, [RoutedExperts])
