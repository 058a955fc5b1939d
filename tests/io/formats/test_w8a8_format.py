"""The w8a8-int8 format: int8 numbers and a scale for each row, and the config that makes readers quantize inputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bigq.errors import CheckpointError, UnsupportedModelError, UsageError
from bigq.inspect.scan import scan_shard
from bigq.io.formats import FORMATS, PackedLinear, PackedWeight, Quantization, read_schemes
from bigq.io.formats.base import Misfit
from bigq.io.formats.w8a8 import is_w8a8
from bigq.kernels.pack import unpack
from bigq.model.forward.quantized_inputs import quantize_inputs, rounded_tokens
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme

W8A8 = FORMATS["w8a8-int8"]
PATH = Path("model/config.json")
SCHEME = QuantScheme(bits=8, group_size=-1)
M, N = 32, 48


def random_weight() -> QuantizedWeight:
    """With every code, and negative scales."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (M, N), generator=generator).to(torch.uint8)
    codes[0, :2] = torch.tensor([0, 255])
    scales = (torch.randn(M, 1, generator=generator) / 8).bfloat16()
    zeros = torch.full((M, 1), 128, dtype=torch.uint8)
    return QuantizedWeight(codes=codes, scales=scales, zeros=zeros, scheme=SCHEME, loss=0.0, energy=1.0, damping=0.01)


def test_numbers_are_those_that_readers_multiply_with() -> None:
    weight = random_weight()
    tensors = W8A8.store("x", PackedWeight.of(weight), SCHEME, torch.bfloat16)
    described = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    assert described == {"x.weight_scale": (torch.bfloat16, (M, 1)), "x.weight": (torch.int8, (M, N))}
    linear = PackedLinear(bits=8, outputs=M, inputs=N, groups=1)
    assert list(W8A8.layout("x", linear, True, torch.bfloat16).items()) == list(described.items())
    assert torch.equal(tensors["x.weight"].float() * tensors["x.weight_scale"].float(), weight.dequantize())
    assert tensors["x.weight"].min() == -128 and tensors["x.weight"].max() == 127
    words, scales, zeros = W8A8.read("x", tensors.__getitem__, SCHEME)
    assert torch.equal(unpack(words, 8).T, weight.codes) and torch.equal(scales, weight.scales) and torch.equal(zeros, weight.zeros)
    for name, tensor in tensors.items():
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_what_it_cannot_hold_is_not_stored() -> None:
    words, scales, zeros = PackedWeight.of(random_weight())
    with pytest.raises(ValueError, match="symmetric codes in whole rows only"):
        W8A8.store("x", PackedWeight(words, scales, zeros - 1), SCHEME, torch.bfloat16)
    with pytest.raises(UsageError, match=r"not exact in torch\.bfloat16; quantize the original model with --scale-bits 8"):
        W8A8.store("x", PackedWeight(words, scales.float() * 1.001, zeros), SCHEME, torch.bfloat16)


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
def test_shards_are_scanned(changes: dict[str, Tensor], said: str | None, tmp_path: Path) -> None:
    tensors = W8A8.store("a.q", PackedWeight.of(random_weight()), SCHEME, torch.float32)
    more = {"norm.weight": torch.ones(4), **{f"a.q.{name}": tensor for name, tensor in changes.items()}}
    save_file(tensors | more, tmp_path / "x.safetensors")
    found = scan_shard(tmp_path / "x.safetensors", W8A8)
    if said is None:
        assert found.problems == () and found.linears == {"a.q": PackedLinear(bits=8, outputs=M, inputs=N, groups=1)}
    else:
        (problem,) = found.problems
        assert problem.startswith(said)


def config() -> dict[str, Any]:
    packed = {"model.layers.0.mlp.up_proj": SCHEME}
    job = Quantization(scheme=SCHEME, rules=(), packed=packed, left_out=(), others=("lm_head",), head=None, meta={})
    return W8A8.config(job)


def test_the_config_says_that_inputs_are_quantized() -> None:
    found = config()
    (group,) = found["config_groups"].values()
    assert (found["quant_method"], found["format"], group["format"]) == ("compressed-tensors", "int-quantized", "int-quantized")
    assert found["ignore"] == ["lm_head"] and group["targets"] == ["Linear"]
    assert group["input_activations"] == {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    schemes = read_schemes(PATH, found)
    assert schemes.format is W8A8 and schemes.scheme("model.layers.0.mlp.up_proj") == SCHEME


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("input_activations", {"dynamic": False}),
        ("input_activations", {"strategy": "tensor"}),
        ("input_activations", {"symmetric": False}),
        ("weights", {"strategy": "tensor"}),
        ("weights", {"type": "float"}),
    ],
    ids=str,
)
def test_other_ways_to_quantize_inputs_are_not_taken_for_it(part: str, change: dict[str, Any]) -> None:
    changed = copy.deepcopy(config())
    changed["config_groups"]["group_0"][part] |= change
    assert is_w8a8(config()) and not is_w8a8(changed)
    with pytest.raises((CheckpointError, UnsupportedModelError)):
        read_schemes(PATH, changed)


@pytest.mark.parametrize(
    ("m", "scheme", "more", "kind"),
    [
        (32, {"bits": 4}, {}, "bits"),
        (32, {"group_size": 32}, {}, "group_size"),
        (40, {}, {}, "shape"),
        (32, {}, {"expert": True}, "joined"),
        (32, {}, {"transposed": True}, "transposed"),
    ],
)
def test_what_does_not_fit(m: int, scheme: dict[str, Any], more: dict[str, bool], kind: str) -> None:
    found = W8A8.misfit(m, 64, QuantScheme(**{"bits": 8, "group_size": -1, **scheme}), **more)
    assert isinstance(found, Misfit) and found.kind == kind
    assert W8A8.misfit(32, 64, SCHEME) is None


def test_what_has_no_linear_to_round_the_inputs_of_is_refused() -> None:
    linear = torch.nn.Linear(4, 4)
    quantize_inputs(Path("m"), [linear], experts=False)
    x = torch.tensor([[127.0, 0.5, 0.0, 1.6]])
    rounded = torch.tensor([[127.0, 0.0, 0.0, 2.0]])
    assert torch.equal(linear(x), torch.nn.functional.linear(rounded, linear.weight, linear.bias))
    with pytest.raises(UnsupportedModelError, match=r"^m: readers quantize the inputs of experts too"):
        quantize_inputs(Path("m"), [], experts=True)
    with pytest.raises(UnsupportedModelError, match=r"^m: readers quantize the inputs of a Identity, which"):
        quantize_inputs(Path("m"), [torch.nn.Identity()], experts=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_rounded_for_each_token(dtype: torch.dtype) -> None:
    """To multiples of a 127th of the largest, ties to even; a token of zeros stays one."""
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 1] = 0
    x[1, 2, :3] = torch.tensor([127.0, 0.5, 1.5], dtype=dtype)
    x[1, 2, 3:] = 0
    got = rounded_tokens(x)
    assert got.dtype == torch.float32 and bool((got[0, 1] == 0).all()) and got[1, 2, :3].tolist() == [127.0, 0.0, 2.0]
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    steps = (got / scale.clamp(min=1e-30)).round()
    assert torch.equal(steps * scale, got) and float(((got - x.float()).abs() - scale / 2).max()) < 1e-5
    assert int(steps.max()) <= 127 and int(steps.min()) >= -128
