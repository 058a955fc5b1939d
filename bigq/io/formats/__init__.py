"""The formats of packed checkpoints, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigq.errors import UnsupportedModelError
from bigq.io.formats.awq import Awq, AwqSchemes
from bigq.io.formats.base import Format, PackedLinear, PackedSchemes, PackedWeight, Quantization
from bigq.io.formats.bitsandbytes import BitsAndBytesSchemes, BnbFp4, Nf4
from bigq.io.formats.compressed_tensors import CompressedTensors, CompressedTensorsSchemes
from bigq.io.formats.fp4 import MxFp4, NvFp4, NvFp4W4A4
from bigq.io.formats.fp8_block import Fp8Block
from bigq.io.formats.gptq import Gptq, GptqV2
from bigq.io.formats.gptq_config import GptqSchemes
from bigq.io.formats.numbers import Numbers, NumbersSchemes
from bigq.io.formats.w8a8 import Fp8, StaticFp8, StaticW8A8Int8, W8A8Int8
from bigq.io.json_file import show_name, show_value
from bigq.vocabulary import InputScalesName

__all__ = [
    "FORMATS",
    "Format",
    "PackedLinear",
    "PackedSchemes",
    "PackedWeight",
    "Quantization",
    "format_of",
    "numbers_format",
    "quantization_method",
    "read_schemes",
]

#: Variants of compressed-tensors that store numbers instead of packed codes.
_NUMBERS: tuple[Numbers, ...] = (W8A8Int8(), Fp8(), Fp8Block(), NvFp4(), NvFp4W4A4(), MxFp4())
FORMATS: Mapping[str, Format] = {made.name: made for made in (Gptq(), GptqV2(), CompressedTensors(), *_NUMBERS, Awq(), Nf4(), BnbFp4())}


#: Formats whose readers round inputs, with static scales of these, by the format's name.
STATIC: Mapping[str, Numbers] = {made.name: made for made in (StaticW8A8Int8(), StaticFp8())}

#: Entries that name a method in place of ``quant_method``.
_METHOD_KEYS = ("quant_type", "quant_algo", "quantization_method", "method", "format", "fmt")
#: Entries that only one method has.
_TELLING_KEYS: Mapping[str, str] = {
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
    "_load_in_4bit": "bitsandbytes",
    "_load_in_8bit": "bitsandbytes",
    "w_bit": "awq",
    "config_groups": "compressed-tensors",
    "desc_act": "gptq",
    "weight_block_size": "fp8",
    "activation_scheme": "fp8",
}


def format_of(name: str, input_scales: InputScalesName) -> Format:
    """The format called ``name``, with such scales of inputs if it can have them."""
    return STATIC.get(name, FORMATS[name]) if input_scales == "static" else FORMATS[name]


def numbers_format(config: Mapping[str, Any]) -> Numbers | None:
    """The variant of compressed-tensors that a ``quantization_config`` describes, if it is one that stores numbers and that bigq writes."""
    return next((made for made in (*_NUMBERS, *STATIC.values()) if made.describes(config)), None)


def read_schemes(path: Path, config: Mapping[str, Any]) -> PackedSchemes:
    """Parse the ``quantization_config`` of the config.json at ``path``.

    Raises CheckpointError if it is invalid, UnsupportedModelError if bigq does not read its method or its ``checkpoint_format``.
    """
    method = config.get("quant_method")
    if method == "gptq":
        return GptqSchemes.read(path, config, _gptq_variant(path, config.get("checkpoint_format")))
    if (numbers := numbers_format(config)) is not None:
        return NumbersSchemes(path, numbers)
    if method == "compressed-tensors":
        return CompressedTensorsSchemes.read(path, config, FORMATS["compressed-tensors"])
    if method == "awq":
        return AwqSchemes.read(path, config, FORMATS["awq"])
    if method == "bitsandbytes":
        return BitsAndBytesSchemes.read(path, config, FORMATS)
    raise UnsupportedModelError(
        f"{path.parent}: is already quantized ({quantization_method(config)}); give the original model, in fp32, fp16 or bf16 (of "
        "quantized ones, bigq reads gptq, compressed-tensors, awq and bitsandbytes)"
    )


def quantization_method(config: Mapping[str, Any]) -> str:
    """What a ``quantization_config`` says of its method, for a message. Some writers leave out ``quant_method``."""
    name = config.get("quant_method") or next((config[key] for key in _METHOD_KEYS if config.get(key)), None)
    if isinstance(name, dict):
        name = None
    if name is None:
        name = next((method for key, method in _TELLING_KEYS.items() if key in config), None)
    if name is None:
        return f"its quantization_config names no method; it has {', '.join(map(show_name, list(config)[:4])) or 'no entries'}"
    bits = next((config[key] for key in ("bits", "w_bit") if type(config.get(key)) is int), None)
    return f"{show_name(name) if isinstance(name, str) else show_value(name)}{'' if bits is None else f', {bits} bits'}"


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
