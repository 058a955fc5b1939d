"""The formats w8a8-int8 and fp8: 8-bit numbers and a scale for each row, and the config that makes readers quantize inputs."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bigq.errors import CheckpointError, UnsupportedModelError, UsageError
from bigq.inspect.scan import scan_shard
from bigq.io.formats import FORMATS, PackedLinear, PackedWeight, Quantization, numbers_format, read_schemes
from bigq.io.formats.base import Misfit
from bigq.io.formats.w8a8 import EightBits
from bigq.kernels.grid_spec import BOOKS
from bigq.kernels.pack import unpack
from bigq.model.forward.quantized_inputs import quantize_inputs, rounded_to_e4m3, rounded_to_int8
from bigq.quantized_weight import QuantizedWeight

PATH = Path("model/config.json")
M, N = 32, 48


@pytest.fixture(params=["w8a8-int8", "fp8"])
def made(request: pytest.FixtureRequest) -> EightBits:
    found = FORMATS[request.param]
    assert isinstance(found, EightBits)
    return found


def random_weight(made: EightBits) -> QuantizedWeight:
    """With every code, and negative scales."""
    generator = torch.Generator().manual_seed(0)
    scheme = made.scheme()
    count = len(BOOKS[scheme.points]) or 256
    codes = torch.randperm(M * N, generator=generator).remainder_(count).to(torch.uint8).view(M, N)
    scales = (torch.randn(M, 1, generator=generator) / 8).bfloat16()
    zeros = torch.full((M, 1), made.zero, dtype=torch.uint8)
    return QuantizedWeight(codes=codes, scales=scales, zeros=zeros, scheme=scheme, loss=0.0, energy=1.0, damping=0.01)


def test_numbers_are_those_that_readers_multiply_with(made: EightBits) -> None:
    weight = random_weight(made)
    tensors = made.store("x", PackedWeight.of(weight), weight.scheme, torch.bfloat16)
    described = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    number = {"w8a8-int8": torch.int8, "fp8": torch.float8_e4m3fn}[made.name]
    assert described == {"x.weight_scale": (torch.bfloat16, (M, 1)), "x.weight": (number, (M, N))}
    linear = PackedLinear(bits=8, outputs=M, inputs=N, groups=1)
    assert list(made.layout("x", linear, True, torch.bfloat16).items()) == list(described.items())
    assert torch.equal(tensors["x.weight"].float() * tensors["x.weight_scale"].float(), weight.dequantize())
    extremes = {"w8a8-int8": [-128, 127], "fp8": [-448, 448]}[made.name]
    assert [float(x) for x in torch.aminmax(tensors["x.weight"].float())] == extremes
    words, scales, zeros = made.read("x", tensors.__getitem__, weight.scheme)
    assert torch.equal(unpack(words, 8).T, weight.codes) and torch.equal(scales, weight.scales) and torch.equal(zeros, weight.zeros)
    for name, tensor in tensors.items():
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_what_it_cannot_hold_is_not_stored(made: EightBits) -> None:
    words, scales, zeros = PackedWeight.of(random_weight(made))
    with pytest.raises(ValueError, match="symmetric codes in whole rows only"):
        made.store("x", PackedWeight(words, scales, zeros - 1), made.scheme(), torch.bfloat16)
    with pytest.raises(UsageError, match=r"not exact in torch\.bfloat16; quantize the original model with --scale-bits 8"):
        made.store("x", PackedWeight(words, scales.float() * 1.001, zeros), made.scheme(), torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"weight_scale": torch.zeros(M, 1)}, "tensor a.q.weight_scale holds a scale of 0"),
        ({"weight_scale": torch.full((M, 1), float("nan"))}, "tensor a.q.weight_scale holds NaN or Inf"),
        ({"weight_scale": torch.ones(M, 2)}, "tensor a.q.weight: its shape or dtype does not match that of its weight_scale"),
        ({"weight": torch.ones(M, N)}, "tensor a.q.weight: its shape or dtype does not match that of its weight_scale"),
    ],
)
def test_shards_are_scanned(changes: dict[str, Tensor], said: str | None, made: EightBits, tmp_path: Path) -> None:
    tensors = made.store("a.q", PackedWeight.of(random_weight(made)), made.scheme(), torch.float32)
    more = {"norm.weight": torch.ones(4), **{f"a.q.{name}": tensor for name, tensor in changes.items()}}
    save_file(tensors | more, tmp_path / "x.safetensors")
    found = scan_shard(tmp_path / "x.safetensors", made)
    if said is None:
        assert found.problems == () and found.linears == {"a.q": PackedLinear(bits=8, outputs=M, inputs=N, groups=1)}
    else:
        (problem,) = found.problems
        assert problem.startswith(said)


def test_numbers_of_fp8_that_are_nan_are_found(tmp_path: Path) -> None:
    made = FORMATS["fp8"]
    assert isinstance(made, EightBits)
    tensors = made.store("a.q", PackedWeight.of(random_weight(made)), made.scheme(), torch.float32)
    tensors["a.q.weight"].view(torch.uint8)[3, 4] = 0xFF
    save_file(tensors, tmp_path / "x.safetensors")
    (problem,) = scan_shard(tmp_path / "x.safetensors", made).problems
    assert problem.startswith("tensor a.q.weight holds NaN")


def config(made: EightBits) -> dict[str, Any]:
    scheme = made.scheme()
    packed = {"model.layers.0.mlp.up_proj": scheme}
    job = Quantization(scheme=scheme, rules=(), packed=packed, left_out=(), others=("lm_head",), head=None, meta={})
    return made.config(job)


def test_the_config_says_that_inputs_are_quantized(made: EightBits) -> None:
    found = config(made)
    kind, variant = {"w8a8-int8": ("int", "int-quantized"), "fp8": ("float", "float-quantized")}[made.name]
    (group,) = found["config_groups"].values()
    assert (found["quant_method"], found["format"], group["format"]) == ("compressed-tensors", variant, variant)
    assert found["ignore"] == ["lm_head"] and group["targets"] == ["Linear"]
    assert group["input_activations"] == {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    schemes = read_schemes(PATH, found)
    assert schemes.format is made and schemes.scheme("model.layers.0.mlp.up_proj") == made.scheme()


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("input_activations", {"dynamic": False}),
        ("input_activations", {"strategy": "tensor"}),
        ("input_activations", {"symmetric": False}),
        ("weights", {"strategy": "tensor"}),
        ("weights", {"type": "other"}),
    ],
    ids=str,
)
def test_other_ways_to_quantize_inputs_are_not_taken_for_it(part: str, change: dict[str, Any], made: EightBits) -> None:
    changed = copy.deepcopy(config(made))
    changed["config_groups"]["group_0"][part] |= change
    assert numbers_format(config(made)) is made and numbers_format(changed) is None
    with pytest.raises((CheckpointError, UnsupportedModelError)):
        read_schemes(PATH, changed)


@pytest.mark.parametrize(
    ("m", "scheme", "more", "kind"),
    [
        (32, {"bits": 4}, {}, "bits"),
        (32, {"group_size": 32}, {}, "group_size"),
        (40, {}, {}, "shape"),
        (32, {}, {"joined": True}, "joined"),
        (32, {}, {"transposed": True}, "transposed"),
    ],
)
def test_what_does_not_fit(m: int, scheme: dict[str, Any], more: dict[str, bool], kind: str, made: EightBits) -> None:
    found = made.misfit(m, 64, dataclasses.replace(made.scheme(), **scheme), **more)
    assert isinstance(found, Misfit) and found.kind == kind
    assert made.misfit(32, 64, made.scheme()) is None


def test_what_has_no_linear_to_round_the_inputs_of_is_refused() -> None:
    linear = torch.nn.Linear(4, 4)
    quantize_inputs(Path("m"), [linear], "int8")
    x = torch.tensor([[127.0, 0.5, 0.0, 1.6]])
    rounded = torch.tensor([[127.0, 0.0, 0.0, 2.0]])
    assert torch.equal(linear(x), torch.nn.functional.linear(rounded, linear.weight, linear.bias))
    with pytest.raises(UnsupportedModelError, match=r"^m: readers quantize the inputs of a Identity, which"):
        quantize_inputs(Path("m"), [torch.nn.Identity()], "e4m3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_rounded_for_each_token(dtype: torch.dtype) -> None:
    """To multiples of a 127th of the largest, ties to even; a token of zeros stays one."""
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 1] = 0
    x[1, 2, :3] = torch.tensor([127.0, 0.5, 1.5], dtype=dtype)
    x[1, 2, 3:] = 0
    got = rounded_to_int8(x)
    assert got.dtype == torch.float32 and bool((got[0, 1] == 0).all()) and got[1, 2, :3].tolist() == [127.0, 0.0, 2.0]
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    steps = (got / scale.clamp(min=1e-30)).round()
    assert torch.equal(steps * scale, got) and float(((got - x.float()).abs() - scale / 2).max()) < 1e-5
    assert int(steps.max()) <= 127 and int(steps.min()) >= -128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_rounded_to_floats_for_each_token(dtype: torch.dtype) -> None:
    """The largest one is 448 times the scale, and all have four significant bits."""
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 1] = 0
    got = rounded_to_e4m3(x)
    assert got.dtype == torch.float32 and bool((got[0, 1] == 0).all())
    numbers = got / (x.float().abs().amax(-1, keepdim=True) / 448).clamp(min=1e-30)
    nearest = numbers.to(torch.float8_e4m3fn).float()
    assert torch.allclose(numbers, nearest, rtol=1e-5) and float(nearest.abs().max()) == 448
    assert float(((got - x.float()).abs() / x.float().abs().clamp(min=1e-2)).max()) <= 2**-4
    linear = torch.nn.Linear(64, 8)
    quantize_inputs(Path("m"), [linear], "e4m3")
    expected = torch.nn.functional.linear(got, linear.weight, linear.bias)
    assert torch.equal(linear(x.float()), expected)
