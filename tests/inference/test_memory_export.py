"""Memories that are exported: as stock PEFT's adapters, alone or joined with a trained one, and in plain checkpoints.

What `memdlm export` refuses: helpers/bad_inference.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import ENCODER, KINDS, assert_close_relative
from saved_models import prompt_memory, random_prompts, save_adapter, save_model, save_pair, weights_of
from steps import memory_for
from stock_models import (
    a2d_llama,
    bidirectional_logits,
    config_of,
    dllms_model,
    logits,
    save_peft,
    save_stock,
    stock_decoder,
    stock_llama,
)
from torch import Tensor, nn

from dllm_memdlm import export as command
from dllm_memdlm import generate
from dllm_memdlm.config import ConfigError
from dllm_memdlm.inference.plain_checkpoint import export, export_adapter
from dllm_memdlm.inference.pretrained import load_pretrained
from dllm_memdlm.method.prompt_memory import load_snapshot, save_snapshot

pytestmark = pytest.mark.usefixtures("as_from_a_shell")
TEXT = random_prompts(20)[0]


def remember(run: str, path: Path, backbone: str = "llama", **changes: Any) -> Tensor:
    """Write a memory with the model of a run. Returns the logits of the model that holds it."""
    loaded = load_pretrained(run)
    before, prompts = logits(loaded.model), prompt_memory(loaded.model, memory_for(backbone, **changes))
    fast = prompts.recall([TEXT])
    save_snapshot(path, fast, loaded.name, prompts.memory.config, TEXT)
    with prompts.memory.holding(fast):
        expected = logits(loaded.model)
    assert (expected - before).abs().max() > 0.1
    return expected


def assert_close(model: nn.Module | str | Path, expected: Tensor) -> None:
    found = logits(model if isinstance(model, nn.Module) else load_pretrained(str(model)).model)
    assert_close_relative(found, expected, 1e-5)


@pytest.mark.dllm
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
@pytest.mark.parametrize("kind", [*KINDS, ENCODER])
def test_stock_peft_has_it_on_dllms_model(kind, joined, tmp_path):
    model = a2d_llama() if kind == "llama" else dllms_model(kind)
    base = run = save_stock(tmp_path / "base", model)
    if joined:
        run = save_adapter(tmp_path / "run", base, load_pretrained(base).model)
    expected = remember(run, tmp_path / "memory", kind)
    out = export_adapter(run, tmp_path / "adapter", str(tmp_path / "memory"))
    assert_close(peft.PeftModel.from_pretrained(type(model).from_pretrained(base), out), expected)
    if kind != "llama":  # AutoPeftModel takes transformers' own
        assert_close(peft.AutoPeftModel.from_pretrained(out), expected)
    assert_close(out, expected)
    merged = export(run, tmp_path / "merged", memory=str(tmp_path / "memory"))
    assert_close(merged, expected)
    assert_close(type(model).from_pretrained(merged), expected)


@pytest.mark.parametrize(
    ("kind", "joined"), [*((kind, True) for kind in (*KINDS, ENCODER)), ("llada_moe", False), ("llama", False)]
)
def test_our_loader_has_it(kind, joined, tmp_path):
    """From the adapter, and from the weights of a plain checkpoint; a stock decoder under stock PEFT, too."""
    base, adapter = save_pair(tmp_path, kind)
    run = adapter if joined else base
    expected = remember(run, tmp_path / "memory", kind, rank=3, alpha=5.0)
    out = export_adapter(run, tmp_path / "out", str(tmp_path / "memory"))
    assert_close(out, expected)
    assert_close(load_pretrained(str(out), merge_adapter=True).model, expected)
    assert_close(export(run, tmp_path / "merged", memory=str(tmp_path / "memory")), expected)
    if kind == "llama":
        stock = peft.PeftModel.from_pretrained(stock_llama(base), out)
        assert_close_relative(bidirectional_logits(stock), expected, 1e-5)
    saved, config = weights_of(out), config_of(out)
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    layers, down = {"llada": (".transformer.blocks.", "ff_out"), ENCODER: (".layers.", "Wo")}.get(
        kind, (".layers.", "down_proj")
    )
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in saved if f"{layers}2." in name} >= {down}
    assert any(f"{layers}0." in name for name in saved) == joined
    if not joined:
        assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", base)


TRAINED = {
    "on other layers": {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "on some": {"target_modules": ["up_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "rank-stabilised": {"target_modules": "all-linear", "use_rslora": True, "r": 5},
    "of many ranks": {
        "target_modules": ["up_proj", "down_proj", "q_proj"],
        **{"rank_pattern": {r"layers\.2\..*": 6, "up_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 7}},
    },
    "with a whole layer": {"target_modules": ["gate_proj"], "modules_to_save": ["lm_head"]},
    "for a task": {"target_modules": ["down_proj"], "task_type": "CAUSAL_LM", "lora_dropout": 0.1, "bias": "all"},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return save_stock(tmp_path_factory.mktemp("llama"), stock_decoder("LlamaForCausalLM", attention_bias=True))


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_it_is_joined_with_any_plain_lora(trained, llama, tmp_path):
    """And a second memory with a result, whose ranks differ by layer whatever the first one was."""
    save_peft(tmp_path / "run", stock_llama(llama), peft.LoraConfig(**TRAINED[trained]))
    run = str(tmp_path / "run")
    memories = [{}, *([{"target_modules": ("up_proj", "k_proj"), "rank": 2}] if trained == "for a task" else [])]
    for number, more in enumerate(memories):
        expected = remember(run, tmp_path / f"memory{number}", **more)
        run = str(export_adapter(run, tmp_path / f"out{number}", str(tmp_path / f"memory{number}")))
        assert_close(run, expected)
        stock = peft.PeftModel.from_pretrained(stock_llama(llama), run)
        assert_close_relative(bidirectional_logits(stock), expected, 1e-5)


@pytest.mark.parametrize("trained", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_what_is_more_than_a_lora_is_merged_alone(trained, llama, tmp_path):
    save_peft(tmp_path / "run", stock_llama(llama), peft.LoraConfig(target_modules=["q_proj"], **trained))
    run, memory = str(tmp_path / "run"), str(tmp_path / "memory")
    expected = remember(run, Path(memory))
    with pytest.raises(ConfigError, match=f"^adapter='{run}': no plain LoRA"):
        export_adapter(run, tmp_path / "out", memory)
    assert_close(export(run, tmp_path / "merged", memory=memory), expected)


@pytest.mark.parametrize("kind", ["llada_moe", "llama"])
def test_full_size_differences_are_merged(kind, tmp_path):
    _, run = save_pair(tmp_path, kind)
    expected = remember(run, tmp_path / "memory", kind, kind="full")
    assert_close(export(run, tmp_path / "merged", memory=str(tmp_path / "memory")), expected)
    with pytest.raises(ConfigError, match=r"memory: full-size differences .*; go without --as-adapter$"):
        export_adapter(run, tmp_path / "out", str(tmp_path / "memory"))


@pytest.mark.parametrize("kind", ["llada_moe", "llama"])
def test_all_is_added_in_float32_and_rounded_once(kind, tmp_path):
    _, run = save_pair(tmp_path, kind, torch.bfloat16)
    path = tmp_path / "memory"
    remember(run, path, kind)
    merged = weights_of(export(run, tmp_path / "merged", memory=str(path)))
    expected = weights_of(export(run, tmp_path / "expected", dtype="float32"))
    fast, _ = load_snapshot(path, str(run))
    for name in {name.rpartition(".")[0] for name in fast.tensors}:
        down, up = (fast.tensors[f"{name}.{side}"].squeeze(-3) for side in "AB")
        names = [f"model.{name}.weight"]
        if ".experts." in name:
            names = [f"model.{name}.weight".replace("experts.", f"experts.{number}.") for number in range(len(up))]
        for name, more in zip(names, (up @ down * fast.scaling).view(len(names), up.shape[-2], -1), strict=True):
            expected[name] += more
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        assert (tensor != expected[name].bfloat16()).float().mean() < 1e-2, name


@pytest.mark.parametrize("more", [["--as-adapter"], []], ids=["adapter", "merged"])
def test_who_has_what_the_command_wrote_decodes_as_with_the_memory(more, tmp_path, capsys):
    base = save_model(tmp_path / "base", "llama")
    run = save_adapter(tmp_path / "run", base, load_pretrained(base).model, {"memory": {"layer_fraction": 0.4}})
    (tmp_path / "doc.txt").write_text("w5 w9 w30 w31 w7 w8")
    memory, out = str(tmp_path / "doc.safetensors"), str(tmp_path / "out")

    def answer(model: str, *settings: str) -> str:
        asked = ["--prompt-file", str(tmp_path / "doc.txt"), "--question", "w20", "--max-new-tokens", "9", *settings]
        assert generate.main(["--model", model, *asked]) == 0
        return capsys.readouterr().out

    plain, remembered = answer(run), answer(run, "--save-memory", memory, "memory_inner_lr=10")
    assert command.main(["--model", run, "--memory", memory, "--out", out, *more]) == 0
    assert capsys.readouterr().out == f"saved to {out}\n"
    assert answer(out) == remembered != plain
    weights = {"adapter_config.json", "adapter_model.safetensors"} if more else {"config.json", "model.safetensors"}
    assert {path.name for path in Path(out).iterdir()} >= {*weights, "README.md", "recipe.yaml", "tokenizer.json"}


@pytest.mark.parametrize("more", [["--as-adapter"], ["--memory", "m", "--as-adapter", "--dtype", "bfloat16"]])
def test_what_makes_no_sense_together(more, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--model", "base", "--out", "out", *more])
    assert "--as-adapter" in capsys.readouterr().err
