"""Texts whose tokens are known: the tokenizer of ``models.word_tokenizer`` makes token i of the word "wi"."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from models import FIRST_ID, VOCABULARY, word_tokenizer

PERIOD = VOCABULARY - FIRST_ID
#: What the chat template puts before the words of each role; after <s>, once.
MARKS = {"system": 10, "user": 11, "assistant": 12, "tool": 13}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %} w10 {% elif m.role == 'user' %} w11 "
    "{% elif m.role == 'assistant' %} w12 {% elif m.role == 'tool' %} w13 {% else %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)


def ids_of(count: int, start: int = 0) -> list[int]:
    """A long sequence of ids without a short period: i², wrapped."""
    return [FIRST_ID + (i * i + i // PERIOD) % PERIOD for i in range(start, start + count)]


def words(ids: Iterable[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def save_lines(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tokenizer_folder(folder: Path, *, bos: bool = False, chat: bool = False) -> Path:
    """A model folder as far as calibration looks at one."""
    tokenizer = word_tokenizer(bos=bos)
    if chat:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
