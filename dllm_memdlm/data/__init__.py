"""From a dataset's name to token ids: rows (sources), chats (formats), tokens (encoding), examples, their tokenizer."""

from .encoding import encode_chat
from .examples import Counts, Examples, load_examples, training_texts
from .formats import choose_format
from .sources import load_rows
from .tokenizer import check_mask, load_tokenizer, tokenizer_for, train_tokenizer

__all__ = [
    "Counts",
    "Examples",
    "check_mask",
    "choose_format",
    "encode_chat",
    "load_examples",
    "load_rows",
    "load_tokenizer",
    "tokenizer_for",
    "train_tokenizer",
    "training_texts",
]
