"""From lm-eval's texts to tokens: what is special in them, and where a continuation begins.

Without a chat template nothing is special in a context. With one, the contexts are texts that `Texts.render` has
written: in them the template's own special tokens are special, and what the messages spell is marked (U+FDD0) and is
not. Nothing is ever special in a continuation or in a whole text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..config import ConfigError
from ..data.encoding import Encoder, Tokens, unmarked
from ..inference.conversation import rendered
from ..method.prompt_memory import shared_length

Pair = tuple[list[int], list[int]]  #: the tokens of a context and of its continuation


class Texts:
    """Encodes for one tokenizer; `template` is the chat template in use, if any, and takes these `arguments`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template: str | None = None
        own = tokenizer.chat_template or {}
        self._templates = own if isinstance(own, dict) else {"default": own}
        self._encoder = Encoder(tokenizer, arguments)

    def use_template(self, name: str = "default") -> str:
        """Take a chat template of the tokenizer's. Raises ConfigError if there is none of that name."""
        if name not in self._templates:
            known = ", ".join(self._templates)
            raise ConfigError(
                f"--apply_chat_template: tokenizer={self.tokenizer.name_or_path!r} has no chat template {name!r}; "
                f"expected {f'one of {known}' if known else 'the tokenizer of a chat model, or no such flag'}"
            )
        template: str = self._templates[name]
        self.template = self.tokenizer.chat_template = template
        return template

    def render(self, chat: list[dict[str, str]], begun: bool) -> str:
        """Return a chat as text, up to where its answer begins, or goes on if it has `begun`.

        Raises ConfigError where there is no chat template, or it refuses the chat.
        """
        if self.template is None:
            self.use_template()
        return rendered(self._encoder, chat, add_generation_prompt=not begun, continue_final_message=begun)

    def context(self, text: str, continuation: str = "") -> Tokens:
        """Return the tokens of a context and what follows it, without those that the tokenizer appends to a text."""
        if self.template is None:
            return self._encoder.prompt(text + continuation)
        tokens = self._encoder.encode(text + self._encoder.marked(continuation))
        # a chat template may write the first token into the text
        return tokens if text.startswith(self.tokenizer.bos_token) else self._encoder.begun(tokens)

    def whole(self, text: str) -> list[int]:
        """Return the tokens of a text that stands alone, without any that the tokenizer adds."""
        return self._encoder.text(text).ids

    def first(self) -> int:
        """Return the token that stands before a whole text."""
        return (self._encoder.prompt("").ids or [self.tokenizer.bos_token_id])[-1]

    def pair(self, context: str, continuation: str) -> Pair:
        """Return both as tokens. Spaces between them, and a token that holds some of both, go to the continuation."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        start, both = self.context(context).ids, self.context(context, continuation)
        if both.ends is None:
            border = shared_length(start, both.ids)
        else:
            border = sum(end <= len(unmarked(context)) for end in both.ends)
        if border < len(both.ids):
            return both.ids[:border], both.ids[border:]
        return start, self.whole(continuation)  # of the two together nothing of it was left
