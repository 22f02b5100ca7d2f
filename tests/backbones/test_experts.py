"""Tensors of all experts in memory, a matrix an expert in files: checkpoints, and models of other libraries."""

from __future__ import annotations

import json
import re
from typing import Any

import peft
import pytest
import torch
from conftest import assert_close_relative, make_trainer, tiny, tiny_config
from inputs import tokens
from safetensors.torch import load_file
from saved_models import weights_of
from torch import Tensor, nn
from transformers import trainer as transformers_trainer

from benchmarks.naive_experts import LoopOverExperts
from dllm_memdlm.backbones import config_of, load_model, model_class, moe
from dllm_memdlm.backbones.expert_names import split_names, stack_names
from dllm_memdlm.backbones.layers import GatedMLP
from dllm_memdlm.backbones.moe import stack_experts
from dllm_memdlm.backbones.stacking import experts_apart
from dllm_memdlm.config import ConfigError, ModelConfig
from dllm_memdlm.training.trainer import MemDLMTrainer

KINDS = ("llada_moe", "llada2")


def apart(kind: str, like: nn.Module) -> nn.Module:
    """The same model with a module an expert, as other libraries have it. It cannot be run."""
    with experts_apart():
        model = model_class(type(like).__name__)(tiny_config(kind))
    model.load_state_dict(split_names(like.state_dict()))
    return model.train(like.training)


def same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in state.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_checkpoint_of_published_names_is_trained_and_read_back(kind, tokenizer, tmp_path):
    apart(kind, tiny(kind)).save_pretrained(tmp_path / "published", max_shard_size="15KB")
    published = weights_of(tmp_path / "published")
    assert any(".experts.3.down_proj.weight" in name for name in published)
    assert len(list((tmp_path / "published").glob("model-*.safetensors"))) > 3
    settings = ModelConfig(path=str(tmp_path / "published"), dtype="float32")
    model = load_model(settings, config_of(settings))
    assert same(split_names(model.state_dict()), published) and not any(".experts.3." in n for n in model.state_dict())

    trainer = make_trainer(model, tokenizer, tmp_path / "run", max_steps=2, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    saved = weights_of(tmp_path / "trained")
    assert {name: value.shape for name, value in saved.items()} == {n: v.shape for n, v in published.items()}
    moved = [not torch.equal(saved[name], published[name]) for name in saved if ".experts." in name]
    assert sum(moved) > len(moved) / 2
    again = load_model(ModelConfig(path=str(tmp_path / "trained"), dtype="float32"), config_of(settings))
    assert same(again.state_dict(), model.state_dict())


def test_a_state_dict_may_have_either_names():
    model, other = tiny("llada_moe"), tiny("llada_moe", seed=1)
    state = split_names(other.state_dict())
    assert stack_names(state).keys() == other.state_dict().keys()
    model.load_state_dict(state)
    assert torch.equal(model(input_ids=tokens()).logits, other(input_ids=tokens()).logits)
    model.load_state_dict(tiny("llada_moe").state_dict())
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert same(loaded.state_dict(), model.state_dict())
    del state["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.up_proj\.weight"):
        model.load_state_dict(state)
    state["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match=r"experts\.3\.up_proj\.weight|size"):
        model.load_state_dict(state)


def test_a_sharded_checkpoint_is_resumed_from_file_by_file(tmp_path):
    """As transformers does it: the experts of a layer are in more than one of the files."""
    model, other = (tiny("llada2", seed=seed, num_hidden_layers=2) for seed in (0, 1))
    other.save_pretrained(tmp_path, max_shard_size="15KB")
    of_layer = re.compile(r"model\.layers\.1\.mlp\.experts\.\d\.up_proj\.weight")
    assert sum(any(map(of_layer.fullmatch, load_file(path))) for path in tmp_path.glob("*.safetensors")) > 1
    transformers_trainer.load_sharded_checkpoint(model, str(tmp_path), strict=False)
    assert same(model.state_dict(), other.state_dict())


def test_a_base_in_4_bit_is_not_saved(tmp_path):
    tiny("llada2", hidden_size=64, moe_intermediate_size=64).save_pretrained(tmp_path)
    settings = ModelConfig(path=str(tmp_path), load_in_4bit=True)
    with pytest.raises(ValueError, match="experts in 4 bit are not saved"):
        load_model(settings, config_of(settings)).save_pretrained(tmp_path / "packed")


@pytest.mark.parametrize(("lora", "merged"), [(False, False), (True, False), (True, True)])
def test_modules_become_tensors(lora, merged):
    whole = tiny("llada2").eval()
    model = apart("llada2", whole)
    if lora:
        settings = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.25, "use_rslora": True, "init_lora_weights": False}
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(moe.PROJECTIONS), **settings))
    if merged:
        model.merge_adapter()
    before = model.eval().state_dict()
    inputs = torch.randn(2, 5, 32), torch.rand(2, 5, 6).topk(2).indices, torch.rand(2, 5, 2)
    apart_ones = {name: m for name, m in model.named_modules() if name.endswith("mlp.experts")}
    expected = {name: naive(experts, *inputs) for name, experts in apart_ones.items()}
    stack_experts(model)
    assert same(split_names(model.state_dict()), before)
    assert all(("lora_" in name or not lora) == p.requires_grad for name, p in model.named_parameters())
    for name, output in expected.items():
        routed = model.get_submodule(name)
        assert_close_relative(routed(*inputs), output, 1e-5)
        assert_close_relative(LoopOverExperts(routed)(*inputs), output, 1e-5)
        if lora:
            up = routed.up_proj
            assert up.scaling == {"default": 5 / 3**0.5} and not up.training and up.merged == merged
            assert up.lora_dropout["default"].p == 0.25
        if merged:
            bare = whole.get_submodule(name.removeprefix("base_model.model."))
            with model.disable_adapter():
                assert_close_relative(routed(*inputs), bare(*inputs).detach(), 1e-5)


