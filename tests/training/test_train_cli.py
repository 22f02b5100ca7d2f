"""The command line of training: its form, and one line with exit code 2 for whatever is wrong with a recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from bad_training import BAD_TRAINING, FILES
from command_line import error_of, make_chat_tokenizer
from conftest import tiny
from small_run import ROWS, write_base

from dllm_memdlm import train
from dllm_memdlm.config import ConfigError
from dllm_memdlm.training import run

pytestmark = pytest.mark.usefixtures("as_from_a_shell")


def test_the_command_line_is_frozen(capsys):
    """Who changes it says so in the changelog."""
    with pytest.raises(SystemExit, match=r"^0$"):
        train.main(["--help"])
    text = capsys.readouterr().out
    planning = {"--dry-run", "--gpus", "--memory", "--response-share"}
    assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text)) == {"-h", "--help", "--resume", "--debug"} | planning
    positional = re.findall(r"^  (\S+) ", text[text.index("positional arguments") : text.index("options")], re.M)
    assert positional == ["recipe", "section.key=value"]


@pytest.mark.parametrize("arguments", [[], ["a.yaml", "--dryrun"], ["a.yaml", "--resume=checkpoint-3"]])
def test_a_wrong_command_line_is_argparses_to_refuse(arguments, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        train.main(arguments)
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


def test_data_that_holds_no_example(recipe, tmp_path, capsys):
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


def test_a_model_without_a_backbone_is_refused_before_the_data_take_their_time(recipe, tmp_path, capsys, monkeypatch):
    folder, says = tmp_path / "bert", "model.architecture='BertModel': no backbone for it; known: "
    folder.mkdir()
    make_chat_tokenizer(folder)
    (folder / "config.json").write_text('{"architectures": ["BertModel"]}')
    monkeypatch.setattr(run, "load_examples", None)
    assert error_of(capsys, recipe, f"model.path={folder}", "model.architecture=null").startswith(says)
    monkeypatch.setattr(run, "tokenizer_for", None)
    assert error_of(capsys, recipe, "model.architecture=BertModel").startswith(says)


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_lora_that_cannot_be_built(flags, recipe, tmp_path, capsys):
    overrides = ["lora.enabled=true", "lora.target_modules=[w1]", *write_base(Path(recipe), tmp_path / "base")]
    assert error_of(capsys, recipe, *overrides, *flags).startswith("lora.target_modules=('w1',): ")


@pytest.mark.parametrize(("key", "meant"), [("rank", "memory.rank"), ("alpha", "lora.alpha or memory.alpha")])
def test_a_key_without_its_section(key, meant, recipe, capsys):
    assert error_of(capsys, recipe, f"{key}=4").endswith(f"unknown key {key!r}; did you mean {meant}?")


def test_debug_shows_where_it_was_raised(recipe, capsys):
    with pytest.raises(ConfigError, match="matches nothing"):
        train.main(["--debug", recipe, "memory.target_modules=[w1]"])
    assert "error: " not in capsys.readouterr().err


def test_no_input_is_there_twice():
    assert len({row[0] for row in BAD_TRAINING}) == len(BAD_TRAINING) > 120


@pytest.mark.parametrize("row", BAD_TRAINING, ids=lambda row: row[0][:50])
def test_bad_input_is_refused_in_one_line(row, recipe, capsys):
    """`recipe` is in the folder that this test runs in."""
    for name, content in FILES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content, encoding="latin-1")
    line, *says = row
    if short := re.match(r"(\w+)=", line):
        section = short[1] in ("memory", "lora", "training")
        line, says = (line, says) if section else (f"training.{line}", [f"training.{short[1]}=", *says])
    words = line.split(" ")
    text = error_of(capsys, *([] if Path(words[0]).exists() or words[0].endswith(".yaml") else [recipe]), *words)
    assert [piece for piece in says if piece not in text] == [], text
