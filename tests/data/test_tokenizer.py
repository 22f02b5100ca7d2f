"""The trained tokenizer, its cache, and what a checkpoint's tokenizer is completed with."""

import json

import jinja2
import pytest
from conftest import tiny
from saved_models import bert_tokenizer
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Tokenizer

from dllm_memdlm.compat.dllm_api import HAS_DLLM
from dllm_memdlm.config import ConfigError, ModelConfig
from dllm_memdlm.data import check_mask, load_tokenizer, tokenizer_for, train_tokenizer
from dllm_memdlm.data.encoding import decode_text, turn_of

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "Größe: 3 × 5"] * 5
SPECIAL = ["<|startoftext|>", "<|endoftext|>", "<|mask|>", "<|role_end|>", "<|system|>", "<|user|>", "<|assistant|>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Trained, saved and loaded, as a run has it."""
    folder = tmp_path_factory.mktemp("trained")
    train_tokenizer(TEXTS, 285).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def never():
    raise AssertionError("the texts are not needed when there is a tokenizer to load")


def saved_without(tokenizer, folder, **fields):
    """Save `tokenizer` as a checkpoint would: with the vocabulary, and only the given special tokens declared."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **fields).save_pretrained(folder)
    return ModelConfig(architecture="any", tokenizer=str(folder))


def sized(size=290):
    return ModelConfig(architecture="any", tokenizer_vocab_size=size)


def test_special_tokens_come_first_then_the_bytes_and_any_text_decodes_to_itself(tokenizer):
    assert tokenizer.convert_ids_to_tokens(range(7)) == SPECIAL
    assert set(tokenizer.all_special_tokens) == set(SPECIAL)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    assert (tokenizer.mask_token_id, tokenizer.eot_token_id, tokenizer.eot_token) == (2, 3, "<|role_end|>")
    assert (len(tokenizer), len(train_tokenizer([], 263)), tokenizer.padding_side) == (285, 263, "right")
    for text in ("the cat", "a , b", "  spaces , kept \n\n", "unseen: 漢字 🙂 \x00", "1.5 don 't ."):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    again = train_tokenizer(iter(TEXTS), 285)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert again.chat_template == tokenizer.chat_template


def test_a_second_run_loads_what_the_first_trained_and_other_texts_train_another(tmp_path):
    first = tokenizer_for(sized(), lambda: TEXTS, tmp_path)
    (folder,) = tmp_path.iterdir()
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    calls = []
    second = tokenizer_for(sized(), lambda: calls.append(1) or TEXTS, tmp_path)
    assert len(calls) == 1, "to find the cache; a second call would train"
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    assert first.get_vocab() == second.get_vocab()
    assert first.name_or_path == second.name_or_path == str(folder)
    for size, texts in [(291, TEXTS), (290, TEXTS[:-1]), (290, ["".join(TEXTS)])]:
        tokenizer_for(sized(size), lambda t=texts: t, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(ConfigError):
        tokenizer_for(sized(10), lambda: TEXTS, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4, "training that fails leaves nothing behind"


def test_a_rank_that_comes_second_keeps_the_first_ones_tokenizer(tmp_path):
    tokenizer_for(sized(), lambda: TEXTS, tmp_path / "other")
    calls = []

    def texts():
        """On the second call, which trains, another rank has just finished."""
        calls.append(1)
        if len(calls) == 2:
            (tmp_path / "other").rename(tmp_path / "shared")
        return TEXTS

    tokenizer = tokenizer_for(sized(), texts, tmp_path / "shared")
    assert len(calls) == 2
    assert [str(folder) for folder in (tmp_path / "shared").iterdir()] == [tokenizer.name_or_path]


def test_undeclared_special_tokens_are_declared(tokenizer, tmp_path):
    config = saved_without(tokenizer, tmp_path, eos_token="<|endoftext|>", padding_side="left")
    loaded = tokenizer_for(config, never, tmp_path / "unused")
    assert (loaded.mask_token_id, loaded.pad_token_id, loaded.bos_token_id, loaded.eot_token_id) == (2, 1, 1, 3)
    assert (loaded.eot_token, loaded.padding_side, len(loaded)) == ("<|role_end|>", "right", len(tokenizer))
    assert not (tmp_path / "unused").exists()
    declared = {"eos_token": "<|role_end|>", "pad_token": "<|mask|>", "bos_token": "<|user|>", "mask_token": "the"}
    named = saved_without(tokenizer, tmp_path / "declared", **declared)  # and what is named wins over the path
    loaded = tokenizer_for(ModelConfig(path=config.tokenizer, tokenizer=named.tokenizer), never, tmp_path)
    assert {name: getattr(loaded, name) for name in declared} == declared, "what is declared stays"


def test_a_tokenizer_without_a_mask_token_is_refused(tokenizer, tmp_path):
    text = tokenizer.backend_tokenizer.to_str().replace("<|mask|>", "<|spare|>")
    plain = tokenizer.backend_tokenizer.from_str(text)
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|endoftext|>").save_pretrained(tmp_path)
    says = r"^model.path='.*: declares no mask token, and <\|mask\|> or .*; declare the"
    with pytest.raises(ConfigError, match=says):
        tokenizer_for(ModelConfig(path=str(tmp_path)), never, tmp_path)


def test_a_template_that_always_opens_a_reply_does_so_when_it_is_asked_to(tokenizer, tmp_path):
    """As LLaDA-8B's: of a whole chat the response would end in the header of another one, and be learned so."""
    header = "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    each = f"{{% for message in messages %}}{{{{ {header} + message['content'] + '<|eot_id|>' }}}}{{% endfor %}}"
    opened = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    for end, plain in ((f"{{{{ '{opened}' }}}}", True), ("{{ eos_token }}", False), ("", False)):
        tokenizer.chat_template = each + end
        tokenizer.save_pretrained(tmp_path)
        loaded, chat = load_tokenizer(str(tmp_path), "model.path"), [{"role": "user", "content": "the cat"}]
        whole, asked = (
            loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=g) for g in (False, True)
        )
        assert asked == (whole + opened if plain else whole)
        assert whole.startswith("<|start_header_id|>user") and not whole.endswith(opened)


