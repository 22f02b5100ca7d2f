"""The trained tokenizer, its cache, and what a checkpoint's tokenizer is completed with."""

import huggingface_hub
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dllm_memdlm.config import ConfigError, ModelConfig
from dllm_memdlm.data import tokenizer_for, train_tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "Größe: 3 × 5"] * 5
CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": " the dog"}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 285)


def forget_session():
    hub = huggingface_hub
    hub.close_session() if hasattr(hub, "close_session") else hub.utils.reset_sessions()


@pytest.fixture
def offline(monkeypatch):
    """What HF_HUB_OFFLINE=1 does: no connection is tried, so none is waited for."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    forget_session()
    yield
    forget_session()


def never():
    raise AssertionError("the texts are not needed when there is a tokenizer to load")


def saved_without(tokenizer, folder, **fields):
    """Save `tokenizer` as a checkpoint would: with the vocabulary, and only the given special tokens declared."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **fields).save_pretrained(folder)
    return ModelConfig(architecture="any", tokenizer=str(folder))


# training


def test_special_tokens_come_first_and_then_the_bytes(tokenizer):
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    assert ids == {
        "<|startoftext|>": 0,
        "<|endoftext|>": 1,
        "<|mask|>": 2,
        "<|role_end|>": 3,
        "<|system|>": 4,
        "<|user|>": 5,
        "<|assistant|>": 6,
    }
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    assert (tokenizer.mask_token_id, tokenizer.eot_token_id, tokenizer.eot_token) == (2, 3, "<|role_end|>")
    assert len(tokenizer) == 285
    assert tokenizer.padding_side == "right"


def test_the_same_texts_give_the_same_tokenizer(tokenizer):
    again = train_tokenizer(iter(TEXTS), 285)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert train_tokenizer(["other texts"] * 9, 285).get_vocab() != tokenizer.get_vocab()


@pytest.mark.parametrize("text", ["the cat", "  spaces , kept \n\n", "unseen: 漢字 🙂 \x00", "1.5 don 't ."])
def test_any_text_decodes_to_itself(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template_renders_turns_and_the_opening_of_a_reply(tokenizer):
    render = tokenizer.apply_chat_template
    assert render(CHAT, tokenize=False) == "<|user|>the cat<|role_end|><|assistant|> the dog<|role_end|>"
    assert render(CHAT[:1], tokenize=False, add_generation_prompt=True) == "<|user|>the cat<|role_end|><|assistant|>"
    ids = render(CHAT, return_dict=False)
    assert (ids[0], ids[-1], ids.count(tokenizer.eot_token_id)) == (5, 3, 2)
    with pytest.raises(Exception, match="unknown role tool: expected system, user or assistant"):
        render([{"role": "tool", "content": "x"}], tokenize=False)


def test_saving_and_loading_keeps_everything(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert (loaded.mask_token_id, loaded.eot_token_id, loaded.padding_side) == (2, 3, "right")
    assert loaded.apply_chat_template(CHAT, return_dict=False) == tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert loaded.decode(loaded("a , b")["input_ids"]) == "a , b"


def test_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ConfigError, match=r"^model.tokenizer_vocab_size=262: expected at least 263, the bytes and"):
        train_tokenizer(TEXTS, 262)
    assert len(train_tokenizer(TEXTS, 263)) == 263


# the cache


def test_a_second_run_loads_what_the_first_trained(tmp_path):
    config = ModelConfig(architecture="any", tokenizer_vocab_size=290)
    first = tokenizer_for(config, lambda: TEXTS, tmp_path)
    (folder,) = tmp_path.iterdir()
    before = folder.stat().st_mtime_ns, (folder / "tokenizer.json").stat().st_mtime_ns
    calls = []

    def texts():
        calls.append(1)
        return iter(TEXTS)

    second = tokenizer_for(config, texts, tmp_path)
    assert len(calls) == 1  # to find the cache; a second call would train
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder.stat().st_mtime_ns, (folder / "tokenizer.json").stat().st_mtime_ns) == before
    assert first.get_vocab() == second.get_vocab()
    assert first.name_or_path == second.name_or_path == str(folder)
    assert first.mask_token == "<|mask|>"


