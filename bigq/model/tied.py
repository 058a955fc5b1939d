"""Output heads that config.json ties to the input embedding, while the checkpoint holds a tensor of its own for each.

transformers, and so bigq, unties the two where their values differ. Other readers drop the head's tensor and use the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bigq.io.index import TensorInfo
from bigq.io.reader import iter_chunks, read_rows

#: Rows that are compared where reading all would take too long.
SAMPLED_ROWS = 256


def has_own_head(model: nn.Module, sources: Mapping[str, TensorInfo], *, sampled: bool = False) -> bool:
    """Whether a tied head's stored weight differs from the embedding's. False where files are not here, or hold one of the two.

    sources: parameter → stored tensor. sampled: compare rows spread over the vocabulary, not all. Raises CheckpointError, NumericsError.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is None or head.weight is not embedding.weight:
        return False
    names = [name for name, param in model.named_parameters(remove_duplicate=False) if param is head.weight]
    stored = {sources[name].name: sources[name] for name in names if name in sources}
    if len(stored) != 2 or not all(isinstance(info.file, Path) and info.file.exists() for info in stored.values()):
        return False
    a, b = stored.values()
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return True
    if sampled:
        rows = torch.linspace(0, a.shape[0] - 1, min(SAMPLED_ROWS, a.shape[0]), dtype=torch.float64).long().unique()
        return not torch.equal(_bits(read_rows(a, rows)), _bits(read_rows(b, rows)))
    return any(bytes(one) != bytes(other) for one, other in zip(iter_chunks(a), iter_chunks(b), strict=True))


def with_ties(found: Mapping[str, TensorInfo], parameters: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Stored tensors by parameter or buffer; of parameters that are one object, all get that of the one that has it."""
    by_object = {id(param): found[name] for name, param in parameters.items() if name in found}
    tied = {name: by_object[id(param)] for name, param in parameters.items() if id(param) in by_object}
    return {**tied, **found}


def tie_warnings(model: nn.Module, sources: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """At most one sentence."""
    if not has_own_head(model, sources, sampled=True):
        return ()
    return (
        "config.json ties the output head to the input embedding (tie_word_embeddings), but the checkpoint holds another head: bigq and "
        "transformers use it, vLLM does not; set tie_word_embeddings to false in config.json, or remove the head's tensor",
    )


def _bits(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)
