"""Before training: whether all processes are there, and whether there is a network."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
from typing import Any

import huggingface_hub
import pytest
from command_line import error_of

from dllm_memdlm import launch, train

pytestmark = pytest.mark.usefixtures("as_from_a_shell")


# --- one process of several ----------------------------------------------------------------------------------------


ONE_OF_SEVERAL = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment",
    [
        {},  # from a shell
        {"ACCELERATE_USE_CPU": "True"},  # one process was asked for
        {"MASTER_ADDR": "127.0.0.1"},
        {**ONE_OF_SEVERAL, "RANK": "0"},  # started by torchrun: all of them are there
    ],
)
def test_nothing_is_missing_where_all_processes_run(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch.check_processes()


def test_one_process_of_several_is_refused(recipe, capsys, monkeypatch):
    for name, value in ONE_OF_SEVERAL.items():
        monkeypatch.setenv(name, value)
    assert error_of(capsys, recipe).startswith("accelerate has started one process of several, as there is no GPU; ")
    assert train.main([recipe, "--dry-run"]) == 0, "which needs one process"


# --- no network ----------------------------------------------------------------------------------------------------


@pytest.fixture
def online(monkeypatch) -> Any:
    """As if a network were expected: no offline switch is on, and no proxy is between. Everything is put back."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # so that what is set below is undone
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def switched() -> bool:
        switch = os.environ.get("HF_HUB_OFFLINE")
        assert huggingface_hub.constants.HF_HUB_OFFLINE is (switch == "1"), "both, or neither"
        return switch == "1"

    return switched


def test_without_a_hub_it_works_offline(online, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    launch.prepare_to_load(timeout=2)
    assert online()


def test_a_name_that_does_not_resolve_is_no_hub(online, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://hub.invalid")
    launch.prepare_to_load(timeout=2)
    assert online()


@pytest.mark.parametrize("status", [200, 403, 500])
def test_a_hub_that_answers_is_a_hub(status, online, monkeypatch):
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.command)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        launch.prepare_to_load(timeout=2)
        server.shutdown()
        thread.join()
    assert asked == ["HEAD"]
    assert not online()


def test_a_hub_that_hangs_is_waited_for_no_longer_than_asked(online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the connection, and says nothing
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        launch.prepare_to_load(timeout=0.2)
    assert online()


def test_who_is_offline_already_asks_nobody(online, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(launch.urllib.request, "urlopen", lambda *args, **kwargs: pytest.fail("asked"))
    launch.prepare_to_load()


@pytest.mark.parametrize(
    ("last", "code", "ends_whole"), [("end(0)", 0, False), ("end(2)", 2, False), ("raise RuntimeError", 1, True)]
)
def test_a_process_of_several_skips_the_end_of_its_interpreter(last, code, ends_whole):
    """Where gloo's threads, which DDP keeps alive, may abort it. What other libraries do at the end is done.

    What fails after a command, in a script that calls it, keeps its code.
    """
    script = f"""if True:
        from dllm_memdlm.launch import close_process_group, end
        import atexit
        class Last:
            def __del__(self): print("interpreter ended")
        kept = Last()
        atexit.register(lambda: print("handlers run"))
        close_process_group()
        {last}
    """
    environment = {**os.environ, "LOCAL_RANK": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout == "handlers run\n" + "interpreter ended\n" * ends_whole


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [({}, ("30000", None)), ({"GOMP_SPINCOUNT": "9"}, ("9", None)), ({"OMP_WAIT_POLICY": "ACTIVE"}, (None, "ACTIVE"))],
)
@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "export", "info", "cli", "reproduce.smollm2"])
def test_threads_that_wait_do_not_spin_long(command, theirs, expected):
    """Set before torch is there, by every command, for its child processes too; what a user sets stays."""
    module = command if "." in command else f"dllm_memdlm.{command}"
    script = f"import os, sys, dllm_memdlm; assert 'torch' not in sys.modules; import {module}; " + (
        "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | theirs
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(value) for value in expected]
