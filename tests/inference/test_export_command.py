"""`memdlm export`: where it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from saved_models import save_pair, save_recipe, weights_of

from dllm_memdlm import export as command
from dllm_memdlm.config import ConfigError
from dllm_memdlm.inference.plain_checkpoint import export

pytestmark = pytest.mark.usefixtures("as_from_a_shell")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[str, str]:
    return save_pair(tmp_path_factory.mktemp("llama"), "llama")


def refusal(*args: Any, **arguments: Any) -> str:
    with pytest.raises(ConfigError) as error:
        export(*args, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_there_is_not_overwritten(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".hidden").write_text("mine")
    expected = "expected a folder that is empty or not there yet"
    assert refusal(llama[1], tmp_path / "out") == f"--out {tmp_path / 'out'}: not empty; {expected}"
    (tmp_path / "file").write_text("mine")
    assert refusal(llama[1], tmp_path / "file") == f"--out {tmp_path / 'file'}: a file; {expected}"
    assert (
        refusal(llama[1], tmp_path / "file" / "out")
        == f"--out {tmp_path / 'file' / 'out'}: {tmp_path / 'file'} is a file"
    )
    assert (tmp_path / "out" / ".hidden").read_text() == (tmp_path / "file").read_text() == "mine"


def test_a_failure_leaves_nothing_behind(llama, tmp_path):
    """The last thing to be written cannot be: a state of the trainer that is broken."""
    adapter = shutil.copytree(llama[1], tmp_path / "adapter")
    (adapter / "trainer_state.json").write_text("{")
    assert refusal(str(adapter), tmp_path / "out").startswith(f"{adapter / 'trainer_state.json'}: not the state of a ")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_quantised_weights_are_refused(llama, tmp_path):
    base = shutil.copytree(llama[0], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": packed}))
    says = "quantised weights, which take no sum; give the model that they were made from: --model BASE"
    assert refusal(str(base), tmp_path / "out", llama[1]) == f"pretrained='{base}': {says} --adapter {llama[1]}"
    assert refusal(str(base), tmp_path / "out") == f"pretrained='{base}': {says}"


def test_an_adapter_with_the_config_of_its_base_is_an_adapter(llama, tmp_path):
    """Other trainers write it beside; what is exported is the base with the adapter all the same."""
    adapter = shutil.copytree(llama[1], tmp_path / "adapter")
    shutil.copy(f"{llama[0]}/config.json", adapter)
    found, expected = (weights_of(export(str(path), tmp_path / str(i))) for i, path in enumerate((adapter, llama[1])))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_full_weights_with_an_adapter_beside_are_refused(llama, tmp_path):
    """Nobody knows which are meant; transformers would take the adapter, and its base from wherever it is."""
    both = shutil.copytree(llama[0], tmp_path / "both")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(f"{llama[1]}/{name}", both)
    for arguments in ((str(both),), (str(both), llama[1])):
        says = refusal(arguments[0], tmp_path / "out", *arguments[1:])
        assert says.startswith(f"pretrained='{both}': holds an adapter (adapter_config.json); expected weights alone")


def test_an_adapter_trained_in_4_bit_is_added_to_the_full_weights(llama, tmp_path):
    adapter = shutil.copytree(llama[1], tmp_path / "adapter")
    save_recipe(adapter, {"model": {"path": llama[0], "load_in_4bit": True}})
    out = export(str(adapter), tmp_path / "out")
    assert "was trained on the same weights in 4 bit" in (out / "README.md").read_text()
    assert {tensor.dtype for tensor in weights_of(out).values()} == {torch.float32}


# === the command ===


def test_the_command_says_where_it_is(llama, tmp_path, capsys):
    arguments = ["--model", llama[0], "--adapter", llama[1], "--dtype", "bfloat16"]
    assert command.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"saved to {tmp_path / 'out'}\n"
    assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} == {torch.bfloat16}


def test_what_the_user_can_correct_is_one_line(llama, tmp_path, capsys):
    broken = shutil.copytree(llama[1], tmp_path / "broken")
    save_file({}, broken / "adapter_model.safetensors")
    cases = {
        ("--model", "/no/such"): "pretrained='/no/such': no such folder",
        ("--model", llama[0], "--adapter", "/no/such"): "adapter='/no/such': no readable adapter_config.json (",
        ("--model", llama[0], "--adapter", str(broken)): f"adapter='{broken}': made for another model; ",
    }
    for arguments, says in cases.items():
        assert command.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"error: {says}") and captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError):
        command.main(["--model", "/no/such", "--out", str(tmp_path / "out"), "--debug"])


@pytest.mark.parametrize(
    "arguments", [["--model", "x"], ["--out", "x"], ["--model", "x", "--out", "y", "--dtype", "int8"]]
)
def test_a_command_that_says_too_little_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert "usage: memdlm export" in capsys.readouterr().err
