"""Engines by name: what is set for each, what is refused, and the same configurations in accelerate's own files."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, DynamoBackend, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import make_trainer, tiny
from small_run import write_recipe

import dllm_memdlm
from dllm_memdlm.backbones.moe import RoutedExperts, inner_pass
from dllm_memdlm.config import ConfigError
from dllm_memdlm.training import engines
from dllm_memdlm.training.trainer import MemDLMConfig

REPOSITORY = Path(dllm_memdlm.__file__).parents[1]
RECIPES = REPOSITORY / "recipes"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What an engine leaves in the environment is gone after the test."""
    for name in ("ACCELERATE_USE_DEEPSPEED", "DS_ACCELERATOR", "WORLD_SIZE", *engines.FSDP2):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def config(folder: Path, **settings: object) -> MemDLMConfig:
    return MemDLMConfig(output_dir=str(folder), bf16=False, **settings)


def refusal(folder: Path, **settings: object) -> str:
    with pytest.raises(ConfigError) as error:
        config(folder, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# === what an engine sets ===


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_one_process_has_nothing_to_share_out(engine, tmp_path):
    args = config(tmp_path, engine=engine)
    assert args.deepspeed is None and not args.fsdp
    assert "ACCELERATE_USE_FSDP" not in os.environ and "ACCELERATE_USE_DEEPSPEED" not in os.environ


def test_another_run_of_the_process_begins_afresh(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    others = dict.fromkeys(("deepspeed", "fsdp", "bf16", "fp16"))
    engines.prepare(SimpleNamespace(engine="fsdp2", use_cpu=True, **others))
    assert engines.FSDP2.items() <= os.environ.items()
    engines.prepare(SimpleNamespace(engine="zero3", use_cpu=True, **others))
    assert not engines.FSDP2.keys() & os.environ.keys()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as transformers does on reading the arguments
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert config(tmp_path, engine="ddp").deepspeed_plugin is None
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ


@pytest.mark.parametrize("own", [None, "cuda:3"])
def test_a_run_on_the_cpu_does_not_keep_the_next_one_from_the_gpu(own, monkeypatch):
    monkeypatch.setattr(engines, "_ours", set())
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", own or "")
    if not own:  # what the user says is for all runs
        monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    others = dict.fromkeys(("deepspeed", "fsdp", "bf16", "fp16"))
    engines.prepare(SimpleNamespace(engine="auto", use_cpu=True, **others))
    assert os.environ["ACCELERATE_TORCH_DEVICE"] == (own or "cpu")
    engines.prepare(SimpleNamespace(engine="auto", use_cpu=False, **others))  # where there is a GPU
    assert os.environ.get("ACCELERATE_TORCH_DEVICE") == own


@pytest.mark.parametrize("launched", [None, "no", "bf16"])
def test_another_run_does_not_inherit_bfloat16(launched, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    if launched:  # what accelerate's launcher says is for all runs
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    MemDLMConfig(output_dir=str(tmp_path), bf16=True)
    config(tmp_path)  # transformers 4.57 writes bf16 there for good
    assert os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == (launched or "no")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({name: value}, f"training.{name}={value!r}: expected none; fast weights come and go in the layers")
            for name, value in (("torch_compile", True), ("torch_compile_backend", "eager"))
        ),
        ({"engine": "zero4"}, "training.engine='zero4': expected one of auto, ddp, fsdp2, zero1, zero2, zero3"),
        (
            {"engine": "zero2", "deepspeed": {"zero_optimization": {"stage": 3}}},
            "training.engine='zero2' and training.deepspeed are both set; give one of them",
        ),
        (
            {"engine": "ddp", "fsdp": "full_shard"},
            "training.engine='ddp' and training.fsdp are both set; give one of them",
        ),
    ],
)
def test_contradictions_are_refused(settings, message, tmp_path):
    assert refusal(tmp_path, **settings) == message


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")]
)
def test_the_launcher_and_the_recipe_do_not_both_choose(variable, name, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "true")
    text = refusal(tmp_path, engine="zero2")
    assert text.startswith(f"training.engine='zero2': accelerate's configuration has chosen {name} already")
    assert "training.engine=auto" in text


def test_without_deepspeed_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert refusal(tmp_path, engine="zero1").startswith("training.engine='zero1': expected deepspeed (pip install")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_version": 1}, "FSDP1: expected FSDP2"),
        (
            {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"},
            "fsdp_state_dict_type=SHARDED_STATE_DICT: expected",
        ),
    ],
)
def test_kinds_of_fsdp_that_could_not_be_saved_are_refused(settings, message):
    plugin = FullyShardedDataParallelPlugin(**settings)
    state = SimpleNamespace(fsdp_plugin=plugin, dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO))
    with pytest.raises(ConfigError, match=f"^{message}"):
        engines.check(SimpleNamespace(distributed_type=DistributedType.FSDP, state=state))


