"""Processes of a distributed run, forked from one that has imported everything: a launch takes a second, not twenty."""

from __future__ import annotations

import atexit
import functools
import gc
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

#: What the server imports before it forks. No thread may have been started by then.
PRELOADED = ("dllm_memdlm.train", "dllm_memdlm.training.run", "dllm_memdlm.training.dry_run", "deepspeed")


@functools.cache
def context() -> Any:
    """Processes forked by a server that has imported the package, with the paths of this process and its own caches."""
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(list(PRELOADED))
    home = tempfile.TemporaryDirectory()
    atexit.register(home.cleanup)
    settings = {"HF_HOME": home.name, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            patch.delenv(name)  # what training arguments of this process's tests have left
        for name, value in settings.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return forked


class Launch:
    """`count` processes that run `target(*arguments)`, as torchrun would start them; one runs without a group.

    Their output goes to files in `folder`, one a process.
    """

    def __init__(self, count: int, folder: Path, target: Callable[..., None], *arguments: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"process{rank}.log" for rank in range(count)]
        shared = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": _free_port(),
        }
        self.processes = []
        for rank, log in enumerate(self.logs):
            group = {"RANK": rank, "LOCAL_RANK": rank, **shared} if count > 1 else {}
            self.processes.append(context().Process(target=_work, args=(group, log, target, arguments)))
        for process in self.processes:
            process.start()

    def alive(self) -> bool:
        """Whether all of them run."""
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """SIGKILL to all of them."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def wait(self, timeout: float = 240) -> None:
        """Until all are done. Raises AssertionError, with the output of the first that failed."""
        end = time.monotonic() + timeout
        while any(process.is_alive() for process in self.processes) and time.monotonic() < end:
            if any(process.exitcode for process in self.processes):  # the others would wait for it
                break
            time.sleep(0.02)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        for code, log in zip(codes, self.logs, strict=True):
            if code is not None and code > 0:
                raise AssertionError(f"exit code {code}\n{log.read_text()[-4000:]}")
        assert codes == [0] * len(codes), f"exit codes {codes}\n{self.logs[0].read_text()[-4000:]}"


def launch(count: int, folder: Path, target: Callable[..., None], *arguments: Any) -> None:
    """Run to the end."""
    Launch(count, folder, target, *arguments).wait()


def _work(group: dict[str, Any], log: Path, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    gc.freeze()  # what the server has imported is no garbage to look for
    os.environ.update({name: str(value) for name, value in group.items()})
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    torch.set_num_threads(1)
    _allow_fsdp_on_cpus()
    target(*arguments)
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _allow_fsdp_on_cpus() -> None:
    """accelerate has DDP in its place there, unless it takes the processes for GPUs'."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    from dllm_memdlm.training.trainer import MemDLMTrainer

    create = MemDLMTrainer.create_accelerator_and_postprocess

    def as_on_gpus(trainer: MemDLMTrainer) -> None:
        state = PartialState._shared_state
        if trainer.args.engine == "fsdp2" and state["distributed_type"] == DistributedType.MULTI_CPU:
            state["distributed_type"] = DistributedType.MULTI_GPU
        create(trainer)

    MemDLMTrainer.create_accelerator_and_postprocess = as_on_gpus


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
