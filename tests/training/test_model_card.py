"""README.md beside trained weights: what is known of the run, and nothing of anybody's disk in its metadata."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from saved_models import byte_tokenizer, prompt_memory, save_model, train_adapter
from small_run import logs_of, write_recipe

from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.inference.plain_checkpoint import export, export_adapter
from dllm_memdlm.inference.pretrained import load_pretrained
from dllm_memdlm.machine import package_versions
from dllm_memdlm.method.prompt_memory import save_snapshot
from dllm_memdlm.training import run
from dllm_memdlm.training.model_card import label, write_run_card
from dllm_memdlm.training.recipe import load_recipe


def card_of(folder: str | Path) -> ModelCard:
    return ModelCard.load(Path(folder) / "README.md")


def fenced(text: str, language: str) -> str:
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return block


def last(folder: str | Path, name: str) -> float:
    return [log[name] for log in logs_of(Path(folder)) if name in log][-1]


def edit_recipe(folder: str | Path, **sections: dict[str, Any]) -> None:
    path = Path(folder) / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**recipe, **{name: {**recipe[name], **sections[name]} for name in sections}}))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("trained")
    return train_adapter(folder, save_model(folder / "base", "llada_moe", byte_tokenizer()))


def test_a_runs_adapter_has_our_card_and_not_pefts_draft(adapter):
    card = card_of(adapter)
    assert "More Information Needed" not in card.content
    assert "A PEFT LoRA adapter for `base`." in card.text
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert card.data.tags == ["dllm", "masked-diffusion", "memdlm", "lora"]
    assert "base_model" not in card.data.to_dict() and card.data.datasets is None, "local ones mean nothing to others"
    assert "/tmp" not in card.data.to_yaml()
    for name in ("loss", "loss_memory_off", "eval_loss", "eval_loss_memory_off"):
        assert f"| `{name}` | {last(adapter, name):.4f} |" in card.text
    assert "After 3 steps (0.75 epochs)" in card.text and "fitted to the very tokens being scored" in card.text
    assert fenced(card.text, "yaml") == (Path(adapter) / "recipe.yaml").read_text()
    assert all(f"- {package} {version}\n" in card.text for package, version in package_versions().items())
    scope: dict[str, Any] = {}
    exec(fenced(card.text, "python").replace("FOLDER", adapter), scope)  # its Python runs
    assert torch.isfinite(scope["logits"]).all() and scope["logits"].shape[-1] == 263


def test_names_of_the_hub_are_in_the_metadata_and_local_ones_are_not(adapter, tmp_path):
    adapter = str(shutil.copytree(adapter, tmp_path / "run"))
    assert (label("/secret/model"), label("inclusionAI/LLaDA2.1-mini")) == ("`model`", "`inclusionAI/LLaDA2.1-mini`")
    edit_recipe(adapter, model={"path": None})
    for dataset in ("rows.jsonl", "package:long_context_eval/x.json", "/data/rows", "~/rows", "a/b/c"):
        edit_recipe(adapter, data={"dataset": dataset})
        write_run_card(adapter)
        assert card_of(adapter).data.datasets is None
    assert "A PEFT LoRA adapter, trained from scratch." in card_of(adapter).text
    edit_recipe(adapter, model={"path": "inclusionAI/LLaDA2.1-mini"}, data={"dataset": "Yukang/LongAlpaca-12k"})
    write_run_card(adapter)
    data = card_of(adapter).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("inclusionAI/LLaDA2.1-mini", "adapter")
    assert data["datasets"] == ["Yukang/LongAlpaca-12k"]
    assert "A PEFT LoRA adapter for `inclusionAI/LLaDA2.1-mini`." in card_of(adapter).text


def test_plain_mdlm_has_no_word_of_memory(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), [f"training.output_dir={tmp_path}/mdlm", "memory.enabled=false"])
    run.train(recipe)
    card = card_of(tmp_path / "mdlm")
    assert "A full model, trained from scratch." in card.text and "plain masked diffusion (MDLM)" in card.text
    assert (card.data.library_name, card.data.tags) == ("transformers", ["dllm", "masked-diffusion"])
    prose = card.text.partition("## Recipe")[0]
    assert f"| `eval_loss` | {last(tmp_path / 'mdlm', 'eval_loss'):.4f} |" in prose
    assert "memory_off" not in prose and "--memory" not in prose and "fast weights" not in prose


def test_an_exports_card(adapter, tmp_path):
    card = card_of(export(adapter, tmp_path / "merged", dtype="bfloat16"))
    assert card.text.lstrip().startswith("# merged\n")
    assert "`base` with the adapter `run` added to its weights, in bfloat16." in card.text
    assert card.data.library_name == "transformers" and "lora" not in card.data.tags
    assert f"| `eval_loss_memory_off` | {last(adapter, 'eval_loss_memory_off'):.4f} |" in card.text
    assert fenced(card.text, "yaml") == (Path(adapter) / "recipe.yaml").read_text()
    unknown = card_of(
        export(str(Path(adapter).parent / "base"), tmp_path / "copy")
    )  # nothing is known of these weights
    assert "`base` in float32." in unknown.text and "memdlm" not in unknown.data.tags
    assert "## Recipe" not in unknown.text and "## Results" not in unknown.text and "dllm-memdlm." in unknown.text


def test_the_cards_of_a_memory(adapter, tmp_path):
    """They say of which text, and do not ask to write another one; the run's losses are without it."""
    loaded, memory = load_pretrained(adapter), str(tmp_path / "doc.safetensors")
    prompts = prompt_memory(loaded.model, MemoryConfig(rank=2))
    save_snapshot(memory, prompts.recall([[20, 21, 22]]), loaded.name, prompts.memory.config, [20, 21, 22])
    alone = card_of(export_adapter(adapter, tmp_path / "adapter", memory))
    merged = card_of(export(adapter, tmp_path / "merged", memory=memory))
    assert "A PEFT LoRA adapter for `base`: the memory `doc.safetensors`, joined with the adapter `run`." in alone.text
    added = "the adapter `run` and the memory `doc.safetensors` added to its weights, in float32."
    assert f"`base` with {added}" in merged.text
    for card, library in ((alone, "peft"), (merged, "transformers")):
        assert "The memory is fast weights that the inner loop has written on one text." in card.text
        assert 'generate --model FOLDER --question "Who wrote it?"\n' in card.text and "## Results" not in card.text
        assert (card.data.library_name, "lora" in card.data.tags) == (library, library == "peft")
        assert "memdlm" in card.data.tags and fenced(card.text, "yaml") == (Path(adapter) / "recipe.yaml").read_text()