def naive(experts: nn.ModuleList, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    output = torch.zeros_like(x)
    for b, t, k in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(2)).tolist():
        output[b, t] += weights[b, t, k] * experts[chosen[b, t, k]](x[b, t])
    return output.detach()


def adapted(experts: nn.ModuleList, *targets: str, **settings: Any) -> None:
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets or ["up_proj"], **settings), experts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda experts: experts[0].up_proj.requires_grad_(False), "of which some train: expected all or none"),
        (lambda experts: setattr(experts[1], "up_proj", nn.Linear(8, 4)), "of Linear: expected linear layers without"),
        (lambda experts: adapted(experts, use_dora=True), "under adapters that differ or are no plain LoRA"),
        (lambda experts: adapted(experts, rank_pattern={"1.up_proj": 2}), "under adapters that differ"),
        (lambda experts: adapted(experts, "0.up_proj"), "under adapters that differ"),
        (lambda experts: adapted(experts, "1.up_proj"), "under adapters that differ"),
    ],
)
def test_modules_that_differ_are_refused(change, words):
    layers = nn.ModuleList()
    for _ in range(2):
        layers.append(nn.Module())
        layers[-1].experts = nn.ModuleList(GatedMLP(8, 4, "silu") for _ in range(3))
    change(layers[1].experts)
    before = dict(layers.named_parameters())
    with pytest.raises(ValueError, match=f"^experts {words}"):
        stack_experts(layers)
    assert all(p is before[name] for name, p in layers.named_parameters()), "nothing is lost"


def test_an_optimizer_of_other_parameters_is_refused(tokenizer, tmp_path):
    optimizer = torch.optim.SGD(tiny("llada_moe").parameters(), lr=0.1)
    trainer = make_trainer(tiny("llada_moe"), tokenizer, tmp_path)
    settings = {"args": trainer.args, "train_dataset": trainer.train_dataset, "processing_class": tokenizer}
    with pytest.raises(ConfigError, match="an optimizer of other parameters than the model's"):
        MemDLMTrainer(tiny("llada_moe"), optimizers=(optimizer, None), **settings)


def test_a_checkpoint_of_before_is_refused(tokenizer, tmp_path):
    """Its optimizer has a state for each expert. That of a model without experts is gone on from."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    refusal = r"checkpoint-1: its optimizer has a matrix an expert, this model trains"
    for kind in ("llama", "llada_moe"):
        make_trainer(tiny(kind), tokenizer, tmp_path / kind, **settings).train()
        file = tmp_path / kind / "checkpoint-1" / "contents.json"
        contents = json.loads(file.read_text())
        assert contents.pop("trained") == len(list(tiny(kind).parameters()))
        file.write_text(json.dumps(contents))
        again = make_trainer(tiny(kind), tokenizer, tmp_path / kind, **settings)
        if kind == "llama":
            again.train(resume_from_checkpoint=str(file.parent))
        else:
            with pytest.raises(ConfigError, match=refusal):
                again.train(resume_from_checkpoint=str(file.parent))
