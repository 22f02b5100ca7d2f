"""Engines by name: what is set for each and for how long, what is refused, and the commands that users type."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import DistributedType, DynamoBackend, FullyShardedDataParallelPlugin
from conftest import make_trainer, tiny
from small_run import write_recipe

import dllm_memdlm
from dllm_memdlm.backbones.moe import RoutedExperts, frozen
from dllm_memdlm.config import ConfigError
from dllm_memdlm.training import engines
from dllm_memdlm.training.trainer import MemDLMConfig

REPOSITORY = Path(dllm_memdlm.__file__).parents[1]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """No launcher's variables, and what a test leaves is gone after it."""
    accelerates = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_TORCH_DEVICE")
    for name in (*accelerates, "DS_ACCELERATOR", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def arguments(**settings: Any) -> SimpleNamespace:
    return SimpleNamespace(**dict.fromkeys(("deepspeed", "fsdp", "bf16", "fp16", "use_cpu")) | settings)


def set_by(engine: str, **settings: Any) -> dict[str, str]:
    """What a process of several finds in the environment."""
    args, before = arguments(engine=engine, **settings), dict(os.environ)
    engines.prepare(args)
    with engines.in_force(args):
        found = {name: value for name, value in os.environ.items() if before.get(name) != value}
    assert os.environ == before, "for a while only"
    return found


def test_one_process_has_nothing_to_share_out(tmp_path):
    for engine in typing.get_args(engines.Engine):
        args = MemDLMConfig(str(tmp_path), bf16=False, engine=engine)
        assert args.deepspeed is None and not args.fsdp and not engines.shares_weights(args)
        assert engines.launched_engine() is None


def test_a_name_stands_for_a_file(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for stage in (1, 2, 3):
        args = arguments(engine=f"zero{stage}")
        engines.prepare(args)
        assert args.deepspeed["zero_optimization"]["stage"] == stage
        assert args.deepspeed["train_micro_batch_size_per_gpu"] == "auto"
    assert args.deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] == 0, "LoRA is shared out, too"
    expected = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    assert (expected | {"FSDP_OFFLOAD_PARAMS": "false"}).items() <= set_by("fsdp2").items()
    assert set_by("zero2")["ACCELERATE_USE_DEEPSPEED"] == "true" and set_by("ddp") == {}


@pytest.mark.parametrize("own", [None, "cuda:3"])
def test_a_run_on_the_cpu_does_not_keep_the_next_one_from_the_gpu(own, monkeypatch):
    if own:  # what the user says is for all runs
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", own)
    assert set_by("auto", use_cpu=True).get("ACCELERATE_TORCH_DEVICE") == (None if own else "cpu")


@pytest.mark.parametrize("launched", [None, "no", "bf16"])
def test_another_run_does_not_inherit_bfloat16(launched, tokenizer, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    if launched:  # what accelerate's launcher says is for all runs
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    for low in (True, False):
        trainer = make_trainer(tiny("llama"), tokenizer, tmp_path, bf16=low)
        assert trainer.accelerator.mixed_precision == ("bf16" if low else launched or "no")
    assert os.environ.get("ACCELERATE_MIXED_PRECISION") == launched


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"torch_compile": True}, "training.torch_compile=True: expected none; fast weights come and go"),
        ({"engine": "zero4"}, "training.engine='zero4': expected one of auto, ddp, fsdp2, zero1, zero2, zero3"),
        ({"engine": "zero2", "fsdp": "full_shard"}, "training.engine='zero2' and training.fsdp are both"),
        ({"engine": "zero2", "deepspeed": {"a": 1}}, "training.engine='zero2' and training.deepspeed are both set"),
    ],
)
def test_arguments_that_cannot_be(settings, says, tmp_path):
    """Without a recipe; what a recipe says: helpers/bad_training.py."""
    with pytest.raises(ConfigError) as error:
        MemDLMConfig(str(tmp_path), bf16=False, **settings)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_an_engine_that_is_not_there_or_is_chosen_twice(monkeypatch):
    for variable, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match=f"has chosen {name} already; leave one"):
            patch.setenv(variable, "true")
            engines.prepare(arguments(engine="zero2"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^training\.engine='zero1': expected deepspeed \(pip install"):
        engines.prepare(arguments(engine="zero1"))


@pytest.mark.parametrize(
    ("kind", "fsdp", "dynamo", "says"),
    [
        ("FSDP", {"fsdp_version": 1}, "NO", "FSDP1: expected FSDP2"),
        ("FSDP", {"state_dict_type": "SHARDED_STATE_DICT"}, "NO", "fsdp_state_dict_type=SHARDED_"),
        ("NO", {}, "EAGER", "dynamo_backend=EAGER: expected none"),  # accelerate launch --dynamo_backend
        ("MULTI_CPU", {}, "NO", "FSDP2: expected GPUs"),
    ],
)
def test_what_could_not_be_trained_or_saved_is_refused(kind, fsdp, dynamo, says, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **fsdp})
    state = SimpleNamespace(fsdp_plugin=plugin, dynamo_plugin=SimpleNamespace(backend=DynamoBackend[dynamo]))
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], state=state, num_processes=2)
    with pytest.raises(ConfigError, match=f"^{says}"):
        engines.check(accelerator, arguments(engine="fsdp2"))


