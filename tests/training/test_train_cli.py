"""The command line of training: its form, and one line for what the user can correct (also: bad_training.py)."""

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


def test_the_command_line_is_frozen(capsys):
    """Who changes it says so in the changelog."""
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    planning = {"--dry-run", "--gpus", "--memory", "--response-share"}
    assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text)) == {"-h", "--help", "--resume", "--debug"} | planning
    positional = re.findall(r"^  (\S+) ", text[text.index("positional arguments") : text.index("options")], re.M)
    assert positional == ["recipe", "section.key=value"]


@pytest.mark.parametrize("arguments", [[], ["a.yaml", "--dryrun"], ["a.yaml", "--resume=checkpoint-3"]])
def test_a_wrong_command_line_is_argparses_to_refuse(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    assert stopped.value.code == 2
    assert "usage: memdlm train " in capsys.readouterr().err


def test_flags_and_overrides_may_come_in_any_order(recipe, capsys):
    assert train.main(["memory.rank=2", "--dry-run", "training.max_steps=9"]) == 2  # the first word is the recipe
    assert "memory.rank=2: no such recipe file: " in capsys.readouterr().err
    assert train.main(["--dry-run", recipe, "memory.rank=2", "--debug", "training.max_steps=9"]) == 0
    out = capsys.readouterr().out
    assert "  rank: 2\n" in out and "  max_steps: 9\n" in out


def test_training_ends_with_code_0_and_resumes_on_request(recipe, tmp_path, capsys):
    settings = ["training.output_dir=out", "training.save_steps=1", "training.eval_strategy='no'"]
    assert train.main([recipe, *settings, "training.max_steps=1"]) == 0
    assert "saved to out\n" in capsys.readouterr().out
    assert train.main([recipe, *settings, "training.max_steps=2", "--resume"]) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"] if "loss" in log] == [1, 2]
    text = error_of(capsys, recipe, *settings, "memory.rank=2", "--resume")
    assert text.startswith("out/checkpoint-2: made with memory.rank=4, the recipe now says 2; change it back, or ")


def test_data_that_is_not_there_or_holds_no_example(recipe, tmp_path, capsys):
    for setting, *says in (
        ("data.dataset=other.jsonl", str(tmp_path / "other.jsonl"), "no such file or folder"),
        ("data.dataset=nobody/nothing", "data.dataset='nobody/nothing'", "with network, or downloaded before"),
        ("data.max_length=3", "none of the 16 train examples", "16 too long"),
    ):
        text = error_of(capsys, recipe, setting)
        assert [piece for piece in says if piece not in text] == [], text
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({**row, "output": " "}) for row in ROWS))
    assert "16 without a response" in error_of(capsys, recipe)
    rows.write_text('{"question": "a", "output": "b"}\n' * 20)
    text = error_of(capsys, recipe, "data.format=instruction")
    assert text.startswith("data.format='instruction': ") and "the fields output, question; expected" in text


def test_a_folder_that_holds_no_model(recipe, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "the folder has no tokenizer files" in error_of(capsys, recipe, f"model.path={empty}")
    make_chat_tokenizer(empty)
    assert "a folder without a readable config.json" in error_of(capsys, recipe, f"model.path={empty}")
    tiny("llada_moe").config.save_pretrained(empty)
    assert error_of(capsys, recipe, f"model.path={empty}").startswith(f"model.path='{empty}': ")
    make_chat_tokenizer(empty, bos_token="<bos>")
    text = error_of(capsys, recipe, f"model.tokenizer={empty}")
    assert text.startswith(f"model.tokenizer='{empty}': declares no mask token")


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_lora_that_cannot_be_built(flags, recipe, tmp_path, capsys):
    overrides = ["lora.enabled=true", "lora.target_modules=[w1]", *write_base(Path(recipe), tmp_path / "base")]
    assert error_of(capsys, recipe, *overrides, *flags).startswith("lora.target_modules=('w1',): ")


def test_debug_shows_where_it_was_raised(recipe, capsys):
    with pytest.raises(ConfigError, match="matches nothing"):
        train.main(["--debug", recipe, "memory.target_modules=[w1]"])
    assert "error: " not in capsys.readouterr().err
