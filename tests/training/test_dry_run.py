"""`--dry-run`: what it shows of a recipe, and what it says is missing."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from command_line import error_of, make_chat_tokenizer
from conftest import tiny

from dllm_memdlm import train
from dllm_memdlm.backbones import LLaDAConfig, LLaDAMoEConfig

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
pytestmark = pytest.mark.usefixtures("as_from_a_shell")


def test_a_dry_run_of_a_local_recipe_misses_nothing(recipe, tmp_path, capsys):
    assert train.main([recipe, "--dry-run", "--memory", "1GiB"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\nfits: 0\.\d of 1\.0 GiB, 0\.\d GiB to spare; tight\nnothing is missing\n$", out)
    assert "Parameters (dimensions of the recipe, trained from scratch)" in out
    assert cell(out, "all") == cell(out, "trainable") == f"{backbone_parameters(263, 32, 3, 8, 4, 16):,}"
    assert cell(out, "fast weights, each sample") == f"{2 * 4 * 3 * 4 * (32 + 16):,}"
    assert "Fast weights: 6 sites, 24 linear layers, from layer 1 of 3 on" in out
    assert not (tmp_path / "runs").exists(), "nothing is written"


def test_a_dry_run_of_a_saved_model_reads_its_config(recipe, tmp_path, capsys):
    folder = tmp_path / "model"
    model = tiny("llama")
    model.save_pretrained(folder)
    make_chat_tokenizer(folder)
    arguments = [recipe, "--dry-run", f"model.path={folder}", "model.architecture=null"]
    assert train.main(arguments) == 0
    out = capsys.readouterr().out
    assert f"Parameters (config.json of {folder})" in out
    assert cell(out, "all") == f"{sum(p.numel() for p in model.parameters()):,}"
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    says = f"missing: weights of model.path='{folder}'; tokenizer '{folder}'; data.dataset='none.jsonl': no such file"
    assert error_of(capsys, *arguments, "data.dataset=none.jsonl").startswith(says)


@pytest.fixture
def out_of_reach(capsys, monkeypatch) -> Callable[[str, str, int], tuple[str, str]]:
    """What a dry run of a recipe of this repository says without network, and its error; of so many layers."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def said(name: str, architecture: str, layers: int) -> tuple[str, str]:
        few = (f"model.dimensions.num_hidden_layers={layers}", "memory.layer_fraction=0.5")
        assert train.main(["--dry-run", str(RECIPES / f"{name}.yaml"), *few]) == 2
        out, errors = capsys.readouterr()
        assert f"Parameters (known dimensions of {architecture}, as config.json is out of reach)" in out
        assert "Traceback" not in errors
        return out, errors.splitlines()[-1]

    return said


def test_a_dry_run_of_the_papers_recipe_needs_nothing(out_of_reach):
    """Parameters by formula: hidden size 2,048, 64 experts of width 1,024, vocabulary 157,184; 2 of the 16 layers."""
    out, error = out_of_reach("llada_moe", "LLaDAMoEModelLM", 2)
    path = "inclusionAI/LLaDA-MoE-7B-A1B-Base"
    assert out.startswith(f"model:\n  path: {path}\n") and "  output_dir: runs/llada_moe\n" in out

    v, d, layers, experts, f, r = 157_184, 2048, 2, 64, 1024, 32
    base = backbone_parameters(v, d, layers, 128, experts, f)
    lora = layers * r * (4 * (d + d) + (d + experts) + experts * 3 * (d + f))
    assert LLaDAMoEConfig().num_hidden_layers == 16
    assert backbone_parameters(v, d, 16, 128, experts, f) == 7_356_880_896
    assert (cell(out, "all"), cell(out, "trainable")) == (f"{base + lora:,}", f"{lora:,}")
    site = experts * r * (d + f)
    assert cell(out, "fast weights, each sample") == f"{3 * site:,}"
    assert "Fast weights: 3 sites, 192 linear layers, from layer 1 of 2 on" in out
    rows = re.findall(r"layers\.(\d+)\.mlp\.experts\.(\S+) +│ +(\d+) │ +(\d+ → \d+) │ +([\d,]+) ", out)
    shapes = {"gate_proj": f"{d} → {f}", "up_proj": f"{d} → {f}", "down_proj": f"{f} → {d}"}
    expected = [("1", *named, f"{site:,}") for named in shapes.items()]
    assert [(layer, name, shape, size) for layer, name, _, shape, size in rows] == expected
    assert {row[2] for row in rows} == {str(experts)}

    quant = "bitsandbytes, for model.load_in_4bit (pip install bitsandbytes); "
    quant = "" if importlib.util.find_spec("bitsandbytes") else quant
    assert error.startswith(f"error: missing: weights of model.path='{path}'; tokenizer '{path}'; {quant}data.dataset=")
    assert "data.dataset='Yukang/LongAlpaca-12k', split 'train': " in error


