"""The command line of training: its form, its exit codes, and one line for what the user can correct."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command_line import error_of, make_chat_tokenizer
from conftest import tiny
from small_run import ROWS, write_base

from dllm_memdlm import train
from dllm_memdlm.config import ConfigError

pytestmark = pytest.mark.usefixtures("as_from_a_shell")


# --- the command line ----------------------------------------------------------------------------------------------


def test_the_command_line_is_frozen(capsys):
    """Who changes it says so in the changelog."""
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    planning = {"--dry-run", "--gpus", "--memory", "--response-share"}
    assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text)) == {"-h", "--help", "--resume", "--debug"} | planning
    assert text.startswith("usage: memdlm train ")
    positional = re.findall(r"^  (\S+) ", text[text.index("positional arguments") : text.index("options")], re.M)
    assert positional == ["recipe", "section.key=value"]


@pytest.mark.parametrize("arguments", [[], ["a.yaml", "--dryrun"], ["a.yaml", "--resume=checkpoint-3"]])
def test_a_wrong_command_line_is_argparses_to_refuse(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    assert stopped.value.code == 2
    assert "usage: memdlm train " in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--gpus", "8"], ["--memory", "80GiB"], ["--response-share", "0.5"]])
def test_planning_flags_are_those_of_a_dry_run(flag, recipe, capsys):
    assert train.main([recipe, *flag]) == 2
    assert "--gpus, --memory and --response-share: expected with --dry-run" in capsys.readouterr().err


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
    assert text.startswith(
        f"data.dataset='other.jsonl': no such file or folder ({tmp_path / 'other.jsonl'}); expected "
    )
    text = error_of(capsys, recipe, "data.dataset=nobody/nothing")
    assert text.startswith("data.dataset='nobody/nothing', split 'train': ")
    assert text.endswith("expected a hub name (with network, or downloaded before), or a local file or folder")


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
        f"data.dataset='{tmp_path / 'rows.jsonl'}': none of the 16 train examples of {tmp_path / 'rows.jsonl'} is left "
        "(0 too long, 16 without a response); expected a response in at least one"
    )
    text = error_of(capsys, recipe, "data.max_length=3")
    assert "none of the 16 train examples" in text


def test_a_wrong_model_folder(recipe, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    text = error_of(capsys, recipe, f"model.path={empty}")
    assert text.startswith(f"model.path='{empty}': the folder has no tokenizer files")
    text = error_of(capsys, recipe, "model.path=/no/such/folder")
    assert text.startswith("model.path='/no/such/folder': no such folder; expected ")
    make_chat_tokenizer(empty)
    text = error_of(capsys, recipe, f"model.path={empty}")
    assert text == f"model.path='{empty}': a folder without a readable config.json"
    tiny("llada_moe").config.save_pretrained(empty)
    text = error_of(capsys, recipe, f"model.path={empty}")
    assert text.startswith(f"model.path='{empty}': ")


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
def test_a_model_that_cannot_be_built(overrides, says, flags, recipe, tmp_path, capsys):
    if "lora.enabled=true" in overrides:
        overrides = [*overrides, *write_base(Path(recipe), tmp_path / "base")]
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


def test_one_rank_of_a_node_speaks(recipe, monkeypatch, capsys):
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert train.main([recipe, "memory.inner_lrr=1"]) == 2
        assert capsys.readouterr().err.count("\n") == lines
