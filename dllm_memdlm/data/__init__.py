"""From a dataset's name to token ids: rows (sources), chats (formats), tokens (encoding), examples, their tokenizer."""

from dllm_memdlm.data.encoding import encode_chat, encode_text
from dllm_memdlm.data.examples import Counts, Examples, load_examples, training_texts
from dllm_memdlm.data.formats import FORMATS, Format, choose_format
from dllm_memdlm.data.needle import Needles, needle_examples
from dllm_memdlm.data.sources import load_rows
from dllm_memdlm.data.tokenizer import load_tokenizer, tokenizer_for, train_tokenizer

__all__ = [
    "FORMATS",
    "Counts",
    "Examples",
    "Format",
    "Needles",
    "choose_format",
    "encode_chat",
    "encode_text",
    "load_examples",
    "load_rows",
    "load_tokenizer",
    "needle_examples",
    "tokenizer_for",
    "train_tokenizer",
    "training_texts",
]