ASKED = [[("user", " a cat? ")], [("system", "Be brief."), ("user", "A?"), ("assistant", "B. "), ("user", "C?")]]


def test_a_berts_tokenizer_writes_chats_as_dllm_does(tmp_path):
    """With the text that ends a turn, which is no token."""
    bert_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), "model.path")
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.eot_token) == ("[PAD]", "[PAD]", "[PAD]")
    chat = [{"role": role, "content": content} for role, content in ASKED[1]]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "[SYS]\nBe brief.\n[/SYS]\n\n[Question]\nA?\n[/Question]\n\n[Answer]\nB.\n[/Answer]\n\n"
        "[Question]\nC?\n[/Question]\n\n[Answer]\n"
    )
    answer = decode_text(tokenizer, tokenizer("A cat [/Answer] and more")["input_ids"])
    assert (turn_of(tokenizer, answer), turn_of(train_tokenizer(TEXTS, 285), answer)) == ("A cat ", answer)
    with pytest.raises(jinja2.TemplateError, match="unknown role tool: expected system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@pytest.mark.dllm
@pytest.mark.parametrize("chat", [*ASKED, [*ASKED[1], ("assistant", "D")], ASKED[1][:3]])
@pytest.mark.parametrize("asked", [False, True])
def test_dllm_writes_the_same_for_a_modernbert(chat, asked, tmp_path):
    from dllm.utils import get_tokenizer

    tiny("modernbert").save_pretrained(tmp_path)
    bert_tokenizer().save_pretrained(tmp_path)
    chat, settings = [{"role": role, "content": content} for role, content in chat], {"add_generation_prompt": asked}
    theirs = get_tokenizer(model_name_or_path=str(tmp_path)).apply_chat_template(chat, tokenize=False, **settings)
    assert load_tokenizer(str(tmp_path), "x").apply_chat_template(chat, tokenize=False, **settings) == theirs


def test_a_mask_that_is_not_the_models_is_refused_unless_the_config_names_none_of_its_tokens(tokenizer):
    config = PretrainedConfig(vocab_size=300)
    for named in (None, tokenizer.mask_token_id, 151666):  # the last one a default, of a larger vocabulary
        config.mask_token_id = named
        check_mask(tokenizer, config, "model.path='x'")
    config.mask_token_id = 9
    with pytest.raises(ConfigError, match=r"^model.path='x': its mask token .* mask_token_id is 9; expected the"):
        check_mask(tokenizer, config, "model.path='x'")


@pytest.mark.skipif(HAS_DLLM, reason="dllm brings Dream's tokenizer along, and none is run from the checkpoint")
def test_a_tokenizer_that_is_code_is_not_run_unasked(tokenizer, tmp_path):
    """As Dream's are. What the message says helps: the same tokens in a class of transformers'."""
    base, plain = tmp_path / "dream", tmp_path / "plain"
    base.mkdir()
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (base / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    (base / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    own = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False) | {"special": True}
    declared = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "mask_token": SPECIAL[2], "pad_token": SPECIAL[1]}
    declared |= {"added_tokens_decoder": {str(i): {"content": SPECIAL[i], **own} for i in range(4)}}
    declared |= {"tokenizer_class": "DreamTokenizer", "unk_token": None}
    declared |= {"auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(declared))
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'run')!r}).touch()\nclass DreamTokenizer: pass\n"
    (base / "tokenization_dream.py").write_text(code)
    ways = r"Qwen2Tokenizer\.from_pretrained\(NAME\)\.save_pretrained\(FOLDER\)\)"
    with pytest.raises(ConfigError, match=rf"^model.path=.*model\.tokenizer set to .*{ways}$"):
        tokenizer_for(ModelConfig(path=str(base)), never, tmp_path)
    with pytest.raises(ConfigError, match=rf"^tokenizer='x': its tokenizer is Python code .*{ways}$"):
        load_tokenizer(str(base), "tokenizer='x'")
    assert not (tmp_path / "run").exists()
    Qwen2Tokenizer.from_pretrained(base).save_pretrained(plain)
    loaded = tokenizer_for(ModelConfig(path=str(base), tokenizer=str(plain)), never, tmp_path)
    assert (loaded.mask_token_id, loaded.bos_token_id, loaded.eos_token_id) == (2, 0, 1)
    assert loaded("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError):  # the class is none; but it is asked for, and so it is run
        tokenizer_for(ModelConfig(path=str(base), trust_remote_code=True), never, tmp_path)
    assert (tmp_path / "run").exists()
