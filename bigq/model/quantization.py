"""Whether the weights of a checkpoint are packed, from its config.json: the one place that decides what a job accepts as its source."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.formats import PackedSchemes, quantization_method, read_schemes
from bigq.io.json_file import read_json_object, show_name, show_value

#: Where modelopt describes a quantized model if config.json does not.
MODELOPT_CONFIG = "hf_quant_config.json"
#: Suffixes of tensors that quantized weights consist of, and who writes them.
_MARKS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.(qweight|qzeros)$"), "gptq or awq"),
    (re.compile(r"\.(weight_packed|weight_shape)$"), "compressed-tensors"),
    (re.compile(r"\.(absmax|quant_map|SCB)$|\.quant_state\.bitsandbytes__"), "bitsandbytes"),
    (re.compile(r"_(blocks|scales)$"), "mxfp4"),
    (re.compile(r"\.weight_(scale|scale_inv|scale_2|zero_point)$"), "fp8, int8 or fp4"),
)


def packed_schemes(folder: Path) -> PackedSchemes | None:
    """The schemes of the packed Linears of a model folder; None where it has none, so that its weights can be quantized.

    Raises CheckpointError for an invalid config, UnsupportedModelError for a quantization method that bigq does not read.
    """
    path = folder / "config.json"
    config = read_json_object(path)
    said = config.get("quantization_config")
    if said is None:
        _require_no_other(folder, config)
        return None
    if not isinstance(said, dict):
        raise CheckpointError(f"{path}: quantization_config is {show_value(said)}, not an object; fetch it again")
    return read_schemes(path, said)


def require_unpacked(folder: Path) -> None:
    """Raise UnsupportedModelError where the weights of a model folder are packed already; otherwise as ``packed_schemes``."""
    if packed_schemes(folder) is not None:
        method = quantization_method(read_json_object(folder / "config.json")["quantization_config"])
        raise UnsupportedModelError(f"{folder}: is already quantized ({method}); give the original model, in fp32, fp16 or bf16")


def refuse_quantized_tensors(folder: Path, names: Iterable[str]) -> None:
    """Raise UnsupportedModelError where tensors without a place in the model are parts of quantized weights, by no config."""
    for name in names:
        method = next((writer for mark, writer in _MARKS if mark.search(name)), None)
        if method is not None:
            raise UnsupportedModelError(
                f"{folder}: is already quantized: tensor {show_name(name)} is one that {method} stores, although config.json has no "
                "quantization_config; give the original model, in fp32, fp16 or bf16"
            )


def _require_no_other(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError where a quantization is described elsewhere than in ``quantization_config``."""
    places = [(f"config.json: {name}", config.get(name)) for name in ("compression_config",)]
    inner = [(name, value) for name, value in config.items() if isinstance(value, dict)]
    places += [(f"config.json: {name}.quantization_config", value.get("quantization_config")) for name, value in inner]
    if (folder / MODELOPT_CONFIG).exists():
        found = read_json_object(folder / MODELOPT_CONFIG).get("quantization")
        # Without quant_algo, only the cache is quantized.
        places.append((MODELOPT_CONFIG, found if isinstance(found, dict) and found.get("quant_algo") else None))
    for place, value in places:
        if isinstance(value, dict) and value:
            method = f"modelopt {show_value(value['quant_algo'])}" if place == MODELOPT_CONFIG else quantization_method(value)
            raise UnsupportedModelError(
                f"{folder}: is already quantized ({method}, by its {place}); give the original model, in fp32, fp16 or bf16"
            )
