"""The packed Linears of a checkpoint that bigq or another program quantized."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from bigq.errors import CheckpointError
from bigq.io.formats import PackedSchemes
from bigq.io.formats.base import module_of
from bigq.io.index import Checkpoint
from bigq.io.sources.packed import PackedSource
from bigq.model import skeleton
from bigq.model.experts.naming import packed_parts
from bigq.model.experts.stored import expert_parts


def packed_sources(folder: Path, model: nn.Module, checkpoint: Checkpoint, schemes: PackedSchemes | None) -> dict[str, PackedSource]:
    """The packed Linears by the name of their weight. Another kind of stored weights needs a function like this one.

    schemes: None if there are none. Raises CheckpointError.
    """
    if schemes is None:
        return {}
    weights = {f"{module_of(prefix)}.weight": prefix for prefix in schemes.format.prefixes(checkpoint)}
    if not weights:
        path = folder / "config.json"
        raise CheckpointError(f"{path}: has a quantization_config, but no tensor is packed; fetch the checkpoint again")
    # Configs name Linears as the model does. A single expert is no module of the model and has its name from the checkpoint.
    renamed = skeleton.map_names(model, weights)
    renamed |= {name: name for name in (*expert_parts(model, weights), *packed_parts(model, weights))}
    return {
        target: PackedSource(
            format=schemes.format,
            prefix=weights[name],
            scheme=schemes.scheme(target.removesuffix(".weight")),
            checkpoint=checkpoint,
        )
        for name, target in renamed.items()
    }
