"""Tiny models, a word-level tokenizer and short examples; no network, one thread, and dllm's tests only with dllm."""

from __future__ import annotations

import gc
import os
import types
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as a command where nobody watches
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# bitsandbytes would import torch's compiler, in each interpreter, and compile what is called a few times
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import dllm_memdlm  # noqa: F401, I001 (before torch, which reads what it sets)

import pytest
import tokenizers
import torch
import transformers
from devices import device, products, pytest_addoption, pytest_configure, sorted_rows  # noqa: F401 (fixtures and hooks)
from measured_tables import pytest_terminal_summary  # noqa: F401 (a hook)
from patched_dllm import tree, unpatched  # noqa: F401 (fixtures)
from run_fixtures import caches_of_runs, finished, recipe_file  # noqa: F401 (fixtures)
from small_run import write_recipe
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from warm_python import warm_python  # noqa: F401 (a fixture)

with warnings.catch_warnings():
    for category in (DeprecationWarning, SyntaxWarning):  # of dllm's sources, when Python compiles them
        warnings.simplefilter("ignore", category)
    from dllm_memdlm.compat import dllm_api
import recipe_files

from dllm_memdlm.backbones import (
    DreamConfig,
    LLaDA2MoeConfig,
    LLaDAConfig,
    LLaDAMoEConfig,
    model_class,
    with_lora,
)
from dllm_memdlm.config import LoraConfig, MemoryConfig
from dllm_memdlm.training.trainer import MemDLMConfig, MemDLMTrainer

VOCABULARY = 48
EOS, BOS, MASK = 0, 1, 2
KINDS = ("llada_moe", "llada2", "llama", "llada")
#: One more decoder, whose logits always predict the next position: in the tests where that, or its files, matter.
SHIFTED = "dream"
#: And an encoder, most of whose layers attend to near positions alone, with fused projections and a head of two layers.
ENCODER = "modernbert"
ALL_KINDS = (*KINDS, SHIFTED, ENCODER)
ARCHITECTURES = {"llada_moe": "LLaDAMoEModelLM", "llada2": "LLaDA2MoeModelLM", "llama": "LlamaForCausalLM"}
ARCHITECTURES |= {"llada": "LLaDAModelLM", SHIFTED: "DreamModel", ENCODER: "ModernBertForMaskedLM"}

COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": EOS}
COMMON |= {"num_attention_heads": 4, "num_key_value_heads": 2}
#: Every kind of layer that a backbone has: dense and sparse ones, shared experts, grouped queries, a fused projection.
DIMENSIONS: dict[str, dict[str, Any]] = {
    "llada_moe": {"dense_intermediate_size": 48, "expert_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    | {"num_experts": 5, "num_experts_per_tok": 2, "moe_layer_freq": [0, 1, 1]},
    "llada2": {"intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2}
    | {"n_group": 3, "topk_group": 2},
    "llama": {"intermediate_size": 48},
    "llada": {"mlp_hidden_size": 48},
    "dream": {"intermediate_size": 48, "mask_token_id": MASK},
    "modernbert": {"intermediate_size": 48, "local_attention": 6, "global_attn_every_n_layers": 2}
    | {"bos_token_id": BOS, "eos_token_id": EOS, "cls_token_id": BOS, "sep_token_id": EOS},
}
CONFIGS = {"llada_moe": LLaDAMoEConfig, "llada2": LLaDA2MoeConfig, "llama": transformers.LlamaConfig}
CONFIGS |= {"llada": LLaDAConfig, SHIFTED: DreamConfig, ENCODER: transformers.ModernBertConfig}

#: Settings under which a wrong inner loop shows: with the paper's lr of 0.1 it hardly moves these models.
AMPLIFIED = {kind: {"inner_lr": 10.0, "grad_clip": 0.2} for kind in ALL_KINDS if kind != "llada2"}
AMPLIFIED["llada2"] = {"inner_lr": 30.0, "grad_clip": 0.02}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files that take long come first, so that no process is alone with one at the end
    long = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in long)
    if not dllm_api.HAS_DLLM:
        skip = pytest.mark.skip(reason=f"needs dllm; in use: {dllm_api.describe()}")
        for item in items:
            if "dllm" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> None:
    """Every trainer collects garbage at its end, and would look at all that was imported: a third of a second each."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup() -> None:
    # TrainingArguments with bf16 write it into the environment, where the next ones would find it
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


#: What launchers set, and accelerate leaves behind in a process: each would change what a launch does.
LAUNCHED = (
    *("ACCELERATE_USE_CPU", "CCL_WORKER_COUNT", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"),
    "OMP_NUM_THREADS",
)


@pytest.fixture
def as_from_a_shell(monkeypatch):
    """No launcher's variables, and a wide terminal."""
    for name in LAUNCHED:
        monkeypatch.setenv(name, "")  # so that what a test sets is undone, too
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> str:
    """A recipe that trains; what it writes goes to the test's folder."""
    monkeypatch.chdir(tmp_path)
    return str(write_recipe(tmp_path))


@pytest.fixture
def base(tmp_path) -> Path:
    """A recipe for others to extend."""
    return recipe_files.write(tmp_path / "base.yaml", recipe_files.BASE)


def tiny_config(kind: str, **dimensions: Any) -> transformers.PretrainedConfig:
    """A config of a few thousand parameters."""
    config = CONFIGS[kind](**{**COMMON, **DIMENSIONS[kind], **dimensions})
    config.architectures = [ARCHITECTURES[kind]]
    return config


def tiny(
    kind: str,
    dtype: torch.dtype = torch.float32,
    lora: bool | float = False,
    seed: int = 0,
    attention: str = "sdpa",
    rank: int = 4,
    **dimensions: Any,
) -> nn.Module:
    """A tiny backbone whose outputs depend on its inputs. `lora` wraps it; a number is the dropout of the LoRA."""
    config = tiny_config(kind, **dimensions)
    config._attn_implementation = attention
    with torch.random.fork_rng(), torch.device("cpu"):  # the same model on every device
        torch.manual_seed(seed)
        model = model_class(ARCHITECTURES[kind])(config)
        scale_up(model)
        model = model.to(dtype)
        if dtype == torch.float64:

            def in_float64(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
                return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()

            for module in model.modules():
                if isinstance(module, (LlamaRMSNorm, Qwen2RMSNorm)):  # which compute in float32 whatever they are given
                    module.forward = types.MethodType(in_float64, module)
        if lora is not False:
            model = with_lora(model, LoraConfig(r=rank, alpha=2 * rank, dropout=0.0 if lora is True else lora))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # zero to begin with, which would hide every gradient of A
                    nn.init.normal_(parameter, std=0.1)
    return model.to(torch.get_default_device()).train()


def scale_up(model: nn.Module) -> None:
    """Draw weights large enough that logits differ by position; norms and router biases too."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("expert_bias"):
                tensor.normal_(std=0.1)
            elif tensor.dim() == 1 and name.endswith(("norm.weight", "ln_f.weight")):
                tensor.normal_(mean=1.0, std=0.2)
            elif name.endswith(("proj.bias", "decoder.bias")):
                tensor.normal_(std=0.2)
            elif tensor.dim() >= 2:
                tensor.normal_(std=1.0 if "embed" in name or "wte" in name else 0.2)


def take_gradients(model: nn.Module, complete: bool = True) -> dict[str, Tensor]:
    """The gradients of everything trainable, none missing if `complete`, and no gradient anywhere else. Clears them."""
    assert [name for name, p in model.named_parameters() if p.grad is not None and not p.requires_grad] == []
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not (complete and missing), f"without a gradient: {missing}"
    model.zero_grad()
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    return {name: zeros[name] if gradient is None else gradient for name, gradient in gradients.items()}


def assert_close_relative(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """|actual - expected| ≤ tolerance · |expected|, norms over the whole tensor."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).norm().item()
    scale = max(expected.double().norm().item(), 1e-6)
    assert error <= tolerance * scale, f"{what}: relative error {error / scale:.2e}, allowed {tolerance:.0e}"


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words w3 … w47, padding = end of sequence, a mask and a begin-of-sequence token."""
    return make_tokenizer()


def make_tokenizer(**special: str) -> transformers.PreTrainedTokenizerFast:
    words = {"<eos>": EOS, "<bos>": BOS, "<mask>": MASK} | {f"w{i}": i for i in range(3, VOCABULARY)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<eos>"} | (special or {"bos_token": "<bos>", "mask_token": "<mask>"})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, padding_side="right", **special)


def examples(
    count: int, seed: int = 0, prompt: int = 3, spread: int = 3, shortest: int = 10, longest: int = 20
) -> list[dict[str, Any]]:
    """Random prompts and responses of several lengths; labels cover the response.

    Prompts are of `prompt` to `prompt + spread` tokens. Padding is a label too, so after collation nothing else tells
    the samples' maskable tokens apart.
    """
    drawn = {"generator": torch.Generator("cpu").manual_seed(seed), "device": "cpu"}  # the same ones on every device
    rows = []
    for number in range(count):
        length = int(torch.randint(shortest, longest + 1, (), **drawn))
        tokens = torch.randint(3, VOCABULARY, (length,), **drawn).tolist()
        start = prompt + number % (spread + 1)
        rows.append({"input_ids": tokens, "labels": [-100] * start + tokens[start:]})
    return rows


def seq2seq(tokenizer: Any) -> transformers.DataCollatorForSeq2Seq:
    """Pads with end of sequence, as input and as label."""
    return transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=tokenizer.pad_token_id)


def make_trainer(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    memory: MemoryConfig | None = None,
    data: Any = None,
    eval_data: Any = None,
    collator: Any = None,
    **training: Any,
) -> MemDLMTrainer:
    """A trainer that writes only when asked to; on the CPU, unless tensors are made elsewhere by default."""
    defaults: dict[str, Any] = {"output_dir": str(folder), "use_cpu": torch.get_default_device().type == "cpu"}
    defaults |= {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3, "max_steps": 2, "logging_steps": 1}
    defaults |= {"bf16": False, "learning_rate": 1e-3, "disable_tqdm": True, "report_to": "none"}
    defaults |= {"eval_strategy": "no", "save_strategy": "no"}
    return MemDLMTrainer(
        model,
        MemDLMConfig(**{**defaults, **training}),
        memory=memory,
        train_dataset=data if data is not None else examples(6),
        eval_dataset=eval_data,
        data_collator=seq2seq(tokenizer) if collator is None else collator,
        processing_class=tokenizer,
    )


def train_batch(trainer: MemDLMTrainer, indices: range | list[int] = range(3)) -> dict[str, Any]:
    """The batch of these examples of the training data, noise included. Full attention, as in the paper."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in indices])
    batch.pop("attention_mask", None)
    return dict(batch)
