"""The command `memdlm`, and what its parts share: how a command ends, and whether its result can be written.

The parts are modules of the same names: `python -m dllm_memdlm.train` is `memdlm train`.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .config import ConfigError

COMMANDS = {
    "train": "train a recipe",
    "generate": "ask a model about a document",
    "evaluate": "lm-evaluation-harness, with the model `memdlm`",
    "export": "write a plain checkpoint, with the adapter in its weights, or a memory as an adapter",
    "recipes": "list or copy the recipes that come with the package",
    "info": "versions, devices, and all settings",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="memdlm",
        usage=f"memdlm {{{','.join(COMMANDS)}}} …",
        epilog="\n".join(f"  {name:<9} {what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    which = "one of those below; each has a --help"
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help=which)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    return importlib.import_module(f".{args.command}", __package__).main(args.arguments)


def exit_code(run: Callable[[], None], debug: bool = False, first_only: bool = False) -> int:
    """Run a command to its end.

    With `first_only` one process of each node speaks: the next node may lack another file.

    Returns:
        0; 2 after one line about what the user can correct (a traceback with `debug`); 130 where it was interrupted.
    """
    # These are looked at when the hub's library and `datasets` are imported.
    if not sys.stderr.isatty():  # nobody watches bars
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # else `datasets` tells a server of each local file
    hush()
    try:
        _go_offline_at_the_first_failure()
        run()
    except ConfigError as error:
        if debug:
            raise
        if first_only and int(os.environ.get("LOCAL_RANK", 0)) > 0:
            return 2
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def hush() -> None:
    """Keep bitsandbytes from warning, at every import, that 4 bit on a CPU could be faster."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@functools.cache
def _go_offline_at_the_first_failure() -> None:
    """Go offline, as with HF_HUB_OFFLINE=1, where the first connection to the hub fails.

    Its library would try six times for every file, half a minute each.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return
    usual = hub.get_session()
    http = sys.modules[type(usual).__module__.partition(".")[0]]  # requests; since 1.0 httpx
    failures = http.TransportError if hasattr(http, "TransportError") else (http.ConnectionError, http.Timeout)

    class Client(type(usual)):  # type: ignore[misc]
        reached = False

        def send(self, *args: Any, **settings: Any) -> Any:
            if constants.HF_HUB_OFFLINE:
                raise errors.OfflineModeIsEnabled("the hub could not be reached before")
            try:
                response = super().send(*args, **settings)
            except failures as error:
                if Client.reached:
                    raise
                constants.HF_HUB_OFFLINE = True
                raise errors.OfflineModeIsEnabled(str(error)) from error
            Client.reached = True
            return response

    if hasattr(hub, "set_client_factory"):
        hooks = usual.event_hooks
        hub.set_client_factory(lambda: Client(event_hooks=hooks, follow_redirects=True, timeout=None))
    else:
        hub.configure_http_backend(Client)


def end(code: int) -> NoReturn:
    """End the interpreter; of a process among several, at once.

    DDP keeps gloo's threads alive. One that lets go of a tensor while the interpreter goes aborts the process.
    """
    if "LOCAL_RANK" in os.environ:
        _at_once.append(code)
    sys.exit(code)


_at_once: list[int] = []


@atexit.register  # before other libraries have registered anything, hence after all that they do at the end
def _end_at_once() -> None:
    if _at_once:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_at_once[0])


def check_writable(flag: str, path: str | os.PathLike, make_folder: bool = False) -> None:
    """Raise ConfigError, naming the argument `flag`, for a file that cannot be written when its content is there.

    With `make_folder` its folder is made.
    """
    path = Path(path)
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        new = not os.path.lexists(path)
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}; expected a file that can be written") from None


def command() -> NoReturn:
    """Run what `memdlm` stands for."""
    end(main())


if __name__ == "__main__":
    command()
