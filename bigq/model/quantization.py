"""How the weights of a checkpoint are quantized, from its config.json: the one place that decides what a job accepts as its source.

Weights in fp8, int8 or fp4 are decoded as they are read (``decoded_source``). Packed integers are what a job writes: programs that use a
model keep them packed (``packed_schemes``), a job that quantizes them again decodes them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.formats import PackedSchemes, numbers_format, quantization_method, read_schemes
from bigq.io.formats.compressed_tensors import require_plain
from bigq.io.index import Checkpoint, RemoteHeaders, TensorInfo
from bigq.io.json_file import read_json_object, show_name, show_value
from bigq.io.sources.coded import decoded_tensors
from bigq.io.sources.integers import decoded_awq, decoded_integers

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

#: Values of ``quant_method`` for weights of 8 or 4 bits that are decoded as they are read.
_CODED = ("fp8", "fbgemm_fp8", "mxfp4")
#: Values of modelopt's ``quant_algo``, and of compressed-tensors' ``format``, for such weights.
_CODED_ALGORITHMS = ("FP8", "NVFP4")
_CODED_FORMATS = ("float-quantized", "naive-quantized", "int-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
#: Dtypes of original models; all others are taken for bf16.
_DTYPES: Mapping[str, torch.dtype] = {"float16": torch.float16, "float32": torch.float32}


#: Where a config describes how weights are quantized, and the parts of it that describe a composite model's language model.
_KEYS, _LANGUAGE_PARTS = ("quantization_config", "compression_config"), ("text_config", "llm_config", "language_config")


def described_quantization(config: Mapping[str, Any]) -> tuple[str, Any]:
    """How a config says that weights are quantized: by that name, or that of older files, or in the part for the language model.

    Returns the place, for messages, and the value; None if it says nothing.
    """
    for part in ("", *_LANGUAGE_PARTS):
        inner = config.get(part) if part else config
        for key in _KEYS:
            if isinstance(inner, Mapping) and inner.get(key) not in (None, {}):
                return f"{part}.{key}".lstrip("."), inner[key]
    return _KEYS[0], config.get(_KEYS[0])


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that does not say that weights are quantized."""
    found = {key: value for key, value in config.items() if key not in _KEYS}
    for part in _LANGUAGE_PARTS:
        if isinstance(inner := found.get(part), Mapping):
            found[part] = {key: value for key, value in inner.items() if key not in _KEYS}
    return found


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the weights of a checkpoint are decoded as they are read. method: its name for people. decode: makes its tensors look plain."""

    method: str
    decode: Callable[[Mapping[str, TensorInfo]], dict[str, TensorInfo]]


def _numbers(folder: Path, config: Mapping[str, Any]) -> Decoding | None:
    """The decoding of weights in fp8, int8 or fp4; None where they are not stored so. Raises CheckpointError."""
    path = folder / "config.json"
    _, said = described_quantization(config)
    if said is None and (folder / MODELOPT_CONFIG).exists():
        found = read_json_object(folder / MODELOPT_CONFIG).get("quantization")
        said = {**found, "quant_method": "modelopt"} if isinstance(found, dict) else None
    if not isinstance(said, dict):
        return None
    method, algorithm, format = said.get("quant_method"), said.get("quant_algo"), said.get("format")
    if not (
        method in _CODED
        or (method == "modelopt" and algorithm in _CODED_ALGORITHMS)
        or (method == "compressed-tensors" and format in _CODED_FORMATS)
    ):
        return None
    if method == "compressed-tensors":
        require_plain(path, said)
    block, dtype = _block(path, said), original_dtype(config)
    return Decoding(f"{algorithm or format or method}", lambda tensors: decoded_tensors(tensors, block, dtype))


def _integers(folder: Path, config: Mapping[str, Any]) -> Decoding | None:
    """The decoding of packed integers; None for plain weights. Raises CheckpointError, UnsupportedModelError."""
    said, dtype = described_quantization(config)[1], original_dtype(config)
    if isinstance(said, dict) and said.get("quant_method") == "awq":
        read_schemes(folder / "config.json", said)
        return Decoding(quantization_method(said), lambda tensors: decoded_awq(tensors, dtype))
    schemes = packed_schemes(folder)
    return None if schemes is None else Decoding(quantization_method(said or {}), lambda tensors: decoded_integers(tensors, schemes, dtype))


def _decoding(folder: Path, *, integers: bool) -> Decoding | None:
    config = read_json_object(folder / "config.json")
    said = described_quantization(config)[1]
    if not integers and isinstance(said, dict) and numbers_format(said) is not None:
        return None  # read as packed Linears, whose inputs may have to be quantized
    return _numbers(folder, config) or (_integers(folder, config) if integers else None)


def decoded_source(folder: Path, tensors: Mapping[str, TensorInfo], *, integers: bool) -> Mapping[str, TensorInfo]:
    """The tensors of a model folder, in which weights that are decoded as they are read look like plain ones.

    integers: whether packed integers are decoded too. Raises CheckpointError, UnsupportedModelError.
    """
    decoding = _decoding(folder, integers=integers)
    if decoding is None or not tensors:
        return tensors
    decoded = decoding.decode(tensors)
    if not any(info.coding is not None for info in decoded.values()):
        raise CheckpointError(
            f"{folder / 'config.json'}: says that weights are quantized ({show_name(decoding.method)}), but none is stored so; fetch the "
            "checkpoint again, or remove quantization_config if the weights are the original ones"
        )
    return decoded


def open_source(folder: Path, *, integers: bool = False, remote: RemoteHeaders | None = None) -> Checkpoint:
    """The checkpoint of a model folder, with its weights decoded: see ``decoded_source``. remote: has the shards, if the folder has not."""
    stored = Checkpoint.open(folder, remote)
    return Checkpoint(folder, decoded_source(folder, stored.tensors, integers=integers), stored.fingerprint)


def coded_warnings(folder: Path, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """A sentence that says which weights are decoded. tensors: see ``decoded_source``."""
    decoded = [info for info in tensors.values() if info.coding is not None]
    if not decoded:
        return ()
    decoding = _decoding(folder, integers=True)
    assert decoding is not None, "the tensors are of another folder"
    dtype = str(decoded[0].dtype).removeprefix("torch.")
    return (
        f"{len(decoded)} weights are quantized already ({decoding.method}) and are decoded to {dtype} as they are read; the loss of "
        "another quantization adds to theirs",
    )


def _block(path: Path, said: Mapping[str, Any]) -> tuple[int, int] | None:
    """The rows and columns that share a scale, if a quantization config says so."""
    block = said.get("weight_block_size")
    groups = said.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        block = block or (weights.get("block_structure") if isinstance(weights, dict) else None)
    if block is None:
        return None
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise CheckpointError(f"{path}: quantization_config: weight_block_size is {show_value(block)}, not two sizes; fetch it again")
    return block[0], block[1]


def original_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a config names for its model; bf16 if it names none."""
    text = config.get("text_config")
    places = (config, text if isinstance(text, dict) else {})
    named = next((str(value) for place in places for key in ("dtype", "torch_dtype") if (value := place.get(key)) is not None), None)
    return _DTYPES.get((named or "").removeprefix("torch."), torch.bfloat16)


def packed_schemes(folder: Path) -> PackedSchemes | None:
    """The schemes of the packed Linears of a model folder; None where it has none, so that its weights can be quantized: they are plain,
    or decoded as they are read.

    Raises CheckpointError for an invalid config, UnsupportedModelError for a quantization method that bigq does not read.
    """
    path = folder / "config.json"
    config = read_json_object(path)
    place, said = described_quantization(config)
    if isinstance(said, dict) and numbers_format(said) is not None:
        return read_schemes(path, said)
    if _numbers(folder, config) is not None:
        return None
    if said is None:
        _require_no_other(folder, config)
        return None
    if not isinstance(said, dict):
        raise CheckpointError(f"{path}: {place} is {show_value(said)}, not an object; fetch it again")
    return read_schemes(path, said)


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
    places: list[tuple[str, Any]] = []
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
