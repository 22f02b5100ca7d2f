"""Tiny models with a tokenizer for decoding: in memory, and in folders as runs leave them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import MASK, make_tokenizer, tiny
from safetensors.torch import load_file
from small_run import write_recipe
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dllm_memdlm.backbones import with_lora
from dllm_memdlm.config import LoraConfig, MemoryConfig
from dllm_memdlm.data import train_tokenizer
from dllm_memdlm.inference.decoding import Decoder
from dllm_memdlm.inference.pretrained import Pretrained
from dllm_memdlm.method.inner_loop import ParametricMemory
from dllm_memdlm.method.prompt_memory import PromptMemory, at_inference
from dllm_memdlm.training import run
from dllm_memdlm.training.recipe import load_recipe

#: A tokenizer with a token for each byte, which has LLaDA's special tokens and a chat template.
BYTES = 263


def word_tokenizer() -> PreTrainedTokenizerBase:
    """The tests' word tokenizer, complete as `load_tokenizer` would leave it."""
    tokenizer = make_tokenizer()
    tokenizer.eot_token, tokenizer.eot_token_id = tokenizer.eos_token, tokenizer.eos_token_id
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["a few words"], BYTES)


def bert_tokenizer() -> PreTrainedTokenizerBase:
    """As a BERT's: no chat template, no end of a text, and marks around each text."""
    tokenizer, text = byte_tokenizer(), byte_tokenizer().backend_tokenizer.to_str()
    names = {"cls_token": "[CLS]", "pad_token": "[PAD]", "mask_token": "[MASK]", "sep_token": "[SEP]"}
    for ours, theirs in zip(tokenizer.convert_ids_to_tokens(range(4)), names.values(), strict=True):
        text = text.replace(ours, theirs)
    backend = tokenizer.backend_tokenizer.from_str(text)
    around = [("[CLS]", 0), ("[SEP]", 3)]
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def ending(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, which now appends its end of text to every text, as some published ones do."""
    eos = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {eos[0]}", special_tokens=[eos])
    return tokenizer


def pretrained_of(model: nn.Module, memory: MemoryConfig | None = None, shift: bool = False) -> Pretrained:
    """What `load_pretrained` would give for a model with the word tokenizer."""
    return Pretrained("tiny", model.eval().requires_grad_(False), word_tokenizer(), memory or MemoryConfig(), shift)


def prompt_memory(model: nn.Module, config: MemoryConfig, shift: bool = False, **settings: Any) -> PromptMemory:
    """A memory of prompts for a frozen model."""
    model.eval().requires_grad_(False)
    return PromptMemory(ParametricMemory(model, at_inference(config), MASK, right_shift_logits=shift), **settings)


def decoder_with(memory: PromptMemory | None, model: nn.Module, **settings: Any) -> Decoder:
    shift = memory is not None and memory.memory.right_shift_logits
    return Decoder(pretrained_of(model, shift=shift), settings=settings, memory=memory)


def answers_of(decoder: Decoder, texts: Iterable[list[int]], new_tokens: int = 6) -> list[list[int]]:
    """All tokens that follow each text, decoded as one batch, each with the memory of itself."""
    texts = list(texts)
    with decoder.recalled(texts):
        return decoder.answers(texts, new_tokens, whole=True)


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths, in words."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 46, (length,), generator=generator).tolist() for length in lengths]


def save_model(
    folder: Path,
    kind: str = "llama",
    tokenizer: PreTrainedTokenizerBase | None = None,
    recipe: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **dimensions: Any,
) -> str:
    """A full model as a run saves it, with the recipe's sections beside it. The word tokenizer by default."""
    tokenizer = tokenizer or make_tokenizer()
    model = tiny(kind, dtype, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **dimensions)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_recipe(folder, recipe)
    return str(folder)


def save_adapter(folder: Path, base: str, model: nn.Module, recipe: dict[str, Any] | None = None, r: int = 4) -> str:
    """An adapter of `model`, whose weights lie in `base`, and no tokenizer."""
    adapted = with_lora(model, LoraConfig(r=r, alpha=2 * r, dropout=0.0))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(folder)
    save_recipe(folder, recipe)
    return str(folder)


def train_adapter(folder: Path, base: str, *overrides: str) -> str:
    """The folder of a run that trains a LoRA on a model of the byte tokenizer, three steps far."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = [f"training.output_dir={folder / 'run'}", f"model.path={base}", "model.architecture=null"]
    settings += ["model.dimensions={}", "lora.enabled=true", "lora.r=4", "lora.alpha=8", "training.max_steps=3"]
    settings += ["training.save_strategy='no'", "training.learning_rate=0.05", *overrides]
    run.train(load_recipe(write_recipe(folder), settings))
    return str(folder / "run")


def save_pair(folder: Path, kind: str, dtype: torch.dtype = torch.float32, r: int = 4) -> tuple[str, str]:
    """A base and an adapter for it."""
    base = save_model(folder / "base", kind, dtype=dtype)
    return base, save_adapter(folder / "adapter", base, tiny(kind, dtype), {"memory": {"rank": 5}}, r)


def weights_of(folder: str | Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def save_recipe(folder: Path, recipe: dict[str, Any] | None) -> None:
    if recipe is not None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
