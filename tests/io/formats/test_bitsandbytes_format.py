"""The formats bnb-nf4 and bnb-fp4: what is stored, by the layout of bitsandbytes, and what is refused when it is read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bigq.errors import CheckpointError, UnsupportedModelError, UsageError
from bigq.io.formats import FORMATS, PackedWeight, Quantization, read_schemes
from bigq.io.formats.base import Format, PackedLinear
from bigq.io.index import read_header
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.rtn import round_to_nearest

M, N = 24, 192
BNB = [FORMATS["bnb-nf4"], FORMATS["bnb-fp4"]]
formats = pytest.mark.parametrize("format", BNB, ids=lambda each: each.name)

#: The points by code, as bitsandbytes has them.
TABLES = {
    "bnb-nf4": "-1 -.6961928 -.52507305 -.3949175 -.28444138 -.18477343 -.09105004 0 .0795803 .1609302 .2461123 .33791524 .44070983 "
    ".562617 .72295684 1",
    "bnb-fp4": "0 .0052083335 .6666667 1 .33333334 .5 .16666667 .25 0 -.0052083335 -.6666667 -1 -.33333334 -.5 -.16666667 -.25",
}


_STORAGE = (("bnb_4bit_quant_storage", "bfloat16"),)


def scheme_of(format: Format, **changes: Any) -> QuantScheme:
    return QuantScheme(group_size=64, points=format.points, scale_form=format.scale_form, **{"scales": "minmax", **changes})


def weight_of(format: Format, **changes: Any) -> QuantizedWeight:
    return round_to_nearest(torch.randn(M, N, generator=torch.Generator().manual_seed(0)) * 0.03, scheme_of(format, **changes))


def stored(format: Format) -> dict[str, Tensor]:
    return format.pack("a.q", weight_of(format), torch.bfloat16)


def unpacked(tensors: dict[str, Tensor], table: Tensor) -> Tensor:
    """The weight by the layout's description alone."""
    key = next(name for name in tensors if "quant_state" in name)
    state = json.loads(bytes(tensors[key].tolist()))
    packed = tensors["a.q.weight"].flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().int()
    absmax = tensors["a.q.weight.nested_quant_map"][tensors["a.q.weight.absmax"].int()]
    absmax = absmax * tensors["a.q.weight.nested_absmax"].repeat_interleave(256)[: len(absmax)] + state["nested_offset"]
    return (table[codes].view(-1, 64) * absmax[:, None]).view(state["shape"])


