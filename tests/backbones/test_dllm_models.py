"""Against dllm's own definitions: the bundled models, and models that dllm built."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from conftest import (
    COMMON,
    DIMENSIONS,
    scale_up,
    tiny_config,
)
from inputs import mask_of, tokens
from stock_models import AS_PUBLISHED, DENSE_ATTRIBUTES, dllms

from dllm_memdlm.backbones import adopt, model_class, with_lora
from dllm_memdlm.backbones.expert_names import split_names
from dllm_memdlm.config import LoraConfig, MemoryConfig
from dllm_memdlm.method.inner_loop import ParametricMemory

# === dllm's own definitions ===


@pytest.mark.dllm
@pytest.mark.parametrize("kind", ["llada_moe", "llada2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bundled_models_are_dllms(kind, attention):
    ours_config = tiny_config(kind, **{k: v for k, v in AS_PUBLISHED[kind].items() if "dropout" not in k})
    shared = {name: getattr(ours_config, name) for name in DENSE_ATTRIBUTES}
    theirs_config = {**COMMON, **DIMENSIONS[kind], **shared, **AS_PUBLISHED[kind], "attn_implementation": attention}
    theirs = dllms(kind, theirs_config)
    torch.manual_seed(0)
    scale_up(theirs)
    ours_config._attn_implementation = attention
    ours = model_class(ours_config.architectures[0])(ours_config)
    assert split_names(ours.state_dict()).keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    for mode in ("train", "eval"):
        getattr(ours, mode)()
        getattr(theirs, mode)()
        with torch.no_grad():
            expected = theirs(input_ids=tokens()).logits
            torch.testing.assert_close(ours(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)
            assert expected.std() > 0.1
            forms = {"llada_moe": ["2-D"], "llada2": ["4-D bool", "4-D additive", "4-D of zeros"]}[kind]
            for form in forms:
                mask = mask_of(form, torch.float32)
                expected = theirs(input_ids=tokens(), attention_mask=mask).logits
                out = ours(input_ids=tokens(), attention_mask=mask).logits
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    theirs.load_state_dict(split_names(ours.state_dict()))  # and the other way


# === models that dllm built ===


@pytest.mark.dllm
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["llada_moe", "llada2", "llama"])
def test_a_model_of_dllms_gets_our_forward(kind, lora):
    """The same parameters under the same names, the same logits and gradients; and stages, and sites for memory."""
    if kind == "llama":
        from dllm.pipelines.a2d import A2DLlamaConfig, A2DLlamaLMHeadModel

        model = A2DLlamaLMHeadModel(A2DLlamaConfig(**{**COMMON, **DIMENSIONS[kind]}))
    else:
        shared = {name: getattr(tiny_config(kind), name) for name in DENSE_ATTRIBUTES}
        model = dllms(kind, {**COMMON, **DIMENSIONS[kind], **shared, **AS_PUBLISHED[kind]})
    scale_up(model)
    if lora:
        model = with_lora(model, LoraConfig(r=4, dropout=0.0))
        scale_up(model)
    model.train()
    names = list(model.state_dict())
    before = dict(model.named_parameters())

    def logits_and_gradients():
        model.zero_grad()
        logits = model(input_ids=tokens()).logits
        logits.square().mean().backward()
        gradients = split_names({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        return logits.detach(), {name: gradient.clone() for name, gradient in gradients.items() if gradient.any()}

    logits, gradients = logits_and_gradients()
    adopt(model)
    assert sorted(split_names(model.state_dict())) == sorted(names)
    assert all(p is before[name] for name, p in model.named_parameters() if ".experts." not in name)
    again, gradients_again = logits_and_gradients()
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.1
    torch.testing.assert_close(gradients_again, gradients, rtol=1e-3, atol=1e-5)

    memory = ParametricMemory(model, MemoryConfig(rank=4, layer_fraction=0.3), mask_token_id=0)
    hidden = memory.trunk(tokens())
    positions = torch.arange(tokens().shape[1]).expand(len(tokens()), -1)
    torch.testing.assert_close(memory.head(hidden, positions).logits, again, rtol=1e-4, atol=1e-4)
    adopt(model)  # once is enough, and twice changes nothing


@pytest.mark.dllm
@pytest.mark.parametrize(("kind", "name"), [("llada_moe", "LLaDAMoEModelLM"), ("llada2", "LLaDA2MoeModelLM")])
def test_the_adapter_of_an_adopted_model_names_dllms_class(kind, name, tmp_path):
    """A LoRA that PEFT's own function has put on dllm's own model, as `dllm.utils.get_model` does."""
    shared = {name: getattr(tiny_config(kind), name) for name in DENSE_ATTRIBUTES}
    model = dllms(kind, {**COMMON, **DIMENSIONS[kind], **shared, **AS_PUBLISHED[kind]})
    original = type(model).__module__
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj", "dense"]))
    adopt(wrapped)
    wrapped.save_pretrained(tmp_path)
    mapping = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]
    assert mapping == {"base_model_class": name, "parent_library": original}