def test_hooks_of_experts_are_left_out_and_come_back():
    model, calls = tiny("llada_moe"), []
    experts = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    for module in experts:
        module.register_full_backward_hook(lambda *_: calls.append("backward"))
    tokens = torch.randint(3, 40, (2, 8))
    with pytest.raises(KeyError), frozen(experts):
        model(input_ids=tokens).logits.sum().backward()
        raise KeyError
    assert calls == []
    model(input_ids=tokens).logits.sum().backward()
    assert len(calls) == len(experts) > 0


def run_command(folder: Path, command: list[str], code: int = 0, **environment: str) -> str:
    """Its output, from the repository's folder, with nothing of another launch around it."""
    launched = ("ACCELERATE_", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_RANK", "FSDP_", "DS_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    own = {"HF_HOME": str(folder / "home"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    own |= {"PYTHONPATH": str(REPOSITORY), **environment}
    done = subprocess.run(command, cwd=REPOSITORY, env=inherited | own, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == (code == 0), done.stderr[-3000:]
    return done.stdout + done.stderr


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
#: A user's own configuration for accelerate's launcher.
OWN = ("accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0")
ZERO2 = ("--use_deepspeed", "--deepspeed_config_file", str(engines.FILES / "zero2.json"))
LAUNCHES = [
    (TORCHRUN, "auto", "engine: DDP, 2 processes"),
    (TORCHRUN, "zero2", "engine: ZeRO-2, 2 processes"),
    (TORCHRUN, "zero3", "engine: ZeRO-3, 2 processes"),
    (TORCHRUN, "fsdp2", "error: FSDP2: expected GPUs"),
    ((*OWN, "--multi_gpu"), "auto", "engine: DDP, 2 processes"),
    ((*OWN, *ZERO2), "auto", "engine: ZeRO-2, 2 processes"),
    ((*OWN, "--config_file", str(engines.FILES / "fsdp2.yaml")), "auto", "error: FSDP2: expected GPUs"),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("launcher", "engine", "says"), LAUNCHES)
def test_a_launcher_and_an_engine(launcher, engine, says, tmp_path):
    """The command a user types, on a machine without a GPU."""
    recipe, fails = write_recipe(tmp_path), "error" in says
    settings = [f"training.output_dir={tmp_path / 'run'}", "training.save_strategy='no'", f"training.engine={engine}"]
    command = [sys.executable, "-m", *launcher, "-m", "dllm_memdlm.train", str(recipe), *settings]
    out = run_command(tmp_path, command, 2 if fails else 0)
    assert says in out
    assert out.count("saved to") == (0 if fails else 1), "one process speaks"


@pytest.mark.distributed
def test_the_slurm_script_starts_a_launcher_on_each_of_two_nodes(tmp_path):
    """With stand-ins for Slurm's two commands, which run both "nodes" here, each with one process."""
    recipe, bin = write_recipe(tmp_path), tmp_path / "bin"
    bin.mkdir()
    for name, text in {
        "scontrol": "echo localhost; echo other",
        "srun": 'shift; SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@"; wait %1',
        "accelerate": f'exec {sys.executable} -m accelerate.commands.accelerate_cli "$@"',
    }.items():
        (bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin / name).chmod(stat.S_IRWXU)
    script = (REPOSITORY / "recipes" / "slurm" / "two_nodes.sbatch").read_text()
    assert "source .venv/bin/activate\n" in script
    (tmp_path / "job.sh").write_text(script.replace("source .venv/bin/activate\n", ""))
    settings = [f"training.output_dir={tmp_path / 'run'}", "training.engine=zero2"]
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "nodes[0-1]"}
    command = ["bash", str(tmp_path / "job.sh"), str(recipe), *settings]
    out = run_command(tmp_path, command, PATH=f"{bin}:{os.environ['PATH']}", **slurm)
    assert "engine: ZeRO-2, 2 processes" in out and out.count("saved to") == 1
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["training"]["engine"] == "zero2"