def test_a_dry_run_of_llada_8b_needs_nothing(out_of_reach):
    """Parameters by formula: hidden size 4,096, width 12,288, vocabulary 126,464; 2 of the 32 layers."""
    out, error = out_of_reach("llada_8b", "LLaDAModelLM", 2)
    v, d, f, r = 126_464, 4096, 12_288, 32

    def parameters(layers: int) -> int:  # embedding, output and last norm; each layer: attention, two norms, gated MLP
        return 2 * v * d + d + layers * (4 * d * d + 2 * d + 3 * d * f)

    lora = 2 * r * (4 * (d + d) + 3 * (d + f))
    assert parameters(LLaDAConfig().num_hidden_layers) == 8_015_581_184, "as published"
    assert cell(out, "all") == f"{parameters(2) + lora:,}"
    assert cell(out, "trainable") == f"{lora:,}", "none on the output"
    assert cell(out, "fast weights, each sample") == f"{3 * r * (d + f):,}"
    assert re.findall(r"transformer\.blocks\.1\.(\w+) ", out) == ["ff_proj", "up_proj", "ff_out"]
    assert "error: missing: weights of model.path='GSAI-ML/LLaDA-8B-Instruct'" in error


def backbone_parameters(v: int, d: int, layers: int, head: int, experts: int, f: int) -> int:
    """Embedding and output; each layer: q, k, v, o, norms on q and k, two norms, router, gated experts; last norm."""
    return 2 * v * d + layers * (4 * d * d + 2 * head + 2 * d + d * experts + experts * 3 * d * f) + d


def cell(out: str, row: str) -> str:
    """The second cell of a table's row."""
    (line,) = (line for line in out.splitlines() if line.startswith(f"│ {row} "))
    return line.split("│")[2].strip()


def test_a_dry_run_says_what_does_not_fit(recipe, capsys):
    assert train.main([recipe, "--dry-run", "--memory", "100MiB", "--gpus", "2"]) == 0
    out = capsys.readouterr().out
    assert "Memory of a GPU in GiB (2 GPUs, ddp; most at once: " in out
    assert "Each step: 32,768 tokens, 8 examples of 4,096; " in out and "Steps: 4\n" in out
    parts = ("weights", "optimizer", "gradients", "activations", "fast weights", "logits")
    assert float(cell(out, "together")) == pytest.approx(sum(float(cell(out, part)) for part in parts), abs=0.003)
    says = r"\ndoes not fit: .* of 0\.1 GiB, .* GiB too much; first try training.gradient_checkpointing=true\n"
    assert re.search(says, out)


def test_without_memory_or_a_size_of_it_there_is_less_to_say(recipe, capsys):
    settings = ("memory.enabled=false", "training.max_steps=-1", "training.num_train_epochs=2")
    assert train.main([recipe, "--dry-run", *settings]) == 0
    out = capsys.readouterr().out
    assert cell(out, "fast weights, each sample") == "0 (memory is off)"
    assert "sites" not in out and "fit" not in out and "(1 GPU; most at once: " in out
    assert "Steps: about 8 (2 epochs of 16 examples; long ones would be dropped)\n" in out
