"""What a launch needs before the heavy imports: all of its processes, and to know whether there is a network."""

from __future__ import annotations

import argparse
import atexit
import http.client
import logging
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import psutil
from huggingface_hub import constants

from .config import ConfigError


def missing_processes() -> int | None:
    """The number of processes that accelerate was asked for, where it started this one only; else none.

    accelerate starts several processes for GPUs alone. Asked for more without one, it sets the address of a main
    process, starts a single process, and leaves it without a rank.

    Raises:
        ConfigError: more than one was asked for by a configuration file, which does not say how many to us.
    """
    import torch

    left_alone = {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and "RANK" not in os.environ
    if not left_alone or torch.cuda.is_available():
        return None
    accelerate = psutil.Process(os.getppid())
    around = accelerate.environ()
    if all(around.get(name) == os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")):
        return None  # a cluster's own
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    launcher, _ = parser.parse_known_args(accelerate.cmdline())
    if launcher.num_processes is None:
        raise ConfigError(
            "accelerate started one process of several, as there is no GPU; add --multi_gpu for all of them"
        )
    return launcher.num_processes if launcher.num_processes > 1 else None


def run_in_processes(count: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` in `count` processes (gloo); the exit code of the first that fails, or 0."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.pop("MASTER_ADDR")
    os.environ.pop("MASTER_PORT", None)
    threads = max(1, (psutil.cpu_count(logical=False) or 1) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        run.main(["--standalone", "--nproc_per_node", str(count), "-m", module, *arguments])
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode  # the process itself has said why
    return 0


def exit_code(command: Callable[[], None], debug: bool) -> int:
    """Run a command: 0, or 2 after one line about what the user can correct (its traceback with `debug`)."""
    try:
        command()
    except ConfigError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def check_writable(flag: str, path: str | os.PathLike, make_folder: bool = False) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold.

    Args:
        flag: the argument that names it, for the message.
        path: the file.
        make_folder: whether its folder will be made where there is none.

    Raises:
        ConfigError: it is a folder, its folder is not there, or may not be written to.
    """
    path = Path(path)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # it is not there yet; what is above it is looked at below
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}; expected a file that can be written") from None
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: a folder; expected a file")
    above = path.absolute().parent
    if make_folder:
        above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.exists():
        raise ConfigError(f"{flag} {path}: there is no folder {above}; expected a file in one that is there")
    if not above.is_dir():
        raise ConfigError(f"{flag} {path}: {above} is a file; expected a folder")
    if not os.access(path if path.exists() else above, os.W_OK):
        raise ConfigError(f"{flag} {path}: may not be written; expected a file that may")


def close_process_group() -> None:
    """Leave the group of processes, if there is one."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def end(code: int) -> NoReturn:
    """End a command; a process of several without taking its interpreter down.

    DDP keeps gloo's threads alive. One that lets go of a tensor while the interpreter goes aborts the process.
    """
    global _code
    if "LOCAL_RANK" in os.environ:
        _code = code
    sys.exit(code)


_code: int | None = None


@atexit.register  # before other libraries have registered anything, hence after all that they do at the end
def _end_at_once() -> None:
    if _code is not None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_code)


def prepare_to_load(timeout: float = 5.0) -> None:
    """For a command, before the heavy imports: no bars of loading where nobody watches, and no hub that is not there.

    Where the hub does not answer, every file costs five retries; local copies are used then.
    """
    if not sys.stderr.isatty():
        constants.HF_HUB_DISABLE_PROGRESS_BARS = True  # transformers follows it, too
    if constants.HF_HUB_OFFLINE:
        return
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=timeout).close()
    except urllib.error.HTTPError:
        return  # it answers
    except (OSError, http.client.HTTPException):
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
