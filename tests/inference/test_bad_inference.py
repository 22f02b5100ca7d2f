"""What cannot be generated, exported or evaluated ends in one line that says what, where, and what is accepted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from bad_inference import BAD, COPIES, FILES
from conftest import ARCHITECTURES, tiny
from saved_models import BYTES, byte_tokenizer, save_adapter, save_model
from small_run import ROWS

from dllm_memdlm import export, generate
from dllm_memdlm.cli import exit_code
from dllm_memdlm.data import train_tokenizer
from dllm_memdlm.evaluation import exposure_bias
from dllm_memdlm.inference.arguments import parse
from dllm_memdlm.method.fast_weights import FastWeights
from dllm_memdlm.method.prompt_memory import save_snapshot
from reproduce import needle

pytestmark = pytest.mark.usefixtures("as_from_a_shell")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """The folder that the rows speak of."""
    root = tmp_path_factory.mktemp("places")
    for name, content in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    recipe = {
        "model": {"architecture": ARCHITECTURES["llama"]},
        "data": {"dataset": "rows.jsonl", "eval_fraction": 0.2},
        "memory": {"rank": 4, "layer_fraction": 0.4},
        "training": {"max_steps": 1, "bf16": False},
    }
    base = save_model(root / "base", "llama", byte_tokenizer(), recipe)
    save_adapter(root / "adapter", base, tiny("llama", vocab_size=BYTES))
    train_tokenizer(["many more words than bytes"] * 9, 290).save_pretrained(root / "large")
    memory = parse({"pretrained": base, "memory": True}).open().memory
    one = memory.recall([[20, 21, 22]])
    save_snapshot(root / "other.memory", one, "another", memory.memory.config, [20, 21, 22])
    save_snapshot(root / "two.memory", FastWeights.stack([one, one]), "another", memory.memory.config, [20])
    for copy, (source, changes) in COPIES.items():
        shutil.copytree(root / source, root / copy)
        for path, change in ((root / copy / name, change) for name, change in changes.items()):
            if change is None:
                path.unlink(missing_ok=True)
            elif isinstance(change, dict):
                path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
            else:
                path.write_bytes(change)
    return root


@cache
def lm(text: str) -> Any:
    """lm-eval's model of a string of arguments."""
    from dllm_memdlm.evaluation import lm_eval_model as model

    return model.MemDLMEvalLM.create_from_arg_string(text, {"device": "cpu"})


def answer(arguments: list[str]) -> None:
    """One request of a task with these settings of generation."""
    from lm_eval.api.instance import Instance
    from lm_eval.utils import simple_parse_args_string

    settings = simple_parse_args_string(",".join(arguments))
    lm("pretrained=base,max_length=99,max_gen_toks=4").generate_until(
        [Instance("generate_until", {}, ("Ada", settings), 0)], True
    )


#: Each command, with arguments that are good but for those of the row, which come last.
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "generate": lambda row: generate.main(["--model", "base", "--question", "Who?", "--max-new-tokens", "3", *row]),
    "export": lambda row: export.main(["--model", "base", "--out", "out", *row]),
    "exposure_bias": lambda row: exposure_bias.main(["--model", "base", "--output", "out.json", *row]),
    "needle": lambda row: needle.main(["--model", "base", "--words", "40", "--output", "out.json", *row]),
    "lm_eval": lambda row: exit_code(lambda: lm(",".join(row))),
    "task": lambda row: exit_code(lambda: answer(row)),
    "template": lambda row: exit_code(lambda: lm("pretrained=base").chat_template(row[0])),
}


@pytest.mark.parametrize(
    ("command", "row"),
    [(command, row) for command, rows in BAD.items() for row in rows],
    ids=lambda part: part if isinstance(part, str) else repr(part[0])[:60],
)
def test_bad_input_is_one_line(command, row, places, monkeypatch, capsys):
    monkeypatch.chdir(places)
    arguments, *says = row
    if command in ("lm_eval", "task", "template"):
        pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'dllm-memdlm[eval]'")
        lm("pretrained=base")
    capsys.readouterr()
    assert COMMANDS[command](arguments.split() if isinstance(arguments, str) else arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert [part for part in says if part not in captured.err] == [], captured.err
    assert not (places / "out").exists() and not (places / "out.json").exists()
