"""dllm's own models, which compute what ours do, and become ours where they are."""

from __future__ import annotations

import peft
import pytest
import torch
from conftest import (
    ALL_KINDS,
    ENCODER,
    SHIFTED,
    assert_close_relative,
    scale_up,
    tiny_config,
)
from data_files import message_of
from inputs import mask_of, tokens
from stock_models import a2d_llama, dllms_model
from stock_models import config_of as adapter_config

from dllm_memdlm.backbones import (
    LLaDAConfig,
    LLaDAModelLM,
    adopt,
    model_class,
    with_lora,
)
from dllm_memdlm.backbones.expert_names import split_names
from dllm_memdlm.config import LoraConfig, MemoryConfig
from dllm_memdlm.method.inner_loop import ParametricMemory

OF_DLLM = ("llada_moe", "llada2", "llada")


@pytest.mark.dllm
def test_llada_is_dllms_with_biases_and_a_larger_table_too():
    settings = {"include_qkv_bias": True, "embedding_size": 128, "n_kv_heads": 1, "rope_theta": 500.0}
    theirs = dllms_model("llada", **settings)
    scale_up(theirs)
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    ours = LLaDAModelLM(LLaDAConfig(**theirs.config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    expected = theirs.eval()(input_ids=tokens()).logits
    assert sum(name.endswith("bias") for name in theirs.state_dict()) == 9 and expected.shape[-1] == 128
    torch.testing.assert_close(ours.eval()(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.dllm
@pytest.mark.parametrize("kind", [*OF_DLLM, SHIFTED, ENCODER])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bundled_models_are_dllms(kind, attention):
    theirs = dllms_model(kind, **({} if kind == "llada" else {"attn_implementation": attention}))
    scale_up(theirs)
    names = ("rope_theta", "rms_norm_eps", "partial_rotary_factor", "num_key_value_heads")
    dimensions = {name: getattr(theirs.config, name) for name in names if hasattr(theirs.config, name)}
    shared = {"llada_moe": "shared_expert_intermediate_size", "llada2": "num_shared_experts"}.get(kind, "vocab_size")
    config = tiny_config(kind, **dimensions, **{shared: getattr(theirs.config, shared)})
    config._attn_implementation = attention
    ours = model_class(config.architectures[0])(config)
    assert split_names(ours.state_dict()).keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    forms = {"llada2": ["none", "4-D bool", "4-D additive", "4-D of zeros"], SHIFTED: ["none", "4-D bool"]}
    forms = forms.get(kind, ["none", "2-D"])
    for training in (True, False):
        for form in forms:
            given = {"input_ids": tokens(), "attention_mask": mask_of(form, torch.float32)}
            with torch.no_grad():
                expected = theirs.train(training)(**given).logits
                torch.testing.assert_close(ours.train(training)(**given).logits, expected, rtol=1e-4, atol=1e-4)
            assert expected.std() > 0.1
    theirs.load_state_dict(split_names(ours.state_dict()))  # and the other way


@pytest.mark.dllm
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_model_of_dllms_gets_our_forward(kind, lora):
    """The same parameters under the same names, the same logits and gradients; and stages, and sites for memory."""
    model = a2d_llama() if kind == "llama" else dllms_model(kind)
    scale_up(model)
    if lora:
        model = with_lora(model, LoraConfig(r=4, dropout=0.0))
        scale_up(model)
    names, before = sorted(model.train().state_dict()), dict(model.named_parameters())

    def logits_and_gradients():
        model.zero_grad()
        logits = model(input_ids=tokens()).logits
        logits.square().mean().backward()
        gradients = split_names({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        return logits.detach(), {name: gradient.clone() for name, gradient in gradients.items() if gradient.any()}

    logits, gradients = logits_and_gradients()
    adopt(model)
    assert sorted(split_names(model.state_dict())) == names
    assert all(p is before[name] for name, p in model.named_parameters() if ".experts." not in name)
    again, gradients_again = logits_and_gradients()
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.1
    assert gradients_again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert_close_relative(gradients_again[name], gradient, 1e-3, name)

    memory = ParametricMemory(model, MemoryConfig(rank=4, layer_fraction=0.3), mask_token_id=0)
    positions = torch.arange(tokens().shape[1]).expand(len(tokens()), -1)
    torch.testing.assert_close(memory.suffix(memory.prefix(tokens()), positions).logits, again, rtol=1e-4, atol=1e-4)
    adopt(model)  # once is enough, and twice changes nothing
    assert sorted(split_names(model.state_dict())) == names


@pytest.mark.dllm
def test_a_llada_of_dllms_that_computes_otherwise_is_left_as_it_is():
    model = dllms_model("llada", scale_logits=True)
    kinds = [type(module) for module in model.modules()]
    assert message_of(adopt, model) == "model of dllm's: scale_logits=True: expected False"
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.dllm
@pytest.mark.parametrize("kind", [*OF_DLLM, SHIFTED, ENCODER])
def test_the_adapter_of_an_adopted_model_names_dllms_class(kind, tmp_path):
    """A LoRA that PEFT's own function has put on dllm's own model, as `dllm.utils.get_model` does."""
    model = dllms_model(kind)
    expected = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj", "dense", "attn_out"]))
    adopt(wrapped)
    wrapped.save_pretrained(tmp_path)
    assert adapter_config(tmp_path)["auto_mapping"] == expected
