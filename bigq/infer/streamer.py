"""Text while its tokens are made: each piece as soon as no further token can change it.

What a token stands for depends on those around it: a space may go where a text begins, bytes make a character together, and some
tokenizers clean up spaces before punctuation.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

#: What the last characters of a text are decoded to while bytes of them are missing.
UNFINISHED = "\ufffd"
#: A token of one byte, as SentencePiece names it. Neighbours are decoded together, and if they are no UTF-8, all of them are unknown.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
#: Characters at the end of a text that cleaning it up may still change: " 've" loses its space.
_CLEANED = 3
#: Tokens that are decoded again for each new one, at most, and those of them that the next ones are decoded with after that.
WINDOW, KEPT = 32, 8


class Streamer:
    """What transformers' ``generate`` hands tokens to: first those of the prompt, then each new one.

    The pieces that ``write`` is given make up ``text``: all new tokens decoded at once, special ones left out. count: of the new tokens.
    first: when the first of them came, by ``time.monotonic``.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._prompt = True
        self._tokens: list[int] = []
        self._window: list[int] = []
        #: Tokens of the window that were decoded, their text, and how much of that was shown.
        self._known, self._seen, self._shown = 0, "", 0
        self._written = 0
        self.text = ""
        self.first: float | None = None

    @property
    def count(self) -> int:
        return len(self._tokens)

    def put(self, tokens: Tensor) -> None:
        """Show what is certain."""
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
        text = self._decoded(self._window)
        if text and text == self._seen and self._shown == len(text):  # tokens of no text
            del self._window[self._known :]
            return
        self._known, self._seen = len(self._window), text
        certain = self._certain(text)
        self._show(text[self._shown : certain])
        self._shown = max(self._shown, certain)
        if len(self._window) > WINDOW:
            self._forget()

    def end(self) -> None:
        """Nothing more will come."""
        self.text = self._decoded(self._tokens)
        self._show(self.text[self._written :])

    def _certain(self, text: str) -> int:
        """How many characters no further token can change."""
        end = len(text) - text.endswith(UNFINISHED)
        space = text.find(" ", max(end - _CLEANED, 0), end) if self._cleans else -1
        return end if space < 0 else space

    def _forget(self) -> None:
        """Go on with the last tokens only, if what they are decoded to by themselves is the end of the text.

        They must be decoded to something: a space that is left out where a text begins is then one of theirs, and not of what follows.
        """
        kept = self._decoded(self._window[-KEPT:])
        before = len(self._seen) - len(kept)
        if kept and self._seen.endswith(kept) and self._shown >= before:
            self._window = self._window[-KEPT:]
            self._known, self._seen, self._shown = KEPT, kept, self._shown - before

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _show(self, new: str) -> None:
        if new:
            self._written += len(new)
            self._write(new)
