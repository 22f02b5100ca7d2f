"""`memdlm info`: what is amiss here and what to do about it; the recipe keys match the dataclasses."""

from __future__ import annotations

import dataclasses
import http.server
import re
import socket
import subprocess
import threading
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from fresh_python import run
from huggingface_hub import constants
from rich.console import Console

from dllm_memdlm import info, machine
from dllm_memdlm.compat import dllm_api
from dllm_memdlm.compat.dllm_api import describe
from dllm_memdlm.config import ConfigError
from dllm_memdlm.inference.arguments import parse


def test_every_setting_is_a_key_with_type_default_and_help():
    keys = {key.name: key for key in info.recipe_keys()}
    expected = [f"{section}.{f.name}" for section, config in info.SECTIONS.items() for f in dataclasses.fields(config)]
    assert list(keys) == expected
    assert all(key.help and key.type for key in keys.values())
    assert not any(set("<|:") & set(key.type) for key in keys.values()), "in words"
    assert keys["memory.clip"][1:3] == ("one of local, global, none", '"local"')
    assert keys["memory.target_modules"].default == '["gate_proj", "up_proj", "down_proj"]'
    assert keys["model.path"][1:3] == ("folder or hub name or none", "null")


def test_keys_are_printed_uncut_on_a_narrow_terminal_without_torch():
    done = run("-X", "importtime", "-m", "dllm_memdlm.info", "--keys", COLUMNS="80")
    assert done.returncode == 0 and "MemDLMConfig" in done.stdout
    assert [key.name for key in info.recipe_keys() if key.name not in done.stdout] == []
    assert "…" not in done.stdout.replace(".jsonl/…", "")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pydantic" in imported and not imported & {"torch", "transformers", "datasets", "huggingface_hub"}


def fake(folder: Path, **versions: str) -> Path:
    """A folder in which packages of these versions are said to be installed."""
    for name, version in versions.items():
        (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
    return folder


def rows(text: str) -> dict[str, str]:
    return {line[:13].rstrip(): line[13:].strip() for line in text.splitlines()}


def test_an_optional_package_that_does_not_fit_has_its_remedy_and_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(fake(tmp_path, gguf="0.1.0"))
    assert info.main([]) == 0
    out, error = capsys.readouterr()
    said = rows(out)
    assert said["gguf"] == "0.1.0  – extra small expects >=0.18: pip install 'gguf>=0.18'"
    assert said["torch"].startswith(f"{metadata.version('torch')}  ✓ >=2.")
    assert said["using"].startswith(describe()) and said["device"].startswith("cpu: ")
    assert said["hub"].endswith("is not asked (HF_HUB_OFFLINE)")
    assert {"experts", "attention", "bf16", "4 bit", "hub token"} <= said.keys()
    assert "✗" not in out and not error


def test_a_requirement_that_is_not_met_ends_in_1_and_says_what_to_do(tmp_path):
    """All is said that can be: here peft is too old, and there is no torch that can be imported."""
    (fake(tmp_path, peft="0.10.0") / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libtorch.so: no such file')")
    done = run("-m", "dllm_memdlm.cli", "info", paths=(tmp_path,))
    assert done.returncode == 1
    said = rows(done.stdout)
    assert re.fullmatch(r"0\.10\.0  ✗ expects (\S+): pip install 'peft\1'", said["peft"])
    assert said["using"] == "nothing  ✗ mend what is above; ImportError: libtorch.so: no such file"
    assert done.stderr.splitlines()[-1] == "error: a run would fail; see ✗ above: peft, using"


def test_on_a_terminal_it_is_a_table(capsys):
    found = [info.Finding("peft", "0.1", "pip install 'peft>=1'", "✗"), info.Finding("device", "cpu: 2 cores")]
    info.show(found, Console(force_terminal=True, width=80, markup=False, highlight=False))
    out = capsys.readouterr().out
    assert "━┳━" in out and "✗ pip install 'peft>=1'" in out and "cpu: 2 cores" in out
    info.show(found, Console(width=10, markup=False, highlight=False))
    plain = "peft          0.1  ✗ pip install 'peft>=1'\ndevice        cpu: 2 cores\n"
    assert capsys.readouterr().out == plain, "lines are not cut"


@pytest.mark.parametrize("name", ["packages", "step"])
def test_what_is_found_says_what_to_do_wherever_something_is_amiss(name):
    found = getattr(machine, name)()
    assert [finding for finding in found if finding.mark in ("✗", "–") and not finding.note] == []
    assert len({finding.name for finding in found}) == len(found)


def test_every_device_is_listed():
    lines = machine.devices()
    assert len(lines) == torch.cuda.device_count() + torch.backends.mps.is_available() + 1
    assert lines[-1].startswith("cpu: ")


class Answers(http.server.BaseHTTPRequestHandler):
    """A hub that answers, and one that is down."""

    def do_HEAD(self) -> None:
        self.send_response(503 if self.path == "/down" else 200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_the_hub_is_asked_and_not_waited_for(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server, socket.socket() as silent:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        there, nobody = (f"http://127.0.0.1:{port}" for port in (server.server_port, silent.getsockname()[1]))
        for endpoint, answer, mark in (
            (there, "HTTP 200", ""),
            (f"{there}/down", "HTTP 503", "–"),
            (nobody, "no answer in 0.5 s", "–"),
        ):
            monkeypatch.setattr(constants, "ENDPOINT", endpoint)
            begin = time.monotonic()
            hub, token = machine.hub(seconds=5 if mark == "" else 0.5)
            assert time.monotonic() - begin < 5
            assert hub.found.startswith(f"{endpoint}: ") and hub.mark == mark
            assert answer in hub.found or ("Timeout" in hub.found and endpoint == nobody)
            assert ("HF_ENDPOINT" in hub.note) == (mark == "–")
            assert token == ("hub token", "there", "", "")
        server.shutdown()


def test_the_commit_of_a_checkout_of_dllm(tmp_path, monkeypatch):
    (tmp_path / "dllm").mkdir()
    monkeypatch.setattr(dllm_api, "HAS_DLLM", True)
    monkeypatch.setattr(dllm_api, "_origin", str(tmp_path / "dllm" / "__init__.py"))
    assert dllm_api.commit() == "", "no checkout"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert len(dllm_api.commit()) == 8 and head.startswith(dllm_api.commit())


def test_arguments_are_those_the_evaluation_takes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    assert info.main(["--arguments"]) == 0
    out = capsys.readouterr().out
    names = [key.name for key in info.model_arguments()]
    assert [name for name in names if name not in out] == []
    with pytest.raises(ConfigError) as refusal:
        parse({"zzzzzzzz": 1})
    assert set(str(refusal.value).partition("known: ")[2].split(", ")) == set(names)
