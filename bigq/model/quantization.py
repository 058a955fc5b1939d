"""Whether the weights of a checkpoint are packed, from its config.json: the one place that decides what a job accepts as its source."""

from __future__ import annotations

from pathlib import Path

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.formats import PackedSchemes, read_schemes
from bigq.io.json_file import read_json_object, show_value


def packed_schemes(folder: Path) -> PackedSchemes | None:
    """The schemes of the packed Linears of a model folder; None where it has none, so that its weights can be quantized.

    Raises CheckpointError for an invalid config, UnsupportedModelError for a quantization method that bigq does not read.
    """
    path = folder / "config.json"
    said = read_json_object(path).get("quantization_config")
    if said is None:
        return None
    if not isinstance(said, dict):
        raise CheckpointError(f"{path}: quantization_config is {show_value(said)}, not an object; fetch it again")
    return read_schemes(path, said)


def require_unpacked(folder: Path) -> None:
    """Raise UnsupportedModelError where the weights of a model folder are packed already; otherwise as ``packed_schemes``."""
    if packed_schemes(folder) is not None:
        raise UnsupportedModelError(f"{folder}: is already quantized; give the original model")
