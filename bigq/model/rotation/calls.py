"""A whole model on stand-ins of its weights: what enters its blocks, and how each block is called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bigq.model.architecture import max_positions
from bigq.model.description import ModelDescription, replace_forward
from bigq.model.forward.block_call import BlockCall, OutputForm
from bigq.model.forward.capture import first_input, record_calls
from bigq.model.rotation.standins import Bare, generator_of


class StandInModel:
    """The model of a description, of which no weight has been read.

    ids: token ids [1, T]. rows: what stands in for their embedding, fp32 [1, T, d]. rest: the model without its blocks.
    """

    def __init__(self, described: ModelDescription, tokens: int) -> None:
        """tokens: of the row that it runs on, T."""
        self.described = described
        self.device = next((b.device for b in described.model.buffers()), torch.device("cpu"))
        self.width = described.embedding.embedding_dim
        length = min(tokens, max_positions(described.config) or tokens)
        self.ids = torch.arange(length, device=self.device)[None] % described.embedding.num_embeddings
        self.rows = torch.randn(1, length, self.width, generator=generator_of("embedding")).to(self.device)
        name = type(described.model).__name__
        self.rest = Bare(described.model, name, self.width, self.device, without=described.blocks_path, embedding=described.embedding)

    def bare(self, i: int) -> Bare:
        """Block i."""
        return Bare(self.described.blocks[i], f"{self.described.blocks_path}.{i}", self.width, self.device)

    @contextlib.contextmanager
    def embedded(self, rows: Tensor) -> Iterator[None]:
        """Let the embedding return ``rows`` [1, T, d]."""
        with replace_forward(self.described.embedding, lambda *_, **__: rows.clone()):
            yield

    def entering(self, rows: Tensor) -> tuple[Tensor, BlockCall]:
        """What block 0 receives where the embedding returns ``rows``."""
        found: list[tuple[Tensor, BlockCall]] = []

        def run() -> Tensor:
            with self.embedded(rows):
                found.append(first_input(self.described.model, self.described.blocks, self.ids))
            return found[0][0]

        self.rest.run(run)
        return found[0]

    def form(self, hidden: Tensor, first: BlockCall) -> OutputForm:
        """How blocks return their outputs. hidden, first: what block 0 receives."""
        outputs: list[Any] = []

        def run() -> Tensor:
            outputs.append(self.described.blocks[0](hidden.clone(), *first.args, **first.kwargs))
            return hidden

        self.bare(0).run(run)
        return OutputForm.of(outputs[0])

    def calls(self, rows: Tensor, form: OutputForm) -> list[BlockCall]:
        """The calls of all blocks where the embedding returns ``rows``."""
        found: list[BlockCall] = []

        def record() -> Tensor:
            with self.embedded(rows):
                found.extend(record_calls(self.described.model, self.described.blocks, self.ids, form))
            return rows

        self.rest.run(record)
        return found
