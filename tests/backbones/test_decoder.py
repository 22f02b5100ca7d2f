"""Causal decoders of transformers made bidirectional: every architecture that is offered, by its own checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import scale_up

from dllm_memdlm.backbones import DECODERS, find_sites, load_model, read_config
from dllm_memdlm.config import MemoryConfig, ModelConfig


@pytest.fixture(params=DECODERS)
def checkpoint(request, tmp_path):
    """A folder with a tiny causal model, whose config.json names the architecture."""
    base = getattr(transformers, DECODERS[request.param])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    model = base(base.config_class(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    scale_up(model)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "architectures": [request.param]}))
    return model.eval(), tmp_path


def test_every_decoder_loads_sees_both_ways_and_has_sites(checkpoint):
    causal, folder = checkpoint
    path = str(folder)
    model = load_model(ModelConfig(path=path, dtype="float32"), read_config(path)).eval()
    assert model.state_dict().keys() == causal.state_dict().keys()
    tokens = torch.arange(3, 15)[None]
    changed = tokens.clone()
    changed[0, -1] = 40
    with torch.no_grad():
        assert torch.equal(causal(input_ids=tokens).logits[0, 0], causal(input_ids=changed).logits[0, 0])
        assert not torch.equal(model(input_ids=tokens).logits[0, 0], model(input_ids=changed).logits[0, 0])
        # What is left without the mask is the causal model: under its mask, the same logits.
        mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
        under_mask = model(input_ids=tokens, attention_mask=mask).logits
        torch.testing.assert_close(under_mask, causal(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)

        hidden = model(stage="trunk", input_ids=tokens, boundary=1).hidden
        index = torch.tensor([[0, 5, 11]])
        head = model(stage="head", hidden=hidden, boundary=1, positions=index).logits
        torch.testing.assert_close(head, model(input_ids=tokens).logits[:, [0, 5, 11]], rtol=1e-4, atol=1e-4)
    assert len(find_sites(model, MemoryConfig(layer_fraction=0.5))) == 3
