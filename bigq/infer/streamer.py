"""Streams generated text: each piece is written as soon as no later token can change it.

A token's text depends on its neighbours: a leading space may be dropped, several bytes make one character, and some tokenizers remove
spaces before punctuation.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

#: The end of a decoded text while bytes of its last character are missing.
REPLACEMENT = "\ufffd"
#: A token of one byte, as SentencePiece names it. Neighbours are decoded together; if they are not UTF-8, all of them are unknown.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
#: Characters at the end of a text that the clean-up may still change: " 've" loses its space.
_CLEANUP = 3
#: The most tokens that are decoded again with each new one; when there are more, the last ``KEPT`` stay.
WINDOW, KEPT = 32, 8


class Streamer:
    """Receives tokens from transformers' ``generate``: first those of the prompt, then each new one.

    write: gets pieces, which together are ``text``: all new tokens decoded at once, without special ones. count: of the new tokens.
    first: when the first of them came, by ``time.monotonic``.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._prompt = True
        self._tokens: list[int] = []
        self._window: list[int] = []
        #: How many tokens of the window are decoded, their text, and how many of its characters are written.
        self._known, self._seen, self._shown = 0, "", 0
        self._written = 0
        self.text = ""
        self.first: float | None = None

    @property
    def count(self) -> int:
        return len(self._tokens)

    def put(self, tokens: Tensor) -> None:
        """Write the characters that no later token can change."""
        if self._prompt:
            self._prompt = False
            return
        if self.first is None:
            self.first = time.monotonic()
        new: list[int] = tokens.flatten().tolist()
        self._tokens += new
        names = self._tokenizer.convert_ids_to_tokens(new, skip_special_tokens=True)
        if not names:
            return
        self._window += new
        if names[-1] is not None and _BYTE.fullmatch(names[-1]):
            return
        text = self._decode(self._window)
        if text and text == self._seen and self._shown == len(text):  # tokens without text
            del self._window[self._known :]
            return
        self._known, self._seen = len(self._window), text
        certain = self._certain_length(text)
        self._show(text[self._shown : certain])
        self._shown = max(self._shown, certain)
        if len(self._window) > WINDOW:
            self._forget()

    def end(self) -> None:
        """Write the rest: no token follows."""
        self.text = self._decode(self._tokens)
        self._show(self.text[self._written :])

    def _certain_length(self, text: str) -> int:
        """How many characters no later token can change."""
        end = len(text) - text.endswith(REPLACEMENT)
        space = text.find(" ", max(end - _CLEANUP, 0), end) if self._cleans else -1
        return end if space < 0 else space

    def _forget(self) -> None:
        """Keep only the last tokens, if they alone decode to the end of the text.

        They must decode to some text: a leading space that is dropped is then theirs, and not that of the next token.
        """
        kept = self._decode(self._window[-KEPT:])
        before = len(self._seen) - len(kept)
        if kept and self._seen.endswith(kept) and self._shown >= before:
            self._window = self._window[-KEPT:]
            self._known, self._seen, self._shown = KEPT, kept, self._shown - before

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _show(self, new: str) -> None:
        if new:
            self._written += len(new)
            self._write(new)
