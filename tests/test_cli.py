"""The command `memdlm`: its parts are the modules of the same names, and all of them end alike."""

from __future__ import annotations

import importlib
import json
import logging
import sys

import huggingface_hub
import pytest
from command_line import error_of
from fresh_python import run

from dllm_memdlm import __version__, cli, info, train
from dllm_memdlm.config import ConfigError

pytestmark = pytest.mark.usefixtures("as_from_a_shell")


@pytest.mark.parametrize("name", sorted(cli.COMMANDS.keys() - {"evaluate"}))
def test_each_command_is_the_module_of_its_name(name, capsys):
    texts = []
    for main in (lambda argv: cli.main([name, *argv]), importlib.import_module(f"dllm_memdlm.{name}").main):
        with pytest.raises(SystemExit) as stopped:
            main(["--help"])
        texts.append(capsys.readouterr().out)
        assert stopped.value.code == 0
    assert texts[0] == texts[1] and texts[0].startswith(f"usage: memdlm {name} ")


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [(["--help"], 0, "export  "), (["--version"], 0, __version__), (["trian"], 2, "'trian'")],
)
def test_help_version_and_no_such_command(argv, code, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == code
    assert text in "".join(capsys.readouterr())
    assert cli.main([]) == 2 and "export  " in capsys.readouterr().err, "without a command they are explained"


def test_exit_codes(capsys, monkeypatch):
    def ending(error: BaseException | None, **settings: bool) -> int:
        def command() -> None:
            if error is not None:
                raise error

        return cli.exit_code(command, **settings)

    assert (ending(None), ending(KeyboardInterrupt())) == (0, 130)
    said = "error: what, where\n"
    for rank, first_only, heard in (("0", True, said), ("1", True, ""), ("1", False, said)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert ending(ConfigError("what, where"), first_only=first_only) == 2
        assert capsys.readouterr() == ("", heard)
    with pytest.raises(RuntimeError):
        ending(RuntimeError())
    with pytest.raises(ConfigError):
        ending(ConfigError(), debug=True)


@pytest.mark.parametrize("main", [lambda: cli.exit_code(lambda: None), lambda: info.main(["--keys"])])
def test_bitsandbytes_says_nothing_of_kernels_for_cpus(main):
    names = ("bitsandbytes.backends.cpu.ops", "bitsandbytes")
    for name in names:
        logging.getLogger(name).setLevel(logging.NOTSET)
    main()
    assert [logging.getLogger(name).isEnabledFor(logging.WARNING) for name in names] == [False, True]


@pytest.mark.parametrize(
    ("last", "code", "ends_whole"), [("end(0)", 0, False), ("end(2)", 2, False), ("raise RuntimeError", 1, True)]
)
def test_a_process_of_several_skips_the_end_of_its_interpreter(last, code, ends_whole):
    """Where gloo's threads, which DDP keeps alive, may abort it. What other libraries do at the end is done.

    What fails after a command, in a script that calls it, keeps its code.
    """
    script = "import atexit; from dllm_memdlm.cli import end; atexit.register(lambda: print('handlers run'))\n"
    script += "class Last:\n    def __del__(self): print('interpreter ended')\n"
    done = run("-c", f"{script}kept = Last()\n{last}", LOCAL_RANK="0")
    assert done.returncode == code
    assert done.stdout == "handlers run\n" + "interpreter ended\n" * ends_whole


def test_files_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file" / "x", tmp_path / "none" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError) as error:
            cli.check_writable("--output", path)
        assert str(error.value).startswith(f"--output {path}: ") and "expected a file" in str(error.value)
    cli.check_writable("--output", tmp_path / "file")
    cli.check_writable("--output", tmp_path / "new" / "x", make_folder=True)
    assert (tmp_path / "file").read_text() == "mine" and not list((tmp_path / "new").iterdir())


def test_one_process_of_several_is_refused_and_nothing_else(recipe, capsys, monkeypatch):
    """From a shell, or as the one process that was asked for, there is no address; torchrun has given a rank."""
    several = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for whole in ({}, {"ACCELERATE_USE_CPU": "True"}, {"MASTER_ADDR": "127.0.0.1"}, {**several, "RANK": "0"}):
        with monkeypatch.context() as patch:
            for item in whole.items():
                patch.setenv(*item)
            train.check_processes()
    for item in several.items():
        monkeypatch.setenv(*item)
    assert "accelerate has started one process of several" in error_of(capsys, recipe)
    assert train.main([recipe, "--dry-run"]) == 0, "which needs one process"


ASK = """
import json, sys, socket
asked = []
def no_network(host, *others, **settings):
    asked.append(str(host))
    raise socket.gaierror(-2, "Name or service not known")
socket.getaddrinfo = no_network
from dllm_memdlm.train import main
for setting in ("training.max_steps=1", "data.dataset=nobody/nothing"):
    print(json.dumps([main([sys.argv[1], setting]), asked]))
"""


@pytest.mark.slow
def test_local_files_ask_nobody_and_no_network_is_found_out_once(recipe, tmp_path):
    proxies = {f"{name}_proxy": "" for name in ("http", "https", "all")}
    online = {"HF_HUB_OFFLINE": "", "HF_HOME": str(tmp_path), **proxies, **{k.upper(): "" for k in proxies}}
    done = run("-c", ASK, recipe, **online)
    lines = done.stdout.splitlines()
    assert "[0, []]" in lines, done.stderr
    assert json.loads(lines[-1]) == [2, ["huggingface.co"]]
    about = [line for line in done.stderr.splitlines() if "nobody/nothing" in line]
    assert len(about) == 1 and about[0].startswith("error: data.dataset='nobody/nothing'")


def test_a_hub_that_has_answered_is_not_given_up(monkeypatch):
    """A connection that fails later is for the hub's library to try again."""
    if not hasattr(huggingface_hub, "set_client_factory"):
        pytest.skip("before huggingface_hub 1.0")
    http = sys.modules[type(huggingface_hub.get_session()).__module__.partition(".")[0]]
    made = []
    monkeypatch.setattr(huggingface_hub, "set_client_factory", made.append)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    cli._go_offline_at_the_first_failure.__wrapped__()
    client = made[0]()
    answers = iter([http.Response(200), http.ConnectError("gone")])

    def send(self, request, **settings):
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    monkeypatch.setattr(http.Client, "send", send)
    assert client.get("https://hub").status_code == 200
    with pytest.raises(http.ConnectError):
        client.get("https://hub")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


#: `reproduce.smollm2` imports torch itself, the others when they run.
MODULES = ("reproduce.smollm2", *(f"dllm_memdlm.{name}" for name in cli.COMMANDS))
AT_TORCH = """
import contextlib, importlib, os, sys
class Torch:
    def find_spec(name, *others):
        if name == "torch":
            tell()
            raise ImportError
def tell():
    print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Torch)
import dllm_memdlm
assert not {"torch", "pydantic"} & sys.modules.keys()
for module in sys.argv[1:]:
    with contextlib.suppress(ImportError):
        importlib.import_module(module)
    assert "dllm_memdlm" in sys.modules and "torch" not in sys.modules
    tell()
"""


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [({}, "30000 None"), ({"GOMP_SPINCOUNT": "9"}, "9 None"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE")],
)
def test_threads_that_wait_do_not_spin_long(theirs, expected, monkeypatch):
    """Set before torch is there, by every command, for its child processes too; what a user sets stays."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    done = run("-c", AT_TORCH, *MODULES, **theirs)
    assert done.stdout == f"{expected}\n" * (1 + len(MODULES)), done.stderr
