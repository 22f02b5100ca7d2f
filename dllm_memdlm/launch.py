"""What commands share before the heavy imports: arguments, files to write, whether there is a network, their end."""

from __future__ import annotations

import argparse
import atexit
import http.client
import logging
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from huggingface_hub import constants

from .config import ConfigError


def check_processes() -> None:
    """Refuse to be one process of several: without a GPU accelerate starts one, whatever it was asked for.

    Raises:
        ConfigError: it has set the address of a main process, and left this one without a rank.
    """
    import torch

    left_alone = {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and "RANK" not in os.environ
    if left_alone and not torch.cuda.is_available():
        raise ConfigError(
            "accelerate has started one process of several, as there is no GPU; expected `torchrun --nproc_per_node N "
            "-m dllm_memdlm.train …`, or, for one process, no MASTER_ADDR in the environment"
        )


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


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The command line as arguments of the lm-eval model, which share their names and checks."""
    values: dict[str, Any] = {"pretrained": args.model, "adapter": args.adapter, "fast_weights": args.load_memory}
    for setting in args.settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"{setting!r}: expected name=value, such as temperature=0.7")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{setting!r}: not a value; expected a number, a word or a list such as [5, 7]") from None
    if args.memory or args.save_memory:
        values["memory"] = True
    return values
