"""`memdlm-train`: its command line, the one line for what a user can correct, the dry run, and the launch."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import re
import socket
import threading
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from conftest import make_tokenizer, tiny
from test_run import ROWS, write_recipe

from dllm_memdlm import launch, run, train
from dllm_memdlm.config import ConfigError

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
#: What launchers set, and accelerate leaves behind in a process: each would change what a launch does.
LAUNCHED = (
    "ACCELERATE_USE_CPU",
    "CCL_WORKER_COUNT",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "OMP_NUM_THREADS",
)


@pytest.fixture(autouse=True)
def as_from_a_shell(tmp_path_factory, monkeypatch):
    """No launcher's variables, caches of the tests' own, no bars on stderr, a wide terminal."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    for name in LAUNCHED:
        monkeypatch.setenv(name, "")  # so that what a test sets is undone, too
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setattr(run, "TOKENIZER_CACHE", cache / "tokenizers")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> str:
    """A recipe that trains; what it writes goes to the test's folder."""
    monkeypatch.chdir(tmp_path)
    return str(write_recipe(tmp_path))


def error_of(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What the one line on stderr says, after `error: `; the exit code is 2 and nothing has been saved."""
    capsys.readouterr()
    assert train.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: "), captured.err
    assert "saved to" not in captured.out
    return captured.err.removeprefix("error: ").rstrip("\n")


# --- the command line ----------------------------------------------------------------------------------------------


def test_the_command_line_is_frozen(capsys):
    """Who changes it says so in the changelog."""
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text)) == {"-h", "--help", "--resume", "--dry-run", "--debug"}
    assert text.startswith("usage: memdlm-train ")
    positional = re.findall(r"^  (\S+) ", text[text.index("positional arguments") : text.index("options")], re.M)
    assert positional == ["recipe", "section.key=value"]


@pytest.mark.parametrize("arguments", [[], ["a.yaml", "--dryrun"], ["a.yaml", "--resume=checkpoint-3"]])
def test_a_wrong_command_line_is_argparses_to_refuse(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    assert stopped.value.code == 2
    assert "usage: memdlm-train " in capsys.readouterr().err


def test_flags_and_overrides_may_come_in_any_order(recipe, capsys):
    assert train.main(["memory.rank=2", "--dry-run", "training.max_steps=9"]) == 2  # the first word is the recipe
    assert "memory.rank=2: no such recipe file: " in capsys.readouterr().err
    assert train.main(["--dry-run", recipe, "memory.rank=2", "--debug", "training.max_steps=9"]) == 0
    out = capsys.readouterr().out
    assert "  rank: 2\n" in out
    assert "  max_steps: 9\n" in out


def test_training_ends_with_code_0_and_resumes_on_request(recipe, tmp_path, capsys):
    settings = ["training.output_dir=out", "training.save_steps=1", "training.eval_strategy='no'"]
    assert train.main([recipe, *settings, "training.max_steps=1"]) == 0
    assert "saved to out\n" in capsys.readouterr().out
    assert train.main([recipe, *settings, "training.max_steps=2", "--resume"]) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"] if "loss" in log] == [1, 2]
    assert error_of(capsys, recipe, *settings, "memory.rank=2", "--resume") == (
        "out/checkpoint-2: made with memory.rank=4, the recipe now says 2; change it back, or train to another "
        "training.output_dir"
    )


# --- one line for what the user can correct ------------------------------------------------------------------------


def test_an_unknown_key(recipe, capsys):
    text = error_of(capsys, recipe, "memory.inner_lrr=1")
    assert text == f"{recipe}: unknown key memory.inner_lrr; did you mean memory.inner_lr?"


def test_a_missing_recipe(tmp_path, capsys):
    path = tmp_path / "none.yaml"
    assert error_of(capsys, str(path)) == f"{path}: no such recipe file: {path}"


def test_a_missing_dataset(recipe, tmp_path, capsys):
    text = error_of(capsys, recipe, "data.dataset=other.jsonl")
    assert text == f"data.dataset='other.jsonl': no such file or folder ({tmp_path / 'other.jsonl'})"
    text = error_of(capsys, recipe, "data.dataset=nobody/nothing")
    assert text.startswith("data.dataset='nobody/nothing', split 'train': ")
    assert text.endswith(
        "expected a hub name (with network, or downloaded before), a local file or folder, or package:NAME/PATH"
    )
    text = error_of(capsys, recipe, "data.dataset=package:no_such_package/a.json")
    assert text.endswith("the Python package no_such_package is not installed; pip install no_such_package")


def test_a_missing_field(recipe, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "output": "b"}\n' * 20)
    expected = f"data.format='instruction': {tmp_path / 'rows.jsonl'} has the fields output, question; expected "
    text = error_of(capsys, recipe, "data.format=instruction")
    assert text == f"{expected}instruction: instruction, output"
    assert error_of(capsys, recipe).startswith("data.format='auto': ")


def test_no_response_in_any_example(recipe, tmp_path, capsys):
    rows = [{**row, "output": " "} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert error_of(capsys, recipe) == (
        f"data.max_length=4096: none of the 16 train examples of {tmp_path / 'rows.jsonl'} is left (0 too long, 16 "
        "without a response)"
    )
    text = error_of(capsys, recipe, "data.max_length=3")
    assert "none of the 16 train examples" in text


def test_a_wrong_model_folder(recipe, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    text = error_of(capsys, recipe, f"model.path={empty}")
    assert text.startswith(f"model.path='{empty}': the folder has no tokenizer files")
    text = error_of(capsys, recipe, "model.path=/no/such/folder")
    assert text == "model.path='/no/such/folder': no such folder"
    make_chat_tokenizer(empty)
    text = error_of(capsys, recipe, f"model.path={empty}")
    assert text == f"model.path='{empty}': a folder without a readable config.json"
    tiny("llada_moe").config.save_pretrained(empty)
    text = error_of(capsys, recipe, f"model.path={empty}")
    assert text.startswith(f"model.path='{empty}': ")


def make_chat_tokenizer(folder: Path, **special: str) -> None:
    tokenizer = make_tokenizer(**special)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)


def test_a_tokenizer_without_a_mask_token(recipe, tmp_path, capsys):
    make_chat_tokenizer(tmp_path / "tokenizer", bos_token="<bos>")
    text = error_of(capsys, recipe, f"model.tokenizer={tmp_path / 'tokenizer'}")
    assert text == (
        f"model.tokenizer='{tmp_path / 'tokenizer'}': declares no mask token, and <|mask|> or <|mdm_mask|> is not in "
        "its vocabulary; declare the model's as mask_token, save the tokenizer to a folder and set model.tokenizer to "
        "it"
    )


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_memory_target_that_matches_nothing(flags, recipe, capsys):
    assert error_of(capsys, recipe, "memory.target_modules=[up_proj, w1]", *flags) == (
        "memory.target_modules: 'w1' matches nothing in layers 1-2 of LLaDAMoEModelLM; linear layers there: down_proj, "
        "gate, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.architecture=Llama"], "model.architecture='Llama': no backbone for it; known: LLaDAMoEModelLM, "),
        (["model.dimensions.width=3"], "model.dimensions.width: not a field of LLaDAMoEConfig"),
        (["lora.enabled=true", "lora.target_modules=[w1]"], "lora.target_modules=('w1',): "),
    ],
)
def test_a_model_that_cannot_be_built(overrides, says, flags, recipe, capsys):
    assert error_of(capsys, recipe, *overrides, *flags).startswith(says)


@pytest.mark.parametrize(
    "override",
    [
        "training.time_epsilon=2",
        "training.per_device_train_batch_size=0",
        "training.learning_rate=-1",
        "training.report_to=wandbb",
        "training.dataloader_num_workers=-1",
    ],
)
def test_a_training_value_out_of_range(override, recipe, capsys):
    assert override.partition("=")[0] in error_of(capsys, recipe, override)


def test_debug_shows_where_it_was_raised(recipe, capsys):
    with pytest.raises(ConfigError, match=r"unknown key memory\.inner_lrr"):
        train.main([recipe, "memory.inner_lrr=1", "--debug"])
    with pytest.raises(ConfigError, match="matches nothing"):
        train.main(["--debug", recipe, "memory.target_modules=[w1]"])
    assert "error: " not in capsys.readouterr().err


def test_one_rank_speaks(recipe, monkeypatch, capsys):
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert train.main([recipe, "memory.inner_lrr=1"]) == 2
        assert capsys.readouterr().err.count("\n") == lines


# --- dry run -------------------------------------------------------------------------------------------------------


def test_a_dry_run_of_a_local_recipe_misses_nothing(recipe, tmp_path, capsys):
    assert train.main([recipe, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\nnothing is missing\n")
    assert "Parameters (dimensions of the recipe, trained from scratch)" in out
    d, experts, f = 32, 4, 16
    parameters = backbone_parameters(263, d, 3, 8, experts, f)
    assert cell(out, "all") == cell(out, "trainable") == f"{parameters:,}"
    assert cell(out, "fast weights, each sample") == f"{2 * experts * 3 * 4 * (d + f):,}"
    assert "Fast weights: 6 sites, 24 linear layers, from layer 1 of 3 on" in out
    assert not (tmp_path / "runs").exists(), "nothing is written"


def test_a_dry_run_without_memory_shows_no_sites(recipe, capsys):
    assert train.main([recipe, "--dry-run", "memory.enabled=false"]) == 0
    out = capsys.readouterr().out
    assert cell(out, "fast weights, each sample") == "0 (memory is off)"
    assert "sites" not in out


def test_a_dry_run_of_a_saved_model_reads_its_config(recipe, tmp_path, capsys):
    folder = tmp_path / "model"
    model = tiny("llada2")
    model.save_pretrained(folder)
    make_chat_tokenizer(folder)
    arguments = [recipe, "--dry-run", f"model.path={folder}", "model.architecture=null"]
    assert train.main(arguments) == 0
    out = capsys.readouterr().out
    assert f"Parameters (config.json of {folder})" in out
    assert cell(out, "all") == f"{sum(p.numel() for p in model.parameters()):,}"
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    assert error_of(capsys, *arguments) == f"missing: weights of model.path='{folder}'; tokenizer '{folder}'"
    assert error_of(capsys, *arguments, "data.dataset=none.jsonl").endswith(
        f"; data.dataset='none.jsonl': no such file or folder ({tmp_path / 'none.jsonl'})"
    )


def test_a_dry_run_of_the_papers_recipe_needs_nothing(capsys, monkeypatch):
    """Parameters by formula: 16 layers of hidden size 2,048 with 64 experts of width 1,024, vocabulary 157,184."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    arguments = ["--dry-run", str(RECIPES / "llada_moe.yaml")]
    assert train.main(arguments) == 2
    captured = capsys.readouterr()
    out = captured.out
    assert out.startswith("model:\n  path: inclusionAI/LLaDA-MoE-7B-A1B-Base\n")
    assert "  output_dir: runs/llada_moe\n" in out
    assert "Parameters (known dimensions of LLaDAMoEModelLM, as config.json is out of reach)" in out

    v, d, layers, experts, f, r = 157_184, 2048, 16, 64, 1024, 32
    base = backbone_parameters(v, d, layers, 128, experts, f)
    assert base == 7_356_880_896
    lora = layers * r * (4 * (d + d) + (d + experts) + experts * 3 * (d + f))
    assert cell(out, "all") == f"{base + lora:,}"
    assert cell(out, "trainable") == f"{lora:,}"
    site = experts * r * (d + f)
    assert cell(out, "fast weights, each sample") == f"{6 * site:,}"
    assert "Fast weights: 6 sites, 384 linear layers, from layer 14 of 16 on" in out
    rows = re.findall(r"(layers\.\d+\.\S+) +│ +(\d+) │ +(\d+ → \d+) │ +([\d,]+) ", out)
    shapes = {"gate_proj": f"{d} → {f}", "up_proj": f"{d} → {f}", "down_proj": f"{f} → {d}"}
    assert rows == [
        (f"layers.{layer}.mlp.experts.{name}", str(experts), shape, f"{site:,}")
        for layer in (14, 15)
        for name, shape in shapes.items()
    ]

    line = captured.err.splitlines()[-1]
    path, quant = "inclusionAI/LLaDA-MoE-7B-A1B-Base", ""
    if importlib.util.find_spec("bitsandbytes") is None:
        quant = "bitsandbytes, for model.load_in_4bit (pip install 'dllm-memdlm[quant]'); "
    assert line.startswith(f"error: missing: weights of model.path='{path}'; tokenizer '{path}'; {quant}data.dataset=")
    assert "data.dataset='Yukang/LongAlpaca-12k', split 'train': " in line
    assert "Traceback" not in captured.err


def backbone_parameters(v: int, d: int, layers: int, head: int, experts: int, f: int) -> int:
    """Embedding and output; each layer: q, k, v, o, norms on q and k, two norms, router, gated experts; last norm."""
    return 2 * v * d + layers * (4 * d * d + 2 * head + 2 * d + d * experts + experts * 3 * d * f) + d


def cell(out: str, row: str) -> str:
    """The second cell of a table's row."""
    (line,) = (line for line in out.splitlines() if line.startswith(f"│ {row} "))
    return line.split("│")[2].strip()


# --- one process of several ----------------------------------------------------------------------------------------


@pytest.fixture
def launcher(monkeypatch) -> Any:
    """Sets accelerate's variables, and the command line of the process that started this one."""

    def set_up(*command: str, **environment: str) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        parent = type("Process", (), {"__init__": lambda self, pid: None, "cmdline": lambda self: list(command)})
        monkeypatch.setattr(launch.psutil, "Process", parent)

    return set_up


ONE_OF_SEVERAL = {
    "ACCELERATE_USE_CPU": "True",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "CCL_WORKER_COUNT": "0",
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
    launch.work_offline_without_hub(timeout=2)
    assert online()


def test_a_name_that_does_not_resolve_is_no_hub(online, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://hub.invalid")
    launch.work_offline_without_hub(timeout=2)
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
        launch.work_offline_without_hub(timeout=2)
        server.shutdown()
        thread.join()
    assert asked == ["HEAD"]
    assert not online()


def test_a_hub_that_hangs_is_waited_for_no_longer_than_asked(online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the connection, and says nothing
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        launch.work_offline_without_hub(timeout=0.2)
    assert online()


def test_who_is_offline_already_asks_nobody(online, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(launch.urllib.request, "urlopen", lambda *args, **kwargs: pytest.fail("asked"))
    launch.work_offline_without_hub()
