"""Tensors of all experts in memory, a matrix an expert in files: checkpoints, adapters and PEFT's settings."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import assert_close_relative, make_trainer, tiny, tiny_config
from inputs import tokens
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import trainer as transformers_trainer

from benchmarks.naive_experts import LoopOverExperts
from dllm_memdlm.backbones import config_of, load_model, model_class, moe
from dllm_memdlm.backbones.expert_names import split_names, stack_names
from dllm_memdlm.backbones.layers import GatedMLP
from dllm_memdlm.backbones.moe import RoutedExperts, stack_experts
from dllm_memdlm.backbones.stacking import experts_apart
from dllm_memdlm.config import ConfigError, ModelConfig
from dllm_memdlm.training.planner.shapes import shape_model
from dllm_memdlm.training.recipe import load_recipe
from dllm_memdlm.training.trainer import MemDLMTrainer

KINDS = ("llada_moe", "llada2")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def apart(kind: str, like: nn.Module) -> nn.Module:
    """The same model with a module an expert, as other libraries have it. It cannot be run."""
    with experts_apart():
        model = model_class(type(like).__name__)(tiny_config(kind))
    model.load_state_dict(split_names(like.state_dict()))
    return model.train(like.training)


def trained(name: str, model: nn.Module) -> list[str]:
    return [key for key, p in model.named_parameters() if name in key and p.requires_grad]


# === how many there are ===


@pytest.mark.parametrize(
    ("recipe", "bits", "tensors", "modules"),
    [("llada2_mini", 16, 600, 3000), ("llada_moe", 16, 600, 3000), ("llada2_mini", 4, 600, 3000)],
)
def test_a_published_model_has_few_modules(recipe, bits, tensors, modules):
    """LLaDA2.1-mini has 14,592 matrices of experts, LLaDA-MoE 3,072. A step walks all modules, some of them twice."""
    loaded = load_recipe(f"recipes/{recipe}.yaml", [f"model.load_in_4bit={str(bits == 4).lower()}"])
    cls = model_class({"llada2_mini": "LLaDA2MoeModelLM", "llada_moe": "LLaDAMoEModelLM"}[recipe])
    named = dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, architecture=cls.__name__))
    model = shape_model(named, cls.config_class())
    assert len(trained("", model)) < tensors and sum(1 for _ in model.modules()) < modules
    sparse = sum(isinstance(module, RoutedExperts) for module in model.modules())
    assert sparse == {"llada2_mini": 19, "llada_moe": 16}[recipe]
    assert len(trained("experts.", model)) - len(trained("shared_experts.", model)) == 6 * sparse


# === checkpoints ===


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_checkpoint_of_published_names_is_trained_and_read_back(kind, tokenizer, tmp_path):
    apart(kind, tiny(kind)).save_pretrained(tmp_path / "published", max_shard_size="20KB")
    published = read(tmp_path / "published")
    assert any(".experts.3.down_proj.weight" in name for name in published)
    assert len(list((tmp_path / "published").glob("model-*.safetensors"))) > 3
    settings = ModelConfig(path=str(tmp_path / "published"), dtype="float32")
    model = load_model(settings, config_of(settings))
    assert all(torch.equal(value, published[name]) for name, value in split_names(model.state_dict()).items())
    assert not any(".experts.3." in name for name in model.state_dict())

    trainer = make_trainer(model, tokenizer, tmp_path / "run", max_steps=2, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    saved = read(tmp_path / "trained")
    assert {name: value.shape for name, value in saved.items()} == {n: v.shape for n, v in published.items()}
    experts = [name for name in saved if ".experts." in name]
    assert sum(not torch.equal(saved[name], published[name]) for name in experts) > len(experts) / 2
    again = load_model(ModelConfig(path=str(tmp_path / "trained"), dtype="float32"), config_of(settings))
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def read(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("model*.safetensors") for name, value in load_file(path).items()}


def test_a_state_dict_may_have_either_names():
    model, other = tiny("llada_moe"), tiny("llada_moe", seed=1)
    state = split_names(other.state_dict())
    assert stack_names(state).keys() == other.state_dict().keys()
    model.load_state_dict(state)
    assert torch.equal(model(input_ids=tokens()).logits, other(input_ids=tokens()).logits)
    model.load_state_dict(tiny("llada_moe").state_dict())
    del state["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.up_proj\.weight"):
        model.load_state_dict(state)
    state["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match=r"experts\.3\.up_proj\.weight|size"):
        model.load_state_dict(state)


def test_a_sharded_checkpoint_is_resumed_from_file_by_file(tmp_path):
    """As transformers does it: the experts of a layer are in more than one of the files."""
    model, other = tiny("llada2"), tiny("llada2", seed=1)
    other.save_pretrained(tmp_path, max_shard_size="10KB")
    of_layer = re.compile(r"model\.layers\.1\.mlp\.experts\.(\d)\.up_proj\.weight")
    loaded = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    files = [{found[1] for name in one if (found := of_layer.fullmatch(name))} for one in loaded]
    assert sum(map(bool, files)) > 1 and set().union(*files) == set("012345")
    transformers_trainer.load_sharded_checkpoint(model, str(tmp_path), strict=False)
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# === from a module an expert ===


@pytest.mark.parametrize(("lora", "merged"), [(False, False), (True, False), (True, True)])
def test_modules_become_tensors(lora, merged):
    """Under PEFT's own LoRA, too, merged or not."""
    whole = tiny("llada2")
    model = apart("llada2", whole)
    if lora:
        config = peft.LoraConfig(
            r=3, lora_alpha=5, lora_dropout=0.25, use_rslora=True, target_modules=list(PROJECTIONS)
        )
        model = peft.get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    if merged:
        model.merge_adapter()
    before = model.state_dict()
    experts = {
        name: m for name, m in model.named_modules() if name.endswith("experts") and isinstance(m, nn.ModuleList)
    }
    x, chosen = torch.randn(2, 5, 32), torch.rand(2, 5, 6).topk(2).indices
    weights = torch.rand(2, 5, 2)
    expected = {name: naive(module.eval(), x, chosen, weights) for name, module in experts.items()}
    stack_experts(model)
    assert split_names(model.state_dict()).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in split_names(model.state_dict()).items())
    for name, output in expected.items():
        routed = model.get_submodule(name)
        assert_close_relative(routed(x, chosen, weights), output, 1e-5)
        assert_close_relative(LoopOverExperts(routed)(x, chosen, weights), output, 1e-5)
        if lora:
            assert routed.up_proj.scaling == {"default": 5 / 3**0.5} and not routed.up_proj.training
            assert routed.up_proj.lora_dropout["default"].p == 0.25 and routed.up_proj.merged == merged
    assert all(("lora_" in name or not lora) == p.requires_grad for name, p in model.named_parameters())
    if merged:
        own = dict(whole.named_modules())
        with model.disable_adapter():
            for name in expected:
                bare = own[name.removeprefix("base_model.model.")].eval()(x, chosen, weights)
                assert_close_relative(model.get_submodule(name)(x, chosen, weights), bare.detach(), 1e-5)


