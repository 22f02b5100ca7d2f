"""The backbones in stages against their full forward, and under gradient checkpointing."""

from __future__ import annotations

import pytest
import torch
from conftest import ALL_KINDS, assert_close_relative, make_trainer, take_gradients, tiny, train_batch
from inputs import mask_of, second_norm, tokens

from dllm_memdlm.backbones import staged_backbone
from dllm_memdlm.backbones.layers import BlockCausal, take
from dllm_memdlm.config import MemoryConfig
from dllm_memdlm.versions import checkpoint_activations

pytestmark = pytest.mark.parametrize("kind", ALL_KINDS)
#: In no order, with a repetition.
POSITIONS = torch.tensor([[0, 3, 11], [7, 2, 2], [5, 4, 9]])
CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # routers compute in float32, and round what differs in the last digit


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefix_and_suffix_are_the_full_forward(kind, attention):
    model = tiny(kind, torch.float64, attention=attention)
    for form, boundary in (("none", 0), ("2-D", 1), ("4-D bool", 2)):
        given = {"attention_mask": mask_of(form, torch.float64)}
        full = model(input_ids=tokens(), **given).logits
        take(full, POSITIONS).square().sum().backward()
        expected = take_gradients(model)
        start = {"inputs_embeds": model.get_input_embeddings()(tokens())} if boundary == 1 else {"input_ids": tokens()}
        prefix = model(stage="prefix", boundary=boundary, **start, **given).hidden
        suffix = {"stage": "suffix", "hidden": prefix, "boundary": boundary, **given}
        out = model(positions=POSITIONS, **suffix)
        torch.testing.assert_close(out.logits, take(full, POSITIONS), **CLOSE)
        torch.testing.assert_close(model(**suffix).logits, full, **CLOSE)
        bare = model(positions=POSITIONS, project=False, **suffix)
        assert bare.logits is None and torch.equal(bare.hidden, out.hidden)
        out.logits.square().sum().backward()
        for name, gradient in take_gradients(model).items():
            assert_close_relative(gradient, expected[name], 1e-6, name)


def test_masks_say_the_same_in_every_form(kind):
    model = tiny(kind).eval()

    def logits(form: str, attention: str = "sdpa") -> torch.Tensor:
        model.config._attn_implementation = attention
        return model(input_ids=tokens(), attention_mask=mask_of(form, torch.float32)).logits

    torch.testing.assert_close(logits("2-D"), logits("2-D bool"))
    torch.testing.assert_close(logits("4-D bool"), logits("4-D additive"))
    torch.testing.assert_close(logits("none"), logits("4-D of zeros"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits("4-D bool"), logits("4-D bool", "eager"), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits("none"), logits("2-D"), atol=1e-2)
    assert not torch.allclose(logits("none"), logits("4-D bool"), atol=1e-2)
    shorter = model(input_ids=tokens()[1:2, :8]).logits  # hidden padding is as no padding
    torch.testing.assert_close(logits("2-D")[1:2, :8], shorter, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_causal_blocks_need_no_whole_mask(kind, attention, monkeypatch):
    """Some queries at a time, in order or chosen ones, with gradients: as with a mask of all pairs."""
    # At 32,768 tokens in bfloat16 64 MiB, for 2 GiB.
    assert BlockCausal(32, torch.empty(1, 32768, 8, dtype=torch.bfloat16, device="meta")).mask.nbytes == 2**26
    model, results = tiny(kind, torch.float64, lora=True, attention=attention), []
    chosen = torch.tensor([[11, 0, 5, 5, 7, 2, 9], [1, 2, 3, 4, 8, 9, 10], [0, 0, 11, 3, 6, 6, 1]])
    for mask, at_once in ((mask_of("4-D bool", torch.float64), 0), (4, 4), (4, 8), (4, 100)):
        monkeypatch.setattr(BlockCausal, "QUERIES", at_once)
        logits = model(input_ids=tokens(), attention_mask=mask).logits
        some = model(input_ids=tokens(), attention_mask=mask, positions=chosen).logits
        (logits.square().sum() + some.square().sum()).backward()
        results.append([logits, some, *take_gradients(model).values()])
    for expected, *found in zip(*results, strict=True):
        for each in found:
            torch.testing.assert_close(each, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(("dropout", "prompt_loss"), [(True, 0.0), (0.3, 0.3)])
def test_checkpointing_changes_nothing(kind, dropout, prompt_loss, tokenizer, tmp_path):
    memory = MemoryConfig(rank=4, layer_fraction=0.4, inner_lr=10.0, grad_clip=0.2, prompt_loss=prompt_loss)
    results, calls = [], []
    for on in (False, True):
        model = tiny(kind, lora=dropout)
        trainer = make_trainer(model, tokenizer, tmp_path, memory, gradient_checkpointing=on)
        if on:
            assert trainer.args.gradient_checkpointing_kwargs == {"use_reentrant": False}
            checkpoint_activations(model)
        norm = second_norm(staged_backbone(model).layers[0])
        norm.register_forward_hook(lambda *_, on=on: calls.append(on))
        torch.manual_seed(3)
        loss = trainer.compute_loss(model, train_batch(trainer))
        loss.backward()
        results.append((loss.item(), take_gradients(model)))
    again = 2 if prompt_loss else 1
    assert calls.count(True) - calls.count(False) == again, "the prefix of anchor, and of prompts, and nothing else"
    assert calls.count(False) == 1 + again
    (loss, gradients), (loss_on, gradients_on) = results
    assert loss_on == loss
    for name, gradient in gradients.items():
        assert_close_relative(gradients_on[name], gradient, 1e-6, name)
