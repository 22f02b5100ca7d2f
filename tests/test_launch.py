"""Before training: whether all processes are there, and whether there is a network."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from command_line import error_of

from dllm_memdlm import launch, train

pytestmark = pytest.mark.usefixtures("as_from_a_shell")


# --- one process of several ----------------------------------------------------------------------------------------


@pytest.fixture
def launcher(monkeypatch) -> Any:
    """Sets accelerate's variables, and the command line of the process that started this one."""

    def set_up(*command: str, around: dict[str, str] | None = None, **environment: str) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        parent = SimpleNamespace(cmdline=lambda: list(command), environ=lambda: around or {})
        monkeypatch.setattr(launch.psutil, "Process", lambda pid: parent)

    return set_up


ONE_OF_SEVERAL = {
    "ACCELERATE_USE_CPU": "True",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    "environment",
    [
        {},  # from a shell
        {"ACCELERATE_USE_CPU": "True"},  # one process was asked for
        {"MASTER_ADDR": "127.0.0.1"},
        {**ONE_OF_SEVERAL, "RANK": "0"},  # started by torchrun: all of them are there
    ],
)
def test_nothing_is_missing_where_all_processes_run(environment, launcher):
    launcher("accelerate", "launch", "--num_processes", "4", "train.py", **environment)
    assert launch.missing_processes() is None


def test_nor_where_the_address_is_a_clusters_own(launcher):
    launcher("accelerate", "launch", "train.py", around=ONE_OF_SEVERAL, **ONE_OF_SEVERAL)
    assert launch.missing_processes() is None


@pytest.mark.parametrize("flag", [["--num_processes", "4"], ["--num-processes", "4"], ["--num_processes=4"]])
def test_the_number_of_processes_is_what_accelerate_was_asked_for(flag, launcher):
    launcher("python", "accelerate", "launch", "--cpu", *flag, "-m", "dllm_memdlm.train", "a.yaml", **ONE_OF_SEVERAL)
    assert launch.missing_processes() == 4


def test_a_number_from_accelerates_configuration_file_is_refused(launcher, recipe, capsys):
    launcher("accelerate", "launch", "--config_file", "a.yaml", "-m", "dllm_memdlm.train", **ONE_OF_SEVERAL)
    expected = "accelerate started one process of several, as there is no GPU; add --multi_gpu for all of them"
    assert error_of(capsys, recipe) == expected
    assert train.main([recipe, "--dry-run"]) == 0, "which needs one process"


def test_all_processes_are_started_by_torchrun(launcher, recipe, capsys, monkeypatch):
    from torch.distributed import run as torchrun

    calls = []
    monkeypatch.setattr(torchrun, "main", calls.append)
    monkeypatch.setattr(launch.psutil, "cpu_count", lambda logical: 8)
    launcher("accelerate", "launch", "--num_processes", "2", **ONE_OF_SEVERAL)
    assert train.main([recipe, "memory.rank=2", "--resume"]) == 0
    expected = ["--standalone", "--nproc_per_node", "2", "-m", "dllm_memdlm.train", recipe, "memory.rank=2", "--resume"]
    assert calls == [expected]
    assert "starting all 2" in capsys.readouterr().out
    assert "MASTER_ADDR" not in os.environ and "MASTER_PORT" not in os.environ
    assert os.environ["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    launcher("accelerate", "launch", "--num_processes", "2", **ONE_OF_SEVERAL)
    assert train.main([recipe]) == 0
    assert os.environ["OMP_NUM_THREADS"] == "3", "the user's own choice stays"


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
@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "export", "info", "demo"])
def test_threads_that_wait_do_not_spin_long(command, theirs, expected):
    """Set before torch is there, by every command, for its child processes too; what a user sets stays."""
    script = f"import os, sys, dllm_memdlm; assert 'torch' not in sys.modules; import dllm_memdlm.{command}; " + (
        "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | theirs
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(value) for value in expected]
