"""The tokenizer of a run: a checkpoint's own, or a byte-level BPE trained on the run's texts."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..config import ConfigError, ModelConfig
from ..versions import load_any_tokenizer
from .sources import reason_of

# Mask tokens that LLaDA's vocabularies hold without declaring them: the MoE models' and the dense models'.
MASKS = ("<|mask|>", "<|mdm_mask|>")
# Tokens that end a turn, in the vocabularies of LLaDA-MoE and LLaDA 2, dense LLaDA, and Qwen-based models.
TURN_ENDS = ("<|role_end|>", "<|eot_id|>", "<|im_end|>")

# The end of a chat template that opens the assistant's reply, whatever it is asked for.
OPENS_ALWAYS = re.compile(r"\{\{-?\s*(['\"])[^'\"{}]*assistant[^'\"{}]*\1\s*-?\}\}\s*$")

BOS, EOS, MASK, TURN_END = "<|startoftext|>", "<|endoftext|>", MASKS[0], TURN_ENDS[0]
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (BOS, EOS, MASK, TURN_END, *ROLES)

# Every border is one special token, so a prompt's tokens always are the first tokens of the whole chat.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message.role not in ('system', 'user', 'assistant') -%}
        {{- raise_exception('unknown role ' ~ message.role ~ ': expected system, user or assistant') -}}
    {%- endif -%}
    {{- '<|' ~ message.role ~ '|>' ~ message.content ~ '<|role_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""

# What dllm writes a chat as for BERTs, whose tokenizers have no template, and none of these as tokens.
BERT_MASK, BERT_TURN_END = "[MASK]", "[/Answer]"
BERT_TEMPLATE = r"""{%- for message in messages -%}
    {%- if message.role not in ('system', 'user', 'assistant') -%}
        {{- raise_exception('unknown role ' ~ message.role ~ ': expected system, user or assistant') -}}
    {%- endif -%}
    {%- set marks = {'system': ['[SYS]', '[/SYS]'], 'user': ['[Question]', '[/Question]'],
                     'assistant': ['[Answer]', '[/Answer]']}[message.role] -%}
    {{- marks[0] ~ '\n' ~ message.content | trim ~ '\n' ~ marks[1] ~ '\n\n' -}}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'assistant' -%}
    {{- '[Answer]\n' -}}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with LLaDA's special tokens and a chat template, the same one on the same texts.

    Any text can be encoded, and decodes to itself. Few texts may give fewer than `vocab_size` tokens: ask `len`.

    Raises:
        ConfigError: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ConfigError(
            f"model.tokenizer_vocab_size={vocab_size}: expected at least {smallest}, the bytes and the special tokens"
        )
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        extra_special_tokens={"eot_token": TURN_END},
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=131_072,  # only a warning's threshold: data.max_length decides what is trained on
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(ROLES)})
    return tokenizer


