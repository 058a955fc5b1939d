"""Rows of token ids from an opened source, and what was made of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.data.opening import Source
from bigq.data.records import Conversation, Document
from bigq.data.token_ids import cut
from bigq.data.tokenizer import Tokenizer
from bigq.errors import CalibrationError

#: Rows are drawn from this many times the tokens asked for, where the text has as many.
SURPLUS = 4
#: Characters of documents that are held at once to draw from; 1024 long books have fewer.
MAX_KEPT_CHARS = 2**29


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Rows to choose from, int64 [N, T], and what they were made of.

    tokens: made of the text, those of no full row included. documents: that were tokenized; None for one text and for token ids.
    conversations: how many of the documents were written by the chat template.
    """

    rows: Tensor
    tokens: int
    documents: int | None = None
    conversations: int = 0


@dataclass(slots=True)
class _Tokens:
    ids: list[int]
    documents: int = 0
    conversations: int = 0


def pool_to_draw_from(source: Source, tokenizer: Tokenizer, samples: int, seqlen: int, seed: int) -> Pool:
    """All rows of token ids; else rows of up to ``SURPLUS`` times the text that is needed, of documents drawn by ``seed``."""
    enough = samples * seqlen * SURPLUS
    if source.ids is not None:
        return _of_ids(source.ids(samples, seqlen))
    if source.documents is not None:
        return _pool(_sample_documents(source.name, source.documents, tokenizer, enough, seed), seqlen, documents=True)
    return _pool(_joined_tokens(source.pieces(), tokenizer, enough), seqlen)


def pool_in_order(source: Source, tokenizer: Tokenizer, samples: int | None, seqlen: int) -> Pool:
    """The first rows of the text, at least ``samples`` where there are as many; None: all."""
    if source.ids is not None:
        return _of_ids(source.ids(samples, seqlen))
    limit = None if samples is None else samples * seqlen
    if source.documents is not None:
        return _pool(_tokens(source.documents(), tokenizer, limit), seqlen, documents=True)
    return _pool(_joined_tokens(source.pieces(), tokenizer, limit), seqlen)


def _of_ids(rows: Tensor) -> Pool:
    return Pool(rows=rows, tokens=rows.numel())


def _pool(found: _Tokens, seqlen: int, *, documents: bool = False) -> Pool:
    return Pool(
        rows=cut(torch.tensor(found.ids, dtype=torch.int64), seqlen),
        tokens=len(found.ids),
        documents=found.documents if documents else None,
        conversations=found.conversations,
    )


def _joined_tokens(pieces: Iterable[Document], tokenizer: Tokenizer, limit: int | None) -> _Tokens:
    """Tokens of one text in pieces; special tokens only at its start."""
    ids: list[int] = []
    for text in pieces:
        assert isinstance(text, str), "a text has no conversations"
        ids += tokenizer.encode(text, special=not ids)
        if limit is not None and len(ids) >= limit:
            break
    return _Tokens(ids)


def _tokens(documents: Iterable[Document], tokenizer: Tokenizer, limit: int | None) -> _Tokens:
    """Tokens of documents in order, each with the special tokens that the tokenizer or its chat template adds."""
    found = _Tokens([])
    for document in documents:
        found.ids += tokenizer.encode_document(document)
        found.documents += 1
        found.conversations += isinstance(document, Conversation)
        if limit is not None and len(found.ids) >= limit:
            break
    return found


def _sample_documents(name: str, documents: Callable[[], Iterable[Document]], tokenizer: Tokenizer, enough: int, seed: int) -> _Tokens:
    """Tokens of documents drawn evenly from any number of them: reservoir sampling, grown until it holds enough.

    documents: a new pass over all of them.
    """
    size = 1024
    while True:
        draw = random.Random(seed)
        kept: list[Document] = []
        total = characters = 0
        for total, document in enumerate(documents(), 1):
            if len(kept) < size:
                kept.append(document)
                characters += len(document)
            elif (place := draw.randrange(total)) < size:
                characters += len(document) - len(kept[place])
                kept[place] = document
            if characters > MAX_KEPT_CHARS:
                raise CalibrationError(f"{name}: its documents are too long to draw {size} of them; cut them, or give fewer")
        draw.shuffle(kept)
        found = _tokens(kept, tokenizer, enough)
        if len(found.ids) >= enough or total <= size:
            return found
        size *= 4
