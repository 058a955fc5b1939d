"""The formats that packed checkpoints are written in and read from, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigq.errors import UnsupportedModelError
from bigq.io.formats.base import Format, PackedLinear, PackedSchemes, Quantization, Stored
from bigq.io.formats.compressed_tensors import CompressedTensors, CompressedTensorsSchemes
from bigq.io.formats.gptq import Gptq, GptqV2
from bigq.io.formats.gptq_config import GptqSchemes
from bigq.io.json_file import shown

__all__ = ["FORMATS", "Format", "PackedLinear", "PackedSchemes", "Quantization", "Stored", "read_schemes"]

FORMATS: Mapping[str, Format] = {made.name: made for made in (Gptq(), GptqV2(), CompressedTensors())}


def read_schemes(path: Path, config: Mapping[str, Any]) -> PackedSchemes:
    """What the ``quantization_config`` of the config.json at ``path`` says.

    Raises CheckpointError where it cannot be understood, UnsupportedModelError where it is of a method that bigq does not read.
    """
    method = config.get("quant_method")
    if method == "gptq":
        return GptqSchemes.read(path, config, FORMATS["gptq_v2" if config.get("checkpoint_format") == "gptq_v2" else "gptq"])
    if method == "compressed-tensors":
        return CompressedTensorsSchemes.read(path, config, FORMATS["compressed-tensors"])
    raise UnsupportedModelError(
        f"{path.parent}: is already quantized ({shown(method)}); bigq reads fp32, fp16 and bf16 checkpoints and its own output"
    )