def tokenizer_for(
    config: ModelConfig, texts: Callable[[], Iterable[str]], cache_dir: str | Path
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `model.tokenizer`, else of `model.path`, else one trained on `texts()`.

    It pads on the right and has a mask, pad, eos and bos token. Its attributes eot_token and eot_token_id are the token
    that ends a turn; where that is a text and no token, turn_end is the text, else none. A trained one is kept in
    `cache_dir` under a digest of its texts, so runs and ranks on the same data share it. `texts` is called only when
    there is no tokenizer to load, at most twice.

    Raises:
        ConfigError: the tokenizer cannot be loaded, has no mask token or no eos token; or as `train_tokenizer`.
    """
    for field in ("tokenizer", "path"):
        if (name := getattr(config, field)) is not None:
            return load_tokenizer(name, f"model.{field}={name!r}", config.trust_remote_code)
    folder = Path(cache_dir).absolute() / f"bpe-{config.tokenizer_vocab_size}-{_digest(texts())}"
    if not folder.exists():
        _save(train_tokenizer(texts(), config.tokenizer_vocab_size), folder)
    # loaded in any case: the run that trained it and the runs that find it hold the same object
    return AutoTokenizer.from_pretrained(folder)


def load_tokenizer(name: str, where: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub name, with the special tokens that `tokenizer_for` speaks of.

    Raises:
        ConfigError: as `tokenizer_for`; the message begins with `where`.
    """
    path = Path(os.path.expanduser(name))
    local = os.path.isdir(path)
    if local and not any(path.glob("tokenizer*")):
        raise ConfigError(f"{where}: the folder has no tokenizer files (tokenizer.json and its config)")
    if not local and (os.path.isfile(path) or name.startswith(("/", ".", "~"))):
        raise ConfigError(f"{where}: no such folder; expected one with tokenizer.json and its config, or a hub name")
    try:
        source = str(path) if local else name
        tokenizer = load_any_tokenizer(source, padding_side="right", trust_remote_code=trust_remote_code)
    except Exception as error:  # of any kind: what a file of another form leads to
        if "trust_remote_code=True" in str(error):
            setting = "model.tokenizer" if where.startswith("model.") else "tokenizer"
            raise ConfigError(
                f"{where:.300}: its tokenizer is Python code of the checkpoint's, which is not run unasked; expected "
                f"{setting} set to a folder with the same tokens for a class of transformers' (Dream's: "
                "Qwen2Tokenizer.from_pretrained(NAME).save_pretrained(FOLDER))"
            ) from error
        files = sorted(path.glob("*.json")) if local else []
        reason = next((f"{file.name} is not JSON" for file in files if not _is_json(file)), None) or reason_of(error)
        raise ConfigError(
            f"{where:.300}: {reason}; expected a local folder, or a hub name (with network, or downloaded before)"
        ) from error
    return _complete(tokenizer, where)


def check_mask(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, where: str) -> None:
    """Refuse a tokenizer whose mask is not the token that the model's config names, where it names one of its own.

    Raises:
        ConfigError: the message begins with `where`.
    """
    wanted = getattr(config, "mask_token_id", None)
    if wanted is not None and wanted < config.vocab_size and wanted != tokenizer.mask_token_id:
        raise ConfigError(
            f"{where}: its mask token {tokenizer.mask_token!r} is number {tokenizer.mask_token_id}, and the model's "
            f"mask_token_id is {wanted}; expected the tokenizer that the model was trained with"
        )


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except ValueError:
        return False
    return True


def _digest(texts: Iterable[str]) -> str:
    """Return 16 hex digits of everything but the size that a trained tokenizer depends on."""
    digest = hashlib.sha256("\0".join([tokenizers.__version__, *SPECIAL_TOKENS, CHAT_TEMPLATE]).encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save aside, then rename: another rank sees the whole folder or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        tokenizer.save_pretrained(Path(scratch) / folder.name)
        try:
            (Path(scratch) / folder.name).rename(folder)
        except OSError:
            if not folder.exists():  # else another rank came first, with the same tokenizer
                raise


def _complete(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
    """Declare the special tokens that a checkpoint's tokenizer has but leaves undeclared."""
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.pad_token
    if tokenizer.eos_token is None:
        raise ConfigError(f"{where}: declares neither an eos nor a pad token; expected one of them")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.bos_token = tokenizer.bos_token or tokenizer.pad_token
    if tokenizer.chat_template is None and tokenizer.mask_token == BERT_MASK:
        tokenizer.chat_template = BERT_TEMPLATE
    template = tokenizer.chat_template
    tokenizer.turn_end = BERT_TURN_END if isinstance(template, str) and BERT_TURN_END in template else None
    opened = OPENS_ALWAYS.search(template) if isinstance(template, str) else None
    if opened and "add_generation_prompt" not in template:  # LLaDA-8B's: a whole chat would end in a new reply's header
        asked = f"{{% if add_generation_prompt %}}{opened[0]}{{% endif %}}"
        tokenizer.chat_template = template[: opened.start()] + asked
    vocabulary = tokenizer.get_vocab()
    if tokenizer.mask_token is None:
        mask = next((token for token in MASKS if token in vocabulary), None)
        if mask is None:
            setting = "model.tokenizer" if where.startswith("model.") else "tokenizer"
            raise ConfigError(
                f"{where}: declares no mask token, and {' or '.join(MASKS)} is not in its vocabulary; declare "
                f"the model's as mask_token, save the tokenizer to a folder and set {setting} to it"
            )
        tokenizer.add_special_tokens({"mask_token": mask})
    if getattr(tokenizer, "eot_token", None) is None:
        tokenizer.eot_token = next((token for token in TURN_ENDS if token in vocabulary), tokenizer.eos_token)
        tokenizer.eot_token_id = tokenizer.convert_tokens_to_ids(tokenizer.eot_token)
    return tokenizer