def test_a_compiled_model_is_refused():
    """As `accelerate launch --dynamo_backend` asks for it."""
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.EAGER))
    with pytest.raises(ConfigError, match=r"^dynamo_backend=EAGER: "):
        engines.check(SimpleNamespace(distributed_type=DistributedType.NO, state=state))


def test_fp16_is_refused_with_memory(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"^training\.fp16=True: expected bf16"):
        make_trainer(tiny("llama"), tokenizer, tmp_path, fp16=True)


def test_hooks_of_experts_are_left_out_and_come_back():
    model = tiny("llada_moe")
    experts = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    calls: list[str] = []
    for module in experts:
        module.register_full_backward_hook(lambda *_: calls.append("backward"))
    tokens = torch.randint(3, 40, (2, 8))
    with pytest.raises(KeyError), inner_pass(experts):
        model(input_ids=tokens).logits.sum().backward()
        raise KeyError
    assert calls == []
    model(input_ids=tokens).logits.sum().backward()
    assert len(calls) == len(experts) > 0


# === accelerate's and DeepSpeed's files ===


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_files_are_what_the_name_stands_for(stage):
    assert json.loads((RECIPES / "deepspeed" / f"zero{stage}.json").read_text()) == engines.zero_config(stage)


def test_there_is_a_file_for_every_engine():
    named = {path.stem for path in (RECIPES / "accelerate").glob("*.yaml")}
    assert named == set(engines.ENGINES) - {"auto"}


@pytest.mark.parametrize("engine", sorted(set(engines.ENGINES) - {"auto"}))
def test_the_launcher_takes_its_file(engine, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    path = RECIPES / "accelerate" / f"{engine}.yaml"
    args = launch_command_parser().parse_args(["--config_file", str(path), "--main_process_port", "0", "train.py"])
    args, defaults, _ = _validate_launch_command(args)
    assert args.num_processes == 8
    if engine.startswith("zero"):
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(args)
        assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == f"recipes/deepspeed/{engine}.json"
    else:
        environment = prepare_multi_gpu_env(args)
        chosen = {name: value for name, value in environment.items() if name in engines.FSDP2}
        assert chosen == (engines.FSDP2 if engine == "fsdp2" else {})
    for name, value in environment.items():
        if name not in os.environ:
            monkeypatch.setenv(name, value)
    assert engines.launched_engine() == {"d": None, "f": "FSDP", "z": "DeepSpeed"}[engine[0]]


# === the commands that users type ===


def run_command(folder: Path, command: list[str], **environment: str) -> str:
    """Its output, from the repository's folder, with nothing of another launch around it."""
    launched = ("ACCELERATE_", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_RANK", "FSDP_", "DS_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    own = {
        "HF_HOME": str(folder / "home"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**inherited, **own, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_the_plain_command_takes_the_recipes_engine(engine, tmp_path):
    recipe = write_recipe(tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "dllm_memdlm.train"]
    settings = [f"training.output_dir={tmp_path / 'run'}", "training.save_strategy='no'", f"training.engine={engine}"]
    name = {"fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}[engine]
    assert f"engine: {name}, 2 processes" in run_command(tmp_path, [*launch, str(recipe), *settings])


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_accelerates_launcher_with_its_file(engine, tmp_path):
    recipe, file = write_recipe(tmp_path), RECIPES / "accelerate" / f"{engine}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2"]
    settings = [f"training.output_dir={tmp_path / 'run'}", "training.save_strategy='no'", "training.engine=auto"]
    command = [*launch, "--main_process_port", "0", "-m", "dllm_memdlm.train", str(recipe), *settings]
    name = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2"}[engine]
    assert f"engine: {name}, 2 processes" in run_command(tmp_path, command)


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
    script = (RECIPES / "slurm" / "two_nodes.sbatch").read_text()
    assert "source .venv/bin/activate\n" in script
    (tmp_path / "job.sh").write_text(script.replace("source .venv/bin/activate\n", ""))
    settings = [f"training.output_dir={tmp_path / 'run'}", "training.engine=zero2"]
    out = run_command(
        tmp_path,
        ["bash", str(tmp_path / "job.sh"), str(recipe), *settings],
        PATH=f"{bin}:{os.environ['PATH']}",
        SLURM_NNODES="2",
        SLURM_GPUS_ON_NODE="1",
        SLURM_JOB_NODELIST="nodes[0-1]",
    )
    assert "engine: ZeRO-2, 2 processes" in out and out.count("saved to") == 1
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert saved["training"]["engine"] == "zero2"
