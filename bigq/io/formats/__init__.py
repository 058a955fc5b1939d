"""The formats of packed checkpoints, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigq.errors import UnsupportedModelError
from bigq.io.formats.base import Format, PackedLinear, PackedSchemes, PackedWeight, Quantization
from bigq.io.formats.compressed_tensors import CompressedTensors, CompressedTensorsSchemes
from bigq.io.formats.gptq import Gptq, GptqV2
from bigq.io.formats.gptq_config import GptqSchemes
from bigq.io.json_file import show_value

__all__ = ["FORMATS", "Format", "PackedLinear", "PackedSchemes", "Quantization", "PackedWeight", "read_schemes"]

FORMATS: Mapping[str, Format] = {made.name: made for made in (Gptq(), GptqV2(), CompressedTensors())}


def read_schemes(path: Path, config: Mapping[str, Any]) -> PackedSchemes:
    """Parse the ``quantization_config`` of the config.json at ``path``.

    Raises CheckpointError if it is invalid, UnsupportedModelError if bigq does not read its method or its ``checkpoint_format``.
    """
    method = config.get("quant_method")
    if method == "gptq":
        return GptqSchemes.read(path, config, _gptq_variant(path, config.get("checkpoint_format")))
    if method == "compressed-tensors":
        return CompressedTensorsSchemes.read(path, config, FORMATS["compressed-tensors"])
    raise UnsupportedModelError(
        f"{path.parent}: already quantized ({show_value(method)}); bigq reads models in fp32, fp16 or bf16, and packed ones "
        "in the gptq and compressed-tensors formats"
    )


def _gptq_variant(path: Path, name: Any) -> Format:
    """The format that ``checkpoint_format`` names. Old checkpoints name none; they are of version 1."""
    variants = {made.name: made for made in FORMATS.values() if isinstance(made, Gptq)}
    if name is None:
        return variants[Gptq.name]
    if isinstance(name, str) and name in variants:
        return variants[name]
    raise UnsupportedModelError(
        f"{path}: quantization_config: checkpoint_format is {show_value(name)}; bigq reads {' and '.join(variants)}, "
        "so convert the checkpoint to one of these first"
    )
