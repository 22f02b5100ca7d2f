"""Engines: DDP, FSDP2 or a ZeRO stage of DeepSpeed, chosen by a recipe's `training.engine`, in transformers' terms.

`recipes/accelerate` and `recipes/deepspeed` hold the same configurations for accelerate's own launcher.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from torch.distributed.fsdp import StateDictType

from ..backbones.moe import RoutedExperts
from ..config import ConfigError

#: `auto` is what the launcher was configured for, DDP by default.
ENGINES = ("auto", "ddp", "fsdp2", "zero1", "zero2", "zero3")

#: What accelerate's launcher sets for FSDP2. transformers' own arguments reach FSDP1's settings only.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}

#: Variables of the environment that an engine of this process has left there, for the next run to clear away.
_ours: set[str] = set()


def zero_config(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a ZeRO stage; transformers fills in what is `auto`."""
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": "auto"}
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            # By default small parameters stay whole on every GPU, and those of a LoRA are small.
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    automatic = ("gradient_clipping", "gradient_accumulation_steps", "train_batch_size")
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        **dict.fromkeys((*automatic, "train_micro_batch_size_per_gpu"), "auto"),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def prepare(args: Any) -> None:
    """Put `args.engine` into force. For training arguments that transformers has not read yet.

    With one process there is nothing to share out, and the engine is left out.

    Raises:
        ConfigError: the launcher or another argument has chosen an engine too; DeepSpeed is not installed.
    """
    for name in _ours:
        os.environ.pop(name, None)
    _ours.clear()
    launched = launched_engine()
    if args.use_cpu:
        _leave("ACCELERATE_TORCH_DEVICE", "cpu")  # and not cpu:1, which checkpoints are not loaded to
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
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
    if not alone and args.engine == "fsdp2":
        os.environ.update(FSDP2)
        _ours.update(FSDP2)
    if not alone and args.engine.startswith("zero"):
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError(
                f"training.engine={args.engine!r}: expected deepspeed (pip install 'dllm-memdlm[deepspeed]')"
            )
        args.deepspeed = zero_config(int(args.engine[-1]))
        if args.use_cpu:
            args.deepspeed["zero_optimization"]["overlap_comm"] = False  # which needs streams
    if args.deepspeed:
        _ours.add("ACCELERATE_USE_DEEPSPEED")  # transformers sets it
    if (args.bf16 or args.fp16) and os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no":
        _ours.add("ACCELERATE_MIXED_PRECISION")  # and this
    if args.use_cpu and (args.deepspeed or launched == "DeepSpeed"):
        _settle_deepspeed_on_cpu()


def _leave(name: str, value: str) -> None:
    """Set a variable until the next run, unless somebody else has."""
    if name not in os.environ:
        os.environ[name] = value
        _ours.add(name)


def launched_engine() -> str | None:
    """The engine that accelerate's launcher, or somebody's environment, has chosen."""
    for name, variable in (("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"), ("FSDP", "ACCELERATE_USE_FSDP")):
        if _is_on(variable):
            return name
    return None


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1")


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


def _settle_deepspeed_on_cpu() -> None:
    """DeepSpeed must be told so before it is imported, must not compile a kernel of its own for minutes, and must know
    of the other processes when ZeRO-3 loads a checkpoint in parts (on GPUs accelerate sees to that)."""
    _leave("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" in os.environ:
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def allow_fsdp_on_cpus() -> None:
    """For an Accelerator that is about to be made: use FSDP on CPUs too, which accelerate (1.11) overlooks."""
    state = PartialState._shared_state
    if _is_on("ACCELERATE_USE_FSDP") and state.get("distributed_type") == DistributedType.MULTI_CPU:
        state["distributed_type"] = DistributedType.MULTI_GPU


def check(accelerator: Accelerator) -> None:
    """Refuse what could not be saved or trained. Raises ConfigError."""
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ConfigError(
            f"dynamo_backend={accelerator.state.dynamo_plugin.backend.value}: expected none; fast weights come and go, "
            "which a compiled model does not see"
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ConfigError(f"FSDP{plugin.fsdp_version}: expected FSDP2 (training.engine=fsdp2, or fsdp_version: 2)")
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ConfigError(
            f"fsdp_state_dict_type={plugin.state_dict_type.name}: expected FULL_STATE_DICT, with which weights are "
            "saved whole (training.engine=fsdp2, or recipes/accelerate/fsdp2.yaml)"
        )


def shares_weights(args: Any) -> bool:
    """Whether the weights themselves are in parts (ZeRO-3, FSDP), by training arguments that are in force."""
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    return zero3 or _is_on("ACCELERATE_USE_FSDP")


def fit(model: nn.Module, args: Any) -> None:
    """Prepare a model's experts for ZeRO-3: the forward of the layers that hold their weights is never called."""
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3 and any(isinstance(m, RoutedExperts) for m in model.modules()):
        import deepspeed

        deepspeed.utils.set_z3_leaf_modules(model, [RoutedExperts])
