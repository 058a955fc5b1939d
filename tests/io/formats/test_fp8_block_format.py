"""The format fp8-block: floats of 8 bits with a scale for each block of 128 × 128, and inputs that are rounded in groups."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bigq.errors import CheckpointError
from bigq.inspect.scan import scan_shard
from bigq.io.formats import FORMATS, PackedLinear, PackedWeight, Quantization, numbers_format, read_schemes
from bigq.io.formats.fp8_block import Fp8Block
from bigq.kernels.pack import unpack
from bigq.model.forward.quantized_inputs import quantize_inputs, rounded_in_groups
from bigq.quantized_weight import QuantizedWeight

PATH = Path("model/config.json")
M, N = 144, 256
MADE = FORMATS["fp8-block"]
assert isinstance(MADE, Fp8Block)
SCHEME = MADE.scheme()


def random_weight(m: int = M) -> tuple[QuantizedWeight, Tensor]:
    """With every code; and the scales of its blocks."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randperm(m * N, generator=generator).remainder_(253).to(torch.uint8).view(m, N)
    blocks = (torch.rand(-(-m // 128), 2, generator=generator) * 1e-3).bfloat16().float()
    scales = blocks.repeat_interleave(128, 0)[:m]
    zeros = torch.zeros(m, 2, dtype=torch.uint8)
    return QuantizedWeight(codes=codes, scales=scales, zeros=zeros, scheme=SCHEME, loss=0.0, energy=1.0, damping=0.01), blocks


@pytest.mark.parametrize("m", [16, 128, M, 384])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_blocks_are_stored_as_readers_multiply_them(m: int, dtype: torch.dtype) -> None:
    """Whatever the dtype of the model, scales are fp32."""
    weight, blocks = random_weight(m)
    tensors = MADE.store("x", PackedWeight.of(weight), SCHEME, dtype)
    assert {name: t.dtype for name, t in tensors.items()} == {"x.weight_scale": torch.float32, "x.weight": torch.float8_e4m3fn}
    assert torch.equal(tensors["x.weight_scale"], blocks)
    for i, row in enumerate(tensors["x.weight"].float()):
        for g in range(2):
            part = slice(128 * g, 128 * g + 128)
            assert torch.equal(row[part] * blocks[i // 128, g], weight.dequantize()[i, part])
    linear = PackedLinear(bits=8, outputs=m, inputs=N, groups=2)
    described = [(name, (t.dtype, tuple(t.shape))) for name, t in tensors.items()]
    assert list(MADE.layout("x", linear, True, dtype).items()) == described
    words, scales, zeros = MADE.read("x", tensors.__getitem__, SCHEME)
    assert torch.equal(unpack(words, 8).T, weight.codes) and torch.equal(scales, weight.scales) and not zeros.any()
    for name, tensor in tensors.items():
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_rows_with_scales_of_their_own_are_not_stored() -> None:
    weight, _ = random_weight()
    weight.scales[3, 1] *= 2
    with pytest.raises(ValueError, match="x: fp8-block holds one scale for 128 rows only"):
        MADE.store("x", PackedWeight.of(weight), SCHEME, torch.bfloat16)


NO_MATCH = "tensor a.q.weight: its shape or dtype does not match that of its weight_scale"
DAMAGES: dict[str, tuple[dict[str, Tensor], str | None]] = {
    "none": ({}, None),
    "of another program": ({"weight_scale": torch.ones(2, 2).bfloat16()}, None),
    "zero": ({"weight_scale": torch.zeros(2, 2)}, "tensor a.q.weight_scale holds a scale of 0"),
    "nan scale": ({"weight_scale": torch.full((2, 2), torch.nan)}, "tensor a.q.weight_scale holds NaN or Inf"),
    "nan": ({"weight": torch.full((M, N), torch.nan).to(torch.float8_e4m3fn)}, "tensor a.q.weight holds NaN"),
    "of rows": ({"weight_scale": torch.ones(M, 2)}, NO_MATCH),
    "too few": ({"weight_scale": torch.ones(1, 2)}, NO_MATCH),
    "dtype": ({"weight_scale": torch.ones(2, 2).to(torch.float8_e4m3fn)}, NO_MATCH),
    "numbers": ({"weight": torch.ones(M, N)}, NO_MATCH),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_shards_are_scanned(damage: str, tmp_path: Path) -> None:
    changes, said = DAMAGES[damage]
    tensors = MADE.store("a.q", PackedWeight.of(random_weight()[0]), SCHEME, torch.float32)
    more = {"norm.weight": torch.ones(4), **{f"a.q.{name}": tensor for name, tensor in changes.items()}}
    save_file(tensors | more, tmp_path / "x.safetensors")
    found = scan_shard(tmp_path / "x.safetensors", MADE)
    if said is None:
        assert found.problems == () and found.linears == {"a.q": PackedLinear(bits=8, outputs=M, inputs=N, groups=2)}
    else:
        (problem,) = found.problems
        assert problem.startswith(said)


def test_tensors_of_other_shapes_are_not_read() -> None:
    tensors = MADE.store("x", PackedWeight.of(random_weight()[0]), SCHEME, torch.float32)
    tensors["x.weight_scale"] = torch.ones(M, 2)
    with pytest.raises(CheckpointError, match="x: the shapes of weight and weight_scale do not match"):
        MADE.read("x", tensors.__getitem__, SCHEME)


def config() -> dict[str, Any]:
    packed = {"model.layers.0.mlp.up_proj": SCHEME}
    return MADE.config(Quantization(scheme=SCHEME, rules=(), packed=packed, left_out=(), others=("lm_head",), head=None, meta={}))


def test_the_config_names_blocks_and_groups_of_inputs() -> None:
    found = config()
    (group,) = found["config_groups"].values()
    assert (found["quant_method"], found["format"], group["format"]) == ("compressed-tensors", "float-quantized", "float-quantized")
    assert group["weights"] == {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "block",
        "block_structure": [128, 128],
        "group_size": None,
        "dynamic": False,
        "actorder": None,
    }
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": True}
    assert group["input_activations"] == inputs and group["targets"] == ["Linear"] and found["ignore"] == ["lm_head"]
    schemes = read_schemes(PATH, found)
    assert schemes.format is MADE and schemes.scheme("model.layers.0.mlp.up_proj") == SCHEME


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("weights", {"block_structure": [64, 128]}),
        ("weights", {"strategy": "channel"}),
        ("input_activations", {"group_size": 64}),
        ("input_activations", {"strategy": "token"}),
        ("input_activations", {"dynamic": False}),
    ],
    ids=str,
)
def test_other_blocks_are_not_taken_for_it(part: str, change: dict[str, Any]) -> None:
    changed = copy.deepcopy(config())
    changed["config_groups"]["group_0"][part] |= change
    assert numbers_format(changed) is None


@pytest.mark.parametrize(
    ("m", "n", "changes", "kind"),
    [
        (128, 256, {"bits": 4}, "bits"),
        (128, 256, {"group_size": -1}, "group_size"),
        (128, 192, {}, "shape"),
        (136, 256, {}, "shape"),
        (144, 256, {"points": "int"}, "points"),
    ],
)
def test_what_does_not_fit(m: int, n: int, changes: dict[str, Any], kind: str) -> None:
    found = MADE.misfit(m, n, dataclasses.replace(SCHEME, **changes))
    assert found is not None and found.kind == kind
    assert MADE.misfit(144, 256, SCHEME) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_rounded_for_each_token_and_group(dtype: torch.dtype) -> None:
    """Each group of 128 to the nearest numbers of E4M3, in units of a 448th of its largest; a group of zeros stays one."""
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[..., 128:] *= 100
    x[0, 1, :128] = 0
    got = rounded_in_groups(x)
    assert got.dtype == torch.float32 and got.shape == x.shape and not got[0, 1, :128].any()
    for part in (slice(0, 128), slice(128, 256)):
        group = x[..., part].float()
        scale = (group.abs().amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
        assert torch.equal((group / scale).to(torch.float8_e4m3fn).float() * scale, got[..., part])
        assert float(((got[..., part] - group).abs() / scale).max()) <= 16 * (1 + 1e-5)  # half of the step below 448
    linear = torch.nn.Linear(256, 8)
    quantize_inputs(Path("m"), [linear], "e4m3-groups")
    assert torch.equal(linear(x.float()), torch.nn.functional.linear(rounded_in_groups(x.float()), linear.weight, linear.bias))
