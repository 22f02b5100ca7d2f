"""Arguments of generate, export and evaluate: what they mean; and one line for each of those that cannot be.

It says what, where, and what is accepted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inference import BAD, COPIES, FILES
from conftest import ARCHITECTURES, tiny
from saved_models import BYTES, byte_tokenizer, save_adapter, save_model
from small_run import ROWS

from dllm_memdlm import export, generate
from dllm_memdlm.cli import exit_code
from dllm_memdlm.config import ConfigError, MemoryConfig
from dllm_memdlm.data import train_tokenizer
from dllm_memdlm.evaluation import exposure_bias
from dllm_memdlm.inference.arguments import EvalArguments, Parsed, device_of, parse
from dllm_memdlm.inference.decoding import SAMPLERS
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


def parsed(**values) -> Parsed:
    return parse({"pretrained": "runs/mine", **values})


def test_the_memory_is_on_where_it_or_one_of_its_settings_is_given():
    found = parsed()
    assert found == Parsed(EvalArguments(pretrained="runs/mine"), {}, {}, False)
    assert found.arguments.mc_num == 128 and found.arguments.max_gen_toks == 256 and found.arguments.batch_size == 1
    assert not parsed(memory_rank=4, memory=False).uses_memory and not parsed(fast_weights="a").uses_memory
    for values in ({"memory": True}, {"memory_rank": 4}, {"memory_inner_lr": 0.1, "memory_scope": "prefix"}):
        assert parsed(**values).uses_memory


def test_every_setting_of_a_sampler_and_of_the_memory_is_an_argument():
    per_prompt = {"max_new_tokens", "max_length", "return_dict", "right_shift_logits"}
    for sampler in SAMPLERS.values():
        for name in {f.name for f in dataclasses.fields(sampler.CONFIG)} - per_prompt:
            assert parsed(**{name: 3}).sampler == {name: 3}
    for field in dataclasses.fields(MemoryConfig):
        if field.name not in {"enabled", "dropout", "weighting", "scope", "sync", "source", "prompt_loss"}:
            assert parsed(**{f"memory_{field.name}": 3}).memory == {field.name: 3}


@pytest.mark.parametrize(
    ("values", "sampler", "memory"),
    [
        ({"block_size": "None", "steps": 8.0}, {"block_size": None, "steps": 8}, {}),
        ({"suppress_tokens": "[5;7]", "cfg_keep_tokens": "[]"}, {"suppress_tokens": [5, 7], "cfg_keep_tokens": []}, {}),
        ({"memory_target_modules": "[up_proj,down_proj]"}, {}, {"target_modules": ["up_proj", "down_proj"]}),
        ({"memory_target_modules": "[gate_proj; up_proj]"}, {}, {"target_modules": ["gate_proj", "up_proj"]}),
        ({"cache": "none", "memory_clip": "none"}, {"cache": "none"}, {"clip": "none"}),
        # numbers that YAML takes for text, but recipes and these arguments do not
        ({"temperature": "5e-2", "memory_inner_lr": "1E+3"}, {"temperature": 0.05}, {"inner_lr": 1000}),
        ({"temperature": "-2.e-1", "memory_inner_lr": ".5e1"}, {"temperature": -0.2}, {"inner_lr": 5}),
    ],
)
def test_values_as_lm_eval_spells_them(values, sampler, memory, monkeypatch):
    """It leaves `none` and lists of words as text, and makes 1e3 and -3 floats."""
    found = parsed(**values)
    assert (found.sampler, found.memory) == (sampler, memory)
    monkeypatch.setenv("HOME", "/home/ada")
    own = parsed(pretrained="~/runs/mine", adapter="none", seed=-3.0).arguments
    assert (own.pretrained, own.adapter, own.seed) == ("/home/ada/runs/mine", None, -3)
    assert parsed(adapter="5e-adapter").arguments.adapter == "5e-adapter"
    for size in (1, "1", 64, "64", "auto", "auto:2"):
        assert parsed(batch_size=size).arguments.batch_size == size


def test_a_device_that_is_not_there_is_the_cpu_and_one_that_is_none_is_refused(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with caplog.at_level(logging.WARNING, "lm_eval"):
        assert device_of(None) == device_of("cpu") == torch.device("cpu") and caplog.messages == []
        assert device_of("cuda") == device_of("cuda:0") == torch.device("cpu")
    assert [message.partition(":")[0] for message in caplog.messages] == ["device=cuda"] * 2
    for name in ("abacus", "meta", "cuda:x", "cuda:-1", "cpu:"):
        with pytest.raises(ConfigError, match=f"device='{name}': expected cpu, cuda, cuda:N or mps"):
            device_of(name)


def test_what_is_opened_has_the_settings_that_were_given(tmp_path):
    trained = {"rank": 4, "alpha": 8.0, "layer_fraction": 0.4, "inner_lr": 0.3}
    folder = save_model(tmp_path, "llada2", recipe={"memory": trained})
    values = {"memory_steps": 3, "memory_attention": "block_causal", "seed": 7, "max_length": 99, "dtype": "bfloat16"}
    decoder = parse({"pretrained": folder, "block_size": 16, "threshold": 0.5, **values}).open()
    assert decoder.sampler == "llada21" and decoder.max_length == 99
    assert decoder.settings == {"block_size": 16, "threshold": 0.5}
    memory = decoder.memory
    assert (memory.seed, memory.attention, memory.block_size) == (7, "block_causal", 16)
    expected = {**trained, "steps": 3, "weighting": "uniform", "source": "prompt"}
    assert {name: getattr(memory.memory.config, name) for name in expected} == expected
    assert decoder.pretrained.model.dtype == torch.bfloat16
    plain = parse({"pretrained": folder}).open()
    assert plain.memory is None and plain.max_length == plain.pretrained.model.config.max_position_embeddings