def test_other_texts_or_another_size_give_another_tokenizer(tmp_path):
    for size, texts in [(290, TEXTS), (291, TEXTS), (290, TEXTS[:-1]), (290, ["".join(TEXTS)])]:
        tokenizer_for(ModelConfig(architecture="any", tokenizer_vocab_size=size), lambda t=texts: t, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_rank_that_comes_second_keeps_the_first_ones_tokenizer(tmp_path):
    config = ModelConfig(architecture="any", tokenizer_vocab_size=290)
    tokenizer_for(config, lambda: TEXTS, tmp_path / "other")
    calls = []

    def texts():
        """On the second call, which trains, another rank has just finished."""
        calls.append(1)
        if len(calls) == 2:
            (tmp_path / "other").rename(tmp_path / "shared")
        return TEXTS

    tokenizer = tokenizer_for(config, texts, tmp_path / "shared")
    assert len(calls) == 2
    assert [str(folder) for folder in (tmp_path / "shared").iterdir()] == [tokenizer.name_or_path]


def test_training_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.raises(ConfigError, match="tokenizer_vocab_size=10"):
        tokenizer_for(ModelConfig(architecture="any", tokenizer_vocab_size=10), lambda: TEXTS, tmp_path)
    assert list(tmp_path.iterdir()) == []


# checkpoints' tokenizers


def test_undeclared_special_tokens_are_declared(tokenizer, tmp_path):
    config = saved_without(tokenizer, tmp_path, eos_token="<|endoftext|>", padding_side="left")
    loaded = tokenizer_for(config, never, tmp_path / "unused")
    assert (loaded.mask_token_id, loaded.pad_token_id, loaded.bos_token_id, loaded.eot_token_id) == (2, 1, 1, 3)
    assert loaded.eot_token == "<|role_end|>"
    assert loaded.padding_side == "right"
    assert len(loaded) == len(tokenizer)
    assert not (tmp_path / "unused").exists()


def test_declared_special_tokens_stay(tokenizer, tmp_path):
    declared = {"eos_token": "<|role_end|>", "pad_token": "<|mask|>", "bos_token": "<|user|>", "mask_token": "the"}
    loaded = tokenizer_for(saved_without(tokenizer, tmp_path, **declared), never, tmp_path)
    assert {name: getattr(loaded, name) for name in declared} == declared


def test_path_is_used_when_no_tokenizer_is_named_and_tokenizer_wins(tokenizer, tmp_path):
    saved_without(tokenizer, tmp_path / "a", eos_token="<|endoftext|>")
    saved_without(tokenizer, tmp_path / "b", eos_token="<|role_end|>")
    by_path = ModelConfig(path=str(tmp_path / "a"))
    by_both = ModelConfig(path=str(tmp_path / "a"), tokenizer=str(tmp_path / "b"))
    assert tokenizer_for(by_path, never, tmp_path).eos_token == "<|endoftext|>"
    assert tokenizer_for(by_both, never, tmp_path).eos_token == "<|role_end|>"


def test_a_tokenizer_without_a_mask_token_is_refused(tokenizer, tmp_path):
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = (tmp_path / "tokenizer.json").read_text().replace("<|mask|>", "<|spare|>")
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(text), eos_token="<|endoftext|>"
    )
    plain.save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as error:
        tokenizer_for(ModelConfig(path=str(tmp_path)), never, tmp_path)
    assert str(error.value) == (
        f"model.path='{tmp_path}': declares no mask token, and <|mask|> or <|mdm_mask|> is not in its vocabulary; "
        "declare the model's as mask_token, save the tokenizer to a folder and set model.tokenizer to it"
    )


def test_a_tokenizer_without_an_end_is_refused(tokenizer, tmp_path):
    config = saved_without(tokenizer, tmp_path, mask_token="<|mask|>")
    with pytest.raises(ConfigError, match="declares neither an eos nor a pad token; expected"):
        tokenizer_for(config, never, tmp_path)


def test_a_folder_without_tokenizer_files_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^model.path='.*': the folder has no tokenizer files"):
        tokenizer_for(ModelConfig(path=str(tmp_path)), never, tmp_path)


def test_an_unreachable_tokenizer_is_one_line(tmp_path, offline):
    with pytest.raises(ConfigError) as error:
        tokenizer_for(ModelConfig(path="nobody/no-such-model"), never, tmp_path)
    assert str(error.value).startswith("model.path='nobody/no-such-model': ")
    assert str(error.value).endswith("expected a local folder, or a hub name (with network, or downloaded before)")
    assert "\n" not in str(error.value)