def naive(experts: nn.ModuleList, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    output = torch.zeros_like(x)
    for b, t, k in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(2)).tolist():
        output[b, t] += weights[b, t, k] * experts[chosen[b, t, k]](x[b, t])
    return output.detach()


def refused(change: Any) -> str:
    experts = nn.ModuleList(GatedMLP(8, 4, "silu") for _ in range(3))
    change(experts)
    before = dict(experts.named_parameters())
    with pytest.raises(ValueError) as error:
        RoutedExperts.of(experts)
    assert all(p is before[name] for name, p in experts.named_parameters()), "nothing is lost"
    return str(error.value)


def adapted(experts: nn.ModuleList, **settings: Any) -> None:
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["up_proj"], **settings), experts)


def test_modules_that_differ_are_refused():
    plain = "experts of Linear: expected linear layers without bias, in 16, 32 or 4 bit"
    some = "experts of which some train: expected all or none"
    assert refused(lambda experts: experts[0].up_proj.requires_grad_(False)) == some
    assert refused(lambda experts: setattr(experts[1], "up_proj", nn.Linear(8, 4))) == plain
    odd = "experts under adapters that differ or are no plain LoRA; expected one LoRA for all"
    assert refused(lambda experts: adapted(experts, use_dora=True)) == odd
    assert refused(lambda experts: adapted(experts, rank_pattern={"1.up_proj": 2})) == odd
    for one in ("0.up_proj", "1.up_proj"):
        config = peft.LoraConfig(target_modules=[one])
        assert refused(lambda experts, config=config: peft.inject_adapter_in_model(config, experts)) == odd


def test_a_base_in_4_bit_is_not_saved(tmp_path):
    tiny("llada2", hidden_size=64, moe_intermediate_size=64).save_pretrained(tmp_path)
    settings = ModelConfig(path=str(tmp_path), load_in_4bit=True)
    with pytest.raises(ValueError, match="experts in 4 bit are not saved"):
        load_model(settings, config_of(settings)).save_pretrained(tmp_path / "packed")


def test_a_state_dict_in_memory_is_loaded():
    model = tiny("llada_moe")
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_an_optimizer_of_other_parameters_is_refused(tokenizer, tmp_path):
    optimizer = torch.optim.SGD(tiny("llada_moe").parameters(), lr=0.1)
    trainer = make_trainer(tiny("llada_moe"), tokenizer, tmp_path)
    settings = {"args": trainer.args, "train_dataset": trainer.train_dataset, "processing_class": tokenizer}
    with pytest.raises(ConfigError, match="an optimizer of other parameters than the model's"):
        MemDLMTrainer(tiny("llada_moe"), optimizers=(optimizer, None), **settings)


def test_padded_rows_change_no_step(tokenizer, tmp_path, monkeypatch):
    """What a CPU does with few rows; all other tests go without."""
    losses = []
    for few in (0, 32):
        monkeypatch.setattr(moe, "FEW_ROWS", few)
        settings = {"max_steps": 2, "learning_rate": 1e-2}
        trainer = make_trainer(tiny("llada2", lora=True), tokenizer, tmp_path / str(few), **settings)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_checkpoint_of_before_is_refused(tokenizer, tmp_path):
    """Its optimizer has a state for each expert. That of a model without experts is gone on from."""
    for kind in ("llada_moe", "llama"):
        settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        make_trainer(tiny(kind), tokenizer, tmp_path / kind, **settings).train()
        file = tmp_path / kind / "checkpoint-1" / "contents.json"
        contents = json.loads(file.read_text())
        assert contents.pop("trained") == len(list(tiny(kind).parameters()))
        file.write_text(json.dumps(contents))
    again = {"resume_from_checkpoint": str(tmp_path / "llama" / "checkpoint-1")}
    make_trainer(tiny("llama"), tokenizer, tmp_path / "llama", **settings).train(**again)
    with pytest.raises(ConfigError, match=r"checkpoint-1: its optimizer has a matrix an expert, this model trains"):
        again = {"resume_from_checkpoint": str(tmp_path / "llada_moe" / "checkpoint-1")}
        make_trainer(tiny("llada_moe"), tokenizer, tmp_path / "llada_moe", **settings).train(**again)