@formats
def test_the_layout_is_that_of_bitsandbytes(format: Format) -> None:
    tensors, weight = stored(format), weight_of(format)
    table = torch.tensor([float(x) for x in TABLES[format.name].split()])
    assert torch.allclose(tensors["a.q.weight.quant_map"], table, rtol=1e-6)
    assert tensors["a.q.weight"].shape == (M * N // 2, 1)
    assert torch.equal(unpacked(tensors, tensors["a.q.weight.quant_map"]), weight.dequantize())
    state = json.loads(bytes(tensors[f"a.q.weight.quant_state.bitsandbytes__{format.points}"].tolist()))
    assert state.pop("nested_offset") == weight.nested.offset if weight.nested else False
    assert state == {
        "quant_type": format.points, "blocksize": 64, "dtype": "bfloat16", "shape": [M, N], "nested_blocksize": 256,
        "nested_dtype": "float32",
    }  # fmt: skip


@formats
def test_a_weight_is_read_as_it_was_stored(format: Format) -> None:
    weight = weight_of(format)
    words, scales, zeros = format.read("a.q", stored(format).__getitem__, weight.scheme)
    assert torch.equal(words, PackedWeight.of(weight).words)
    assert torch.equal(scales, weight.scales) and not zeros.any()


@formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 64), (24, 192), (1000, 1088)])
def test_layouts_are_known_before(format: Format, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Whatever the mean of the scales, the JSON has the same length."""
    for size in (1.0, 1.23456e-17, 0.0):
        weight = round_to_nearest(torch.randn(shape, generator=torch.Generator().manual_seed(1)) * size, scheme_of(format))
        linear = PackedLinear(bits=4, outputs=shape[0], inputs=shape[1], groups=shape[1] // 64)
        tensors = format.pack("a.q", weight, dtype)
        assert list(format.layout("a.q", linear, True, dtype).items()) == [(n, (t.dtype, tuple(t.shape))) for n, t in tensors.items()]


@formats
def test_names_are_split_and_found(format: Format) -> None:
    names = [*stored(format), "a.norm.weight", "b.weight"]
    assert format.prefixes(names) == ["a.q"]
    assert all(format.tensor(*format.split(name)) == name for name in names)


def headers(tensors: dict[str, Tensor], path: Path) -> Any:
    save_file(tensors, path)
    return read_header(path)[0]


@formats
def test_the_geometry_is_read_from_headers(format: Format, tmp_path: Path) -> None:
    found = format.geometry("a.q", headers(stored(format), tmp_path / "x.safetensors"))
    assert found == PackedLinear(bits=4, outputs=M, inputs=N, groups=3)


def damaged(format: Format, what: str) -> dict[str, Tensor]:
    tensors = stored(format)
    state = f"a.q.weight.quant_state.bitsandbytes__{format.points}"
    said = json.loads(bytes(tensors[state].tolist()))

    def with_state(**changes: Any) -> None:
        tensors[state] = torch.tensor(list(json.dumps({**said, **changes}).encode()), dtype=torch.uint8)

    match what:
        case "missing":
            del tensors["a.q.weight.nested_absmax"]
        case "half":
            tensors["a.q.weight"] = tensors["a.q.weight"][: M * N // 4].clone()
        case "dtype":
            tensors["a.q.weight.absmax"] = tensors["a.q.weight.absmax"].float()
        case "no json":
            tensors[state] = torch.full((40,), ord("["), dtype=torch.uint8)
        case "a list":
            tensors[state] = torch.tensor(list(b"[1]"), dtype=torch.uint8)
        case "long":
            tensors[state] = torch.full((5000,), 32, dtype=torch.uint8)
        case "shape":
            with_state(shape=[M, -N])
        case "mean":
            with_state(nested_offset=float("inf"))
        case "blocks":
            with_state(blocksize=128)
        case "rows":
            with_state(shape=[2 * M, N // 2])
    return tensors


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "nested_absmax is missing"),
        ("half", "tensor a.q.weight: its shape or dtype does not match"),
        ("dtype", "tensor a.q.weight: its shape or dtype does not match"),
        ("no json", "is not a description of a matrix by bitsandbytes; fetch it again"),
        ("a list", "is not a description"),
        ("long", "its shape or dtype does not match"),
        ("shape", "is not a description"),
        ("mean", "is not a description"),
        ("blocks", "bigq reads blocks of 64"),
        ("rows", "its blocks cross rows"),
    ],
)
def test_damaged_tensors_are_refused(what: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        BNB[0].geometry("a.q", headers(damaged(BNB[0], what), tmp_path / "x.safetensors"))


def test_values_that_no_reader_can_use_are_found() -> None:
    format, linear = BNB[0], PackedLinear(bits=4, outputs=M, inputs=N, groups=3)
    good = stored(format)
    for suffix in format.suffixes(True):
        assert format.check_values(suffix, linear, good[f"a.q.{suffix}"].flatten(), 0) == (None, None)
    points = good["a.q.weight.quant_map"].clone()
    points[3] += 0.1
    assert format.check_values("weight.quant_map", linear, points, 0)[0] == "holds other points than those of nf4"
    assert format.check_values("weight.nested_absmax", linear, torch.tensor([float("nan")]), 0)[0] == "holds NaN or Inf"
    with pytest.raises(CheckpointError, match="holds other points than those of nf4"):
        format.read("a.q", (good | {"a.q.weight.quant_map": points}).__getitem__, scheme_of(format))


def test_only_scales_that_nested_ones_can_hold_are_stored() -> None:
    format, weight = BNB[0], weight_of(BNB[0])
    words, scales, zeros = PackedWeight.of(weight)
    other = scales * torch.linspace(1, 1.3, scales.numel()).view_as(scales)
    with pytest.raises(UsageError, match=r"a\.q: its scales cannot be stored exactly in bnb-nf4"):
        format.store("a.q", PackedWeight(words, other, zeros), weight.scheme, torch.float16)
    whole = torch.full_like(scales, 0.5)
    tensors = format.store("a.q", PackedWeight(words, whole, zeros), weight.scheme, torch.float16)
    assert torch.equal(format.read("a.q", tensors.__getitem__, weight.scheme).scales, whole)


@formats
def test_what_does_not_fit(format: Format) -> None:
    scheme = scheme_of(format)
    assert format.misfit(7, 128, scheme) is None and format.misfit(7, 128, scheme, transposed=True) is None
    for m, n, changes in ((8, 96, {}), (8, 128, {"bits": 3}), (8, 128, {"symmetric": False}), (8, 128, {"points": "int"})):
        assert format.misfit(m, n, dataclasses.replace(scheme, **changes)) is not None
    assert FORMATS["gptq"].misfit(64, 128, scheme).kind == "points"  # type: ignore[union-attr]


@formats
def test_the_config_is_the_one_that_transformers_saves(format: Format) -> None:
    names = ("lm_head", "model.layers.0.gate")
    job = Quantization(
        scheme=scheme_of(format), rules=(), packed={"a.q": scheme_of(format)}, left_out=("a.k",), others=names, head=None,
        dtype=torch.float16, meta={},
    )  # fmt: skip
    config = format.config(job)
    assert config["llm_int8_skip_modules"] == ["a.k", "lm_head", "model.layers.0.gate"]
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_compute_dtype"]) == (format.points, "float16")
    assert config["load_in_4bit"] and config["_load_in_4bit"] and config["bnb_4bit_use_double_quant"] and not config["load_in_8bit"]
    path = Path("m/config.json")
    assert read_schemes(path, config).scheme("a.q").points == format.points
    for key, value in (("load_in_4bit", False), ("bnb_4bit_use_double_quant", False), ("bnb_4bit_quant_type", "int4"), *_STORAGE):
        with pytest.raises(UnsupportedModelError, match=r"m: is already quantized \(bitsandbytes\); of that, bigq reads 4 bits"):
            read_schemes(path, {**config, key: value})
