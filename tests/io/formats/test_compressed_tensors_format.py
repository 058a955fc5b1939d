"""The compressed-tensors format, against a decoder written from its definition with Python integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bigq.errors import CheckpointError, UnsupportedModelError, UsageError
from bigq.io.formats import FORMATS, Format, PackedLinear, PackedWeight, Quantization, read_schemes
from bigq.io.index import TensorInfo, read_header
from bigq.kernels.pack import unpack
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme

BITS = [2, 3, 4, 8]
M, N = 64, 96
FORMAT = FORMATS["compressed-tensors"]


def bit_fields(words: list[int], bits: int) -> list[int]:
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(stream >> (bits * i)) & (2**bits - 1) for i in range(32 * len(words) // bits)]


def random_weight(bits: int, symmetric: bool, group_size: int = 32, m: int = M, n: int = N) -> QuantizedWeight:
    gen = torch.Generator().manual_seed(bits)
    groups = 1 if group_size == -1 else n // group_size
    top = 2**bits
    zeros = torch.full((m, groups), top // 2) if symmetric else torch.randint(0, top, (m, groups), generator=gen)
    return QuantizedWeight(
        codes=torch.randint(0, top, (m, n), generator=gen).to(torch.uint8),
        scales=(torch.rand(m, groups, generator=gen) + 0.01).bfloat16().half(),
        zeros=zeros.to(torch.uint8),
        scheme=QuantScheme(bits=bits, group_size=group_size, symmetric=symmetric),
        loss=0.0,
        energy=1.0,
        damping=0.01,
    )


def store(weight: QuantizedWeight, dtype: torch.dtype = torch.bfloat16, prefix: str = "a.q") -> dict[str, Tensor]:
    return FORMAT.store(prefix, PackedWeight.of(weight), weight.scheme, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [-1, 32, 48])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", BITS)
def test_the_definition_reads_back_what_was_packed(bits: int, symmetric: bool, group_size: int, dtype: torch.dtype) -> None:
    weight = random_weight(bits, symmetric, group_size)
    tensors = store(weight, dtype)
    groups = weight.scales.shape[1]
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "a.q.weight_packed": (torch.int32, (M, N * bits // 32)),
        "a.q.weight_scale": (dtype, (M, groups)),
        "a.q.weight_shape": (torch.int64, (2,)),
    }
    if not symmetric:
        expected["a.q.weight_zero_point"] = (torch.int32, (M * bits // 32, groups))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == expected
    assert [bit_fields(row, bits) for row in tensors["a.q.weight_packed"].tolist()] == weight.codes.tolist()
    assert torch.equal(tensors["a.q.weight_scale"].half(), weight.scales)
    assert tensors["a.q.weight_shape"].tolist() == [M, N]
    if not symmetric:
        columns = tensors["a.q.weight_zero_point"].T.tolist()
        assert [bit_fields(column, bits) for column in columns] == weight.zeros.T.tolist()


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", BITS)
def test_reading_inverts_packing(bits: int, symmetric: bool) -> None:
    weight = random_weight(bits, symmetric)
    words, scales, zeros = FORMAT.read("a.q", store(weight).__getitem__, weight.scheme)
    assert torch.equal(unpack(words, bits).T, weight.codes)
    assert torch.equal(scales.half(), weight.scales) and torch.equal(zeros, weight.zeros)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", BITS)
def test_geometry_from_shapes(bits: int, symmetric: bool, tmp_path: Path) -> None:
    save_file(store(random_weight(bits, symmetric)), tmp_path / "x.safetensors")
    tensors, _ = read_header(tmp_path / "x.safetensors")
    assert FORMAT.geometry("a.q", tensors) == PackedLinear(bits=bits, outputs=M, inputs=N, groups=3)


@pytest.mark.parametrize("m", [33, 50, 67])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("bits", "n", "group_size"), [(2, 48, 16), (3, 96, -1), (4, 40, 8), (4, 200, -1), (8, 36, -1), (8, 40, 8)])
def test_sizes_that_are_no_multiples_of_32(bits: int, n: int, group_size: int, symmetric: bool, m: int, tmp_path: Path) -> None:
    """Any number of outputs, and as many inputs as fill whole words: stored, read and checked; the last zero points share a word."""
    weight = random_weight(bits, symmetric, group_size, m, n)
    assert FORMAT.misfit(m, n, weight.scheme) is None
    tensors = store(weight)
    linear = PackedLinear(bits=bits, outputs=m, inputs=n, groups=weight.scales.shape[1])
    layout = FORMAT.layout("a.q", linear, symmetric, torch.bfloat16)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == layout
    assert [bit_fields(row, bits) for row in tensors["a.q.weight_packed"].tolist()] == weight.codes.tolist()
    words, _, zeros = FORMAT.read("a.q", tensors.__getitem__, weight.scheme)
    assert torch.equal(unpack(words, bits).T, weight.codes) and torch.equal(zeros, weight.zeros)
    if not symmetric:
        stored = tensors["a.q.weight_zero_point"]
        assert tuple(stored.shape) == (-(-m * bits // 32), linear.groups)
        assert [bit_fields(column, bits)[:m] for column in stored.T.tolist()] == weight.zeros.T.tolist()
        flat, found = stored.flatten(), []
        step = FORMAT.values_per_check("weight_zero_point", read_header_of(tensors, tmp_path)["a.q.weight_zero_point"])
        for lo in range(0, flat.numel(), step * linear.groups):
            piece = flat[lo : lo + step * linear.groups]
            wrong, extremes = FORMAT.check_values("weight_zero_point", linear, piece, lo)
            assert wrong is None and extremes is not None
            found.append(extremes)
        weight.zeros[:] = 3  # padding, which is 0, is no zero point
        assert (min(low for low, _ in found), max(high for _, high in found)) == tuple(map(int, torch.aminmax(zeros)))
        flat = store(weight)["a.q.weight_zero_point"].flatten()
        assert FORMAT.check_values("weight_zero_point", linear, flat, 0) == (None, (3, 3))
    save_file(tensors, tmp_path / "x.safetensors")
    assert FORMAT.geometry("a.q", read_header(tmp_path / "x.safetensors")[0]) == linear


def read_header_of(tensors: dict[str, Tensor], folder: Path) -> dict[str, TensorInfo]:
    save_file(tensors, folder / "h.safetensors")
    return read_header(folder / "h.safetensors")[0]


@pytest.mark.parametrize(("bits", "n"), [(2, 40), (3, 48), (4, 36), (8, 33)])
def test_inputs_that_fill_no_whole_words_are_refused(bits: int, n: int) -> None:
    found = FORMAT.misfit(64, n, QuantScheme(bits=bits, group_size=-1))
    assert found is not None and found.kind == "shape" and f"the inputs of Linears packed at {bits} bits must be multiples of" in found.said


WRONG: list[tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = [
    ("a scale's column is missing", lambda t: {**t, "a.q.weight_scale": t["a.q.weight_scale"][:-1].clone()}),
    ("two groups of three inputs each too many", lambda t: {**t, "a.q.weight_scale": torch.ones(M, 5, dtype=torch.bfloat16)}),
    ("shape is another", lambda t: {**t, "a.q.weight_shape": torch.tensor([M, N + 1])}),
    ("shape is turned round", lambda t: {**t, "a.q.weight_shape": torch.tensor([N, M])}),
    ("shape says nothing", lambda t: {**t, "a.q.weight_shape": torch.tensor([M, 0])}),
    ("words are missing", lambda t: {**t, "a.q.weight_packed": t["a.q.weight_packed"][:, :-1].clone()}),
    ("words are one row", lambda t: {**t, "a.q.weight_packed": t["a.q.weight_packed"].reshape(-1)}),
    ("zeros are too few", lambda t: {**t, "a.q.weight_zero_point": t["a.q.weight_zero_point"][:-1].clone()}),
]


@pytest.mark.parametrize("spoil", [spoil for _, spoil in WRONG], ids=[name for name, _ in WRONG])
def test_tensors_that_do_not_match_are_refused(spoil: Callable[..., Any], tmp_path: Path) -> None:
    weight = random_weight(4, symmetric=False)
    tensors = spoil(store(weight))
    with pytest.raises(CheckpointError, match=r"a\.q"):
        FORMAT.read("a.q", tensors.__getitem__, weight.scheme)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.q"):
        FORMAT.geometry("a.q", read_header(tmp_path / "x.safetensors")[0])


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_shape"])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    tensors = store(random_weight(4, symmetric=True))
    del tensors[f"a.q.{name}"]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=rf"a\.q\.{name} is missing"):
        FORMAT.geometry("a.q", read_header(tmp_path / "x.safetensors")[0])


def test_scales_that_the_type_of_the_model_cannot_hold_are_refused() -> None:
    weight = random_weight(4, symmetric=True)
    weight.scales[3, 1] = 1 + 2**-10  # exact in fp16, not in bf16
    with pytest.raises(UsageError, match=r"a\.q: its scales are not exact in torch.bfloat16.*--scale-bits 8"):
        store(weight)
    store(weight, torch.float16)


def test_linears_stored_transposed_are_refused() -> None:
    found = FORMAT.misfit(M, N, QuantScheme(group_size=32), transposed=True)
    assert found is not None and found.kind == "transposed" and "is stored transposed" in found.said
    assert FORMATS["gptq"].misfit(M, N, QuantScheme(group_size=32), transposed=True) is None


def config_of(packed: dict[str, QuantScheme], others: tuple[str, ...] = ("lm_head",), usual: QuantScheme | None = None) -> dict[str, Any]:
    usual = usual or QuantScheme()
    return FORMAT.config(
        Quantization(scheme=usual, rules=(), packed=packed, left_out=(), others=others, head=None, meta={"quantizer": "x"})
    )


def test_config_has_the_keys_of_readers() -> None:
    scheme = QuantScheme(bits=3, group_size=64, symmetric=False, order="activation")
    assert config_of({"m.0.q": scheme, "m.0.k": scheme}, ("z", "lm_head"), scheme) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 3,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "group",
                    "group_size": 64,
                    "dynamic": False,
                    "actorder": None,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head", "z"],
        "kv_cache_scheme": None,
    }


def test_every_linear_reads_back_with_its_own_scheme() -> None:
    usual, other, channel = QuantScheme(), QuantScheme(bits=8, group_size=32), QuantScheme(bits=2, group_size=-1, symmetric=False)
    packed = {"m.0.q": usual, "m.0.k": other, "m.1.q": usual, "m.1.k": channel, "m.2.k": other, "m.2.q": usual}
    schemes = read_schemes(Path("config.json"), config_of(packed, ("lm_head", "m.2.o")))
    assert {name: schemes.scheme(name) for name in packed} == packed
    for name in ("lm_head", "m.2.o"):
        with pytest.raises(CheckpointError, match=rf"{name} is packed, but"):
            schemes.scheme(name)


def test_linears_with_different_schemes_are_named() -> None:
    """Otherwise vLLM would match a fused Linear, whose name is not listed, with a group for the class."""
    a, b = QuantScheme(bits=8), QuantScheme(bits=2)
    config = config_of({"x": a, "y": b, "z": b}, usual=QuantScheme(bits=3))
    assert [group["targets"] for group in config["config_groups"].values()] == [["x"], ["y", "z"]]
    schemes = read_schemes(Path("config.json"), config)
    assert [schemes.scheme(name).bits for name in "xyz"] == [8, 2, 2]


def test_configs_of_other_writers_are_read() -> None:
    config = config_of({"m.0.q": QuantScheme()})
    config["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*"]
    config |= {"version": "0.20.0", "global_compression_ratio": None, "ignore": ["re:.*head"]}
    schemes = read_schemes(Path("config.json"), config)
    assert schemes.scheme("m.0.self_attn.q").bits == 4
    with pytest.raises(CheckpointError, match="no group"):
        schemes.scheme("m.0.mlp.up")
    with pytest.raises(CheckpointError, match="ignores it"):
        schemes.scheme("lm_head")


def changed(**weights: Any) -> dict[str, Any]:
    config = config_of({"q": QuantScheme()})
    config["config_groups"]["group_0"]["weights"] |= weights
    return config


@pytest.mark.parametrize(
    "config",
    [
        config_of({"q": QuantScheme()}) | {"format": "float-quantized"},
        config_of({"q": QuantScheme()}) | {"config_groups": []},
        config_of({"q": QuantScheme()}) | {"config_groups": {}},
        config_of({"q": QuantScheme()}) | {"config_groups": {"group_0": ["Linear"]}},
        config_of({"q": QuantScheme()}) | {"ignore": "lm_head"},
        config_of({"q": QuantScheme()}) | {"ignore": [3]},
        config_of({"q": QuantScheme()}) | {"ignore": ["re:("]},
        config_of({"q": QuantScheme()}) | {"ignore": ["re:(a+)+b"]},
        changed(num_bits=5),
        changed(num_bits=True),
        changed(type="float"),
        changed(strategy="tensor"),
        changed(group_size=None),
        changed(group_size=7),
        changed(symmetric="yes"),
        changed(dynamic=True),
        changed(actorder="by size"),
        changed(actorder=3),
        config_of({"q": QuantScheme()}) | {"quantization_status": "calibration"},
        config_of({"q": QuantScheme()}) | {"quantization_status": ["compressed"]},
        config_of({"q": QuantScheme()}) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        config_of({"q": QuantScheme()}) | {"sparsity_config": "dense"},
        config_of({"q": QuantScheme()}) | {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
        config_of({"q": QuantScheme()}) | {"transform_config": "hadamard"},
    ],
)
def test_an_invalid_quantization_config_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="quantization_config") as caught:
        read_schemes(Path("config.json"), config)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("input_activations", {"num_bits": 8}, "activations"),
        ("output_activations", {"num_bits": 8}, "activations"),
        ("format", "nvfp4-pack-quantized", "the format of a group"),
    ],
)
def test_groups_with_more_than_weights_are_refused(key: str, value: Any, said: str) -> None:
    config = config_of({"q": QuantScheme()})
    config["config_groups"]["group_0"][key] = value
    with pytest.raises(CheckpointError, match=said):
        read_schemes(Path("config.json"), config)


@pytest.mark.parametrize(
    "more",
    [
        {"quantization_status": "frozen"},
        {"sparsity_config": {"format": "dense", "targets": []}, "transform_config": {}},
        {"sparsity_config": {}, "transform_config": {"config_groups": {}}},
        {"kv_cache_scheme": {"num_bits": 8, "type": "float"}},
    ],
)
def test_entries_that_do_not_concern_weights_are_accepted(more: dict[str, Any]) -> None:
    config = config_of({"q": QuantScheme()}) | more
    config["config_groups"]["group_0"]["format"] = "pack-quantized"
    assert read_schemes(Path("config.json"), config).scheme("q") == QuantScheme()
    del config["quantization_status"]
    assert read_schemes(Path("config.json"), config).scheme("q") == QuantScheme()


NATURAL = torch.arange(N, dtype=torch.int32) // 32


@pytest.mark.parametrize("said", [None, False, "static", "weight", "Weight", True, "group", "dynamic", "GROUP"])
def test_groups_are_in_natural_order_or_refused(said: Any, tmp_path: Path) -> None:
    format = read_schemes(Path("config.json"), changed(actorder=said)).format
    assert format.name == "compressed-tensors"
    tensors = store(random_weight(4, symmetric=True))
    orders = {
        "natural": NATURAL,
        "of int64": NATURAL.long(),
        "turned round": NATURAL.flip(0),
        "short": NATURAL[1:],
        "unset": NATURAL * 0 - 1,
    }
    for name, order in {**orders, "none": None}.items():
        numbers = {} if order is None else {"a.q.weight_g_idx": order.contiguous()}
        save_file({**tensors, **numbers}, tmp_path / "x.safetensors")
        header, _ = read_header(tmp_path / "x.safetensors")
        numbered = said is True or str(said).lower() in ("group", "dynamic")
        if name in ("natural", "of int64") or (order is None and not numbered):
            assert format.geometry("a.q", header).groups == 3
            continue
        with pytest.raises(UnsupportedModelError, match=r"tensor a\.q\.weight_g_idx.*only natural order; use"):
            format.geometry("a.q", header)


def test_zero_points_of_asymmetric_weights_are_not_omitted() -> None:
    weight = random_weight(4, symmetric=False)
    with pytest.raises(ValueError, match=r"a\.q: a zero point is not 8"):
        FORMAT.store("a.q", PackedWeight.of(weight), QuantScheme(group_size=32), torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    ("format", "bits"), [(made, bits) for made in FORMATS.values() if made.points == "int" for bits in made.bits], ids=str
)
def test_layouts_equal_those_of_stored_tensors(format: Format, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    if format.fixed.get("symmetric") and not symmetric:
        return
    weight = random_weight(bits, symmetric)
    weight.zeros.clamp_(min=1)
    groups = 3
    if format.group_sizes == (-1,):
        weight, groups = dataclasses.replace(weight, scales=weight.scales[:, :1], zeros=weight.zeros[:, :1]), 1
    stored = format.store("a.q", PackedWeight.of(weight), weight.scheme, dtype)
    linear = PackedLinear(bits=bits, outputs=M, inputs=N, groups=groups)
    assert list(format.layout("a.q", linear, symmetric, dtype).items()) == [(n, (t.dtype, tuple(t.shape))) for n, t in stored.items()]
