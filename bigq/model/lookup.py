"""Embeddings of which only the rows that are looked up are in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bigq.errors import UnsupportedModelError
from bigq.model.description import replace_forward

#: The bytes from which an embedding is read by rows. The table of embeddings for every layer of gemma-3n has 4.7 GB.
TABLE_BYTES = 2**26


def token_tables(model: nn.Module, blocks_path: str) -> dict[str, nn.Embedding]:
    """Large embeddings besides the input's, outside the blocks, by the name of their weight."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    outside = {name: module for name, module in model.named_modules() if not name.startswith(f"{blocks_path}.")}
    found = {name: module for name, module in outside.items() if isinstance(module, nn.Embedding) and module is not embedding}
    return {f"{name}.weight": module for name, module in found.items() if module.weight.nbytes >= TABLE_BYTES}


@contextlib.contextmanager
def rows_held(embedding: nn.Embedding, known: Tensor, rows: Tensor) -> Iterator[None]:
    """Let an embedding look up rows [k, d] that are in memory, of the tokens ``known`` [k], in order; others are refused.

    Raises UnsupportedModelError for others.
    """
    with _has_rows(embedding, rows):

        def forward(x: Tensor) -> Tensor:
            if not bool(torch.isin(x, known).all()):
                raise UnsupportedModelError(
                    "the model embeds tokens that are not in its input, such as a prompt; this architecture is not supported"
                )
            return _look_up(embedding, x, known)

        with replace_forward(embedding, forward):
            yield


@contextlib.contextmanager
def rows_read(embedding: nn.Embedding, read: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let an embedding read the rows that it is asked for, each time anew.

    read: rows [k, d] on the device of the tokens [k], which are in order.
    """

    def forward(x: Tensor) -> Tensor:
        known = x.unique()
        with _has_rows(embedding, read(known)):
            return _look_up(embedding, x, known)

    with replace_forward(embedding, forward):
        yield


@contextlib.contextmanager
def _has_rows(embedding: nn.Embedding, rows: Tensor) -> Iterator[None]:
    weight, padding = embedding._parameters["weight"], embedding.padding_idx
    embedding._parameters["weight"], embedding.padding_idx = nn.Parameter(rows, requires_grad=False), None
    try:
        yield
    finally:
        embedding._parameters["weight"], embedding.padding_idx = weight, padding


def _look_up(embedding: nn.Embedding, x: Tensor, known: Tensor) -> Tensor:
    """By the module's own forward, which may scale the rows."""
    y: Tensor = type(embedding).forward(embedding, torch.searchsorted(known, x.to(known.dtype).contiguous()))
    return y
