"""Whole runs of a recipe: what they leave behind, what they log, and the dtype that they keep weights in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_run import logs_of, recipe_for, write_base, write_recipe

from dllm_memdlm.backbones import config_of, load_model
from dllm_memdlm.backbones.adapters import load_adapter
from dllm_memdlm.backbones.expert_names import split_names
from dllm_memdlm.training import run
from dllm_memdlm.training.recipe import load_recipe


def test_what_a_run_leaves_behind(finished, recipe_file):
    """Model, tokenizer, recipe and state, with no trace of the memory, in every checkpoint too."""
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "tokenizer.json", "trainer_state.json", "checkpoint-2", "checkpoint-4"} <= names
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    assert pickled == ["training_args.bin"], "weights are safe"
    recipe = recipe_for(recipe_file, finished)
    texts = [(path / "recipe.yaml").read_text() for path in (finished, *finished.glob("checkpoint-*"))]
    assert texts == [recipe.to_yaml()] * 3
    weights = load_file(finished / "model.safetensors")
    fresh = load_model(recipe.model, config_of(recipe.model, vocab_size=263), recipe.lora)
    assert weights.keys() == split_names(fresh.state_dict()).keys()
    assert not any(torch.isnan(tensor).any() for tensor in weights.values())
    config = json.loads((finished / "config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished)
    assert (config["architectures"], config["vocab_size"]) == (["LLaDAMoEModelLM"], len(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert config[name] == getattr(tokenizer, name) is not None
    last = finished / "checkpoint-4" / "model.safetensors"
    assert (finished / "model.safetensors").read_bytes() == last.read_bytes()


def test_the_log_has_every_curve(finished):
    logs = logs_of(finished)
    train = [log for log in logs if "loss" in log]
    assert [(log["step"], log["epoch"]) for log in train] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    names = ("loss", "loss_memory_off", "inner_loss_1", "inner_loss_2", "grad_norm", "inner_grad_norm_2")
    for log in train:
        assert min(log[name] for name in (*names, "step_seconds")) > 0 and log["nonfinite_samples"] == 0
    evaluations = [log for log in logs if "eval_loss" in log]
    assert [log["step"] for log in evaluations] == [2, 4], "the last step is evaluated once"
    assert all(log["eval_loss"] > 0 and log["eval_loss_memory_off"] > 0 for log in evaluations)
    assert {"nll", "eval_nll", "eval_ppl"} <= {name for log in logs for name in log}


def test_the_summary_and_the_progress_are_readable(recipe_file, tmp_path, capsys):
    """The end is evaluated although no interval falls on it, and nothing is saved but the end."""
    overrides = ("training.max_steps=3", "training.disable_tqdm=false", "training.save_strategy='no'")
    run.train(recipe_for(recipe_file, tmp_path, *overrides))
    assert not list(tmp_path.glob("checkpoint-*")) and (tmp_path / "model.safetensors").is_file()
    out = capsys.readouterr().out
    assert "train: 16 examples, mean 31.0 tokens, longest 31 (dropped 0 too long, 0 without a response); eval: 4" in out
    step = next(line for line in out.splitlines() if line.strip().startswith("step     1"))
    log = next(log for log in logs_of(tmp_path) if log.get("step") == 1)
    assert f"loss {log['loss']:.4f}  loss_memory_off {log['loss_memory_off']:.4f}" in step
    evaluations = [log for log in logs_of(tmp_path) if "eval_loss" in log]
    assert [log["step"] for log in evaluations] == [2, 3]
    assert f"step     2  eval_loss {evaluations[0]['eval_loss']:.4f}  eval_loss_memory_off" in out
    assert "{'" not in out, "the logs are not printed as Python as well"
    assert out.endswith(f"saved to {tmp_path}\n")


def test_a_lora_run_on_a_saved_model_leaves_a_peft_adapter(finished, recipe_file, tmp_path):
    """From the folder of the first run: its tokenizer and weights are found; the adapter is PEFT's, and no more."""
    overrides = [f"model.path={finished}", "model.architecture=null", "training.max_steps=3"]
    overrides += ["lora.enabled=true", "lora.r=4", "lora.alpha=8"]
    trainer = run.train(recipe_for(recipe_file, tmp_path, *overrides))
    assert (tmp_path / "tokenizer.json").is_file() and not (tmp_path / "model.safetensors").exists()
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rsplit(".", 2)[1] for name in adapter} == {"lora_A", "lora_B"}
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(finished))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    base = load_model(recipe.model, config_of(recipe.model)).eval()
    tokens = torch.arange(20, 44).view(2, 12)
    before, expected = base(input_ids=tokens).logits, trainer.model.eval()(input_ids=tokens).logits
    assert torch.equal(load_adapter(base, str(tmp_path)).eval()(input_ids=tokens).logits, expected)
    assert not torch.allclose(before, expected, atol=1e-6)
    for folder in (tmp_path, *tmp_path.glob("checkpoint-*")):
        card = (folder / "README.md").read_text()
        assert "A PEFT LoRA adapter for" in card and "More Information Needed" not in card


SMALL_STEPS = (
    *("training.max_steps=3", "training.bf16=true", "training.save_strategy='no'", "training.eval_strategy='no'"),
    "data.eval_fraction=0",
)


@pytest.fixture
def undecided(tmp_path) -> Path:
    """A recipe without a dtype."""
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("  dtype: float32\n", ""))
    return path


def moved(recipe_file, folder, *settings: str) -> float:
    """The share of the weights of attention that a run has changed."""
    for name, rate in (("end", "2e-5"), ("start", "0")):
        run.train(recipe_for(recipe_file, folder / name, *SMALL_STEPS, *settings, f"training.learning_rate={rate}"))
    start, end = (load_file(folder / name / "model.safetensors") for name in ("start", "end"))
    return torch.cat([(end[name] != start[name]).flatten() for name in end if "self_attn" in name]).double().mean()


def test_where_all_weights_train_no_update_is_lost(undecided, tmp_path, capsys):
    assert moved(undecided, tmp_path / "default") > 0.9
    assert "lost in rounding" not in capsys.readouterr().out
    assert moved(undecided, tmp_path / "low", "model.dtype=bfloat16") < 0.5
    said = "model.dtype=bfloat16: most updates of weights are lost in rounding; float32 keeps them"
    assert said in capsys.readouterr().out


def test_the_dtype_goes_by_what_is_trained(undecided, tmp_path, monkeypatch):
    """The base's path begins at home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_base(undecided, tmp_path / "base")
    base = ("model.path=~/base", "model.architecture=null", "model.dimensions={}")
    for lora, dtype in (("true", "bfloat16"), ("false", "float32")):
        recipe = load_recipe(undecided, [*base, f"lora.enabled={lora}"])
        assert (recipe.model.path, recipe.model.dtype) == (str(tmp_path / "base"), dtype)
        assert next(run.build_trainer(recipe).model.get_input_embeddings().parameters()).dtype == getattr(torch, dtype)
        assert f"dtype: {dtype}\n" in recipe.to_yaml(), "what is saved says what was used"
