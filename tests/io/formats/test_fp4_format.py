"""The formats nvfp4 and mxfp4: 4-bit floats in small groups, with scales in 8 bits."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bigq.errors import CheckpointError, UsageError
from bigq.inspect.scan import scan_shard
from bigq.io.formats import FORMATS, PackedLinear, PackedWeight, Quantization, numbers_format, read_schemes
from bigq.io.formats.fp4 import Fp4
from bigq.kernels.decode import decode_scaled, exponents
from bigq.kernels.pack import unpack
from bigq.quantized_weight import QuantizedWeight

M, N = 24, 64


@pytest.fixture(params=["nvfp4", "mxfp4"])
def made(request: pytest.FixtureRequest) -> Fp4:
    found = FORMATS[request.param]
    assert isinstance(found, Fp4)
    return found


def random_weight(made: Fp4) -> QuantizedWeight:
    """With every code, and scales from the smallest to the largest."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (M, N), generator=generator).to(torch.uint8)
    scales = torch.exp2(torch.linspace(-14, 0.5, M * N // made.group)).view(M, -1)
    if made.name == "nvfp4":
        scales = (scales * 256).to(torch.float8_e4m3fn).float() / 256
        scales[0, :2] = torch.tensor([2.0**-17, 1.75])
    else:
        scales = torch.exp2(scales.log2().round())
    zeros = torch.zeros(M, N // made.group, dtype=torch.uint8)
    return QuantizedWeight(codes=codes, scales=scales.half(), zeros=zeros, scheme=made.scheme(), loss=0.0, energy=1.0, damping=0.01)


def stored(made: Fp4, prefix: str = "x") -> dict[str, Tensor]:
    weight = random_weight(made)
    return made.store(prefix, PackedWeight.of(weight), weight.scheme, torch.bfloat16)


def test_bytes_are_those_that_readers_decode(made: Fp4) -> None:
    weight, tensors = random_weight(made), stored(made)
    described = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    kinds = {"weight_packed": (torch.uint8, (M, N // 2)), "weight_scale": (made.scale_dtype, (M, N // made.group))}
    if made.name == "nvfp4":
        kinds["weight_global_scale"] = torch.float32, (1,)
    assert described == {f"x.{name}": kind for name, kind in kinds.items()}
    linear = PackedLinear(bits=4, outputs=M, inputs=N, groups=N // made.group)
    assert list(made.layout("x", linear, True, torch.bfloat16).items()) == list(described.items())
    scales = exponents(tensors["x.weight_scale"]) / tensors.get("x.weight_global_scale", torch.ones(1))
    decoded = decode_scaled(tensors["x.weight_packed"], scales, (1, made.group), torch.float32)
    assert torch.equal(decoded, weight.dequantize())
    assert decoded.bfloat16().float().equal(decoded)  # exact in bf16
    words, found, zeros = made.read("x", tensors.__getitem__, weight.scheme)
    assert torch.equal(unpack(words, 4).T, weight.codes) and torch.equal(found, weight.scales.float()) and not zeros.any()
    for name, tensor in tensors.items():
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("factor", [1.01, 3.0e5, 1e-3])
def test_scales_that_are_not_exact_are_not_stored(factor: float, made: Fp4) -> None:
    words, scales, zeros = PackedWeight.of(random_weight(made))
    if made.name == "mxfp4" and factor != 1.01:
        factor *= 1.1  # E8M0 holds powers of two of any size
    with pytest.raises(UsageError, match=rf"^x: its scales are not exact in {made.name}; quantize the original model with --format"):
        made.store("x", PackedWeight(words, scales.float() * factor, zeros), made.scheme(), torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"weight_scale": torch.ones(M, 3)}, "tensor a.q.weight_packed: its shape or dtype does not match those of the tensors beside it"),
        ({"weight_packed": torch.ones(M, N)}, "tensor a.q.weight_packed: its shape or dtype does not match those of the tensors beside it"),
    ],
)
def test_shards_are_scanned(changes: dict[str, Tensor], said: str | None, made: Fp4, tmp_path: Path) -> None:
    more = {"norm.weight": torch.ones(4), **{f"a.q.{name}": tensor for name, tensor in changes.items()}}
    save_file(stored(made, "a.q") | more, tmp_path / "x.safetensors")
    found = scan_shard(tmp_path / "x.safetensors", made)
    if said is None:
        expected = PackedLinear(bits=4, outputs=M, inputs=N, groups=N // made.group)
        assert found.problems == () and found.linears == {"a.q": expected}
    else:
        assert found.problems[0].startswith(said)


def test_scales_that_are_nan_are_found(made: Fp4, tmp_path: Path) -> None:
    tensors = stored(made, "a.q")
    tensors["a.q.weight_scale"].view(torch.uint8)[2, 1] = {"nvfp4": 0x7F, "mxfp4": 0xFF}[made.name]
    save_file(tensors, tmp_path / "x.safetensors")
    (problem,) = scan_shard(tmp_path / "x.safetensors", made).problems
    assert problem.startswith("tensor a.q.weight_scale holds NaN")
    assert math.isnan(float(made.read("a.q", tensors.__getitem__, made.scheme()).scales[2, 1]))


def test_tensors_of_other_shapes_are_not_read(made: Fp4) -> None:
    tensors = stored(made)
    tensors["x.weight_scale"] = tensors["x.weight_scale"][:, 1:]
    with pytest.raises(CheckpointError, match=r"^x: the shapes of weight_packed and its scales do not match"):
        made.read("x", tensors.__getitem__, made.scheme())


def config(made: Fp4) -> dict[str, Any]:
    scheme = made.scheme()
    packed = {"model.layers.0.mlp.up_proj": scheme}
    job = Quantization(scheme=scheme, rules=(), packed=packed, left_out=(), others=("lm_head",), head=None, meta={})
    return made.config(job)


def test_the_config_is_read_again(made: Fp4) -> None:
    found = config(made)
    (group,) = found["config_groups"].values()
    assert (found["quant_method"], found["format"], group["format"]) == ("compressed-tensors", made.variant, made.variant)
    assert group["input_activations"] is None and group["weights"]["group_size"] == made.group
    schemes = read_schemes(Path("m/config.json"), found)
    assert schemes.format is made and schemes.scheme("model.layers.0.mlp.up_proj") == made.scheme()


@pytest.mark.parametrize(("part", "value"), [("input_activations", {"num_bits": 4}), ("output_activations", {"num_bits": 8})])
def test_a_config_that_quantizes_more_than_weights_is_not_taken_for_it(part: str, value: dict[str, int], made: Fp4) -> None:
    changed = copy.deepcopy(config(made))
    changed["config_groups"]["group_0"][part] = value
    assert numbers_format(changed) is None and numbers_format(config(made)) is made


def test_what_does_not_fit(made: Fp4) -> None:
    for n, more in ((N + made.group // 2, {}), (N, {"transposed": True}), (N, {"joined": True})):
        assert made.misfit(M, n, made.scheme(), **more) is not None
    assert made.misfit(M, N, dataclasses.replace(made.scheme(), points="nf4")) is not None
    assert made.misfit(1, N, made.scheme(), expert=True) is None
