"""The gptq format, against a decoder written from its definition with Python integers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bigq.errors import CheckpointError
from bigq.io.formats import FORMATS, PackedWeight, Quantization
from bigq.io.formats.base import fitting_group_size
from bigq.kernels.pack import unpack
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme, Rule, scheme_for

BITS = [2, 3, 4, 8]
VERSIONS = {1: FORMATS["gptq"], 2: FORMATS["gptq_v2"]}
M, N, GROUP = 64, 96, 32


def pack_linear(prefix: str, weight: QuantizedWeight, version: int) -> dict[str, Tensor]:
    return VERSIONS[version].store(prefix, PackedWeight.of(weight), weight.scheme, torch.float16)


def read_linear(prefix: str, get: Callable[[str], Tensor], bits: int, version: int) -> PackedWeight:
    return VERSIONS[version].read(prefix, get, QuantScheme(bits=bits))


def misfit(m: int, n: int, group_size: int) -> str | None:
    found = VERSIONS[1].misfit(m, n, QuantScheme(group_size=group_size))
    return None if found is None else found.said


def quantization_config(
    scheme: QuantScheme, rules: tuple[Rule, ...], version: int, left_out: tuple[str, ...], meta: dict[str, str]
) -> dict[str, Any]:
    job = Quantization(scheme=scheme, rules=rules, packed={}, left_out=left_out, others=("lm_head",), head=None, meta=meta)
    return VERSIONS[version].config(job)


def bit_fields(words: list[int], bits: int) -> list[int]:
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(stream >> (bits * i)) & (2**bits - 1) for i in range(32 * len(words) // bits)]


def decode(tensors: dict[str, Tensor], prefix: str, bits: int, version: int) -> tuple[list[list[int]], list[list[int]]]:
    """codes [N, K] and zeros [N, G] by the definition: codes packed along K, zeros along N, minus one in v1."""
    qweight, qzeros = tensors[f"{prefix}.qweight"], tensors[f"{prefix}.qzeros"]
    codes = [bit_fields(qweight[:, i].tolist(), bits) for i in range(qweight.shape[1])]
    by_group = [bit_fields(qzeros[g].tolist(), bits) for g in range(qzeros.shape[0])]
    zeros = [[field + (version == 1) for field in row] for row in zip(*by_group, strict=True)]
    return codes, zeros


def random_weight(bits: int, symmetric: bool = False, group_size: int = GROUP, m: int = M, n: int = N) -> QuantizedWeight:
    gen = torch.Generator().manual_seed(bits)
    groups = 1 if group_size == -1 else n // group_size
    top = 2**bits
    zeros = torch.full((m, groups), top // 2) if symmetric else torch.randint(1, top, (m, groups), generator=gen)
    return QuantizedWeight(
        codes=torch.randint(0, top, (m, n), generator=gen).to(torch.uint8),
        scales=torch.rand(m, groups, generator=gen).half(),
        zeros=zeros.to(torch.uint8),
        scheme=QuantScheme(bits=bits, group_size=group_size, symmetric=symmetric),
        loss=0.0,
        energy=1.0,
        damping=0.01,
    )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group_size", [-1, 32, 48])
@pytest.mark.parametrize("bits", BITS)
def test_the_definition_reads_back_what_was_packed(bits: int, group_size: int, version: int) -> None:
    weight = random_weight(bits, group_size=group_size)
    tensors = pack_linear("model.layers.0.q_proj", weight, version)
    groups = weight.scales.shape[1]
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "model.layers.0.q_proj.qweight": (torch.int32, (N * bits // 32, M)),
        "model.layers.0.q_proj.qzeros": (torch.int32, (groups, M * bits // 32)),
        "model.layers.0.q_proj.scales": (torch.float16, (groups, M)),
        "model.layers.0.q_proj.g_idx": (torch.int32, (N,)),
    }
    codes, zeros = decode(tensors, "model.layers.0.q_proj", bits, version)
    assert codes == weight.codes.tolist()
    assert zeros == weight.zeros.tolist()
    assert torch.equal(tensors["model.layers.0.q_proj.scales"], weight.scales.T)
    assert tensors["model.layers.0.q_proj.g_idx"].tolist() == [k * groups // N for k in range(N)]


@pytest.mark.parametrize(
    ("bits", "version", "expected"),
    [
        pytest.param(4, 1, 0x77777777),
        pytest.param(8, 1, 0x7F7F7F7F),
        pytest.param(2, 1, 0x55555555),
        pytest.param(4, 2, 0x88888888 - 2**32),
        pytest.param(8, 2, 0x80808080 - 2**32),
        pytest.param(2, 2, 0xAAAAAAAA - 2**32),
    ],
)
def test_symmetric_zeros_are_the_constants_that_readers_expect(bits: int, version: int, expected: int) -> None:
    tensors = pack_linear("x", random_weight(bits, symmetric=True), version)
    assert set(tensors["x.qzeros"].flatten().tolist()) == {expected}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", BITS)
def test_reading_inverts_packing(bits: int, symmetric: bool, version: int) -> None:
    weight = random_weight(bits, symmetric)
    tensors = pack_linear("x", weight, version)
    words, scales, zeros = read_linear("x", tensors.__getitem__, bits, version)
    codes = unpack(words, bits).T
    assert codes.dtype == zeros.dtype == torch.uint8 and scales.dtype == torch.float16
    assert torch.equal(codes, weight.codes) and torch.equal(scales, weight.scales) and torch.equal(zeros, weight.zeros)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_the_packed_tensors_own_their_memory(symmetric: bool) -> None:
    """The writer needs contiguous tensors, and none may keep a larger one alive."""
    for name, tensor in pack_linear("x", random_weight(4, symmetric), 1).items():
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_groups_in_act_order_are_refused() -> None:
    tensors = pack_linear("layer.q", random_weight(4), 1)
    tensors["layer.q.g_idx"] = tensors["layer.q.g_idx"].flip(0)
    with pytest.raises(CheckpointError, match=r"layer\.q: groups are not in natural order"):
        read_linear("layer.q", tensors.__getitem__, 4, 1)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("qweight", lambda t: t[:, :-1]),
        ("qweight", lambda t: t[:-1]),
        ("qzeros", lambda t: t[:, :-1]),
        ("qzeros", lambda t: t[:-1]),
        ("scales", lambda t: t[:, :-1]),
        ("scales", lambda t: t[:-1]),
        ("scales", lambda t: t[:0]),
        ("g_idx", lambda t: t[:-1]),
    ],
    ids=["qweight N", "qweight K", "qzeros N", "qzeros G", "scales N", "scales G", "no scales", "g_idx"],
)
def test_shapes_that_do_not_match_are_refused_by_name(part: str, damage: Callable[[Tensor], Tensor], bits: int) -> None:
    tensors = pack_linear("layer.q", random_weight(bits), 1)
    tensors[f"layer.q.{part}"] = damage(tensors[f"layer.q.{part}"]).contiguous()
    with pytest.raises(CheckpointError, match=r"layer\.q"):
        read_linear("layer.q", tensors.__getitem__, bits, 1)


@pytest.mark.parametrize(("m", "n", "group_size"), [(32, 32, -1), (64, 256, 128), (96, 160, 32), (32, 96, 48)])
def test_shapes_that_fit_are_accepted(m: int, n: int, group_size: int) -> None:
    assert misfit(m, n, group_size) is None


@pytest.mark.parametrize(("m", "n"), [(33, 64), (64, 48), (16, 64)])
def test_shapes_that_do_not_fill_words_are_refused(m: int, n: int) -> None:
    assert misfit(m, n, -1) == f"is {m} × {n}, but packed dimensions must be multiples of 32"


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    assert misfit(64, 160, 64) == "has 160 inputs, which group size 64 does not divide"


@pytest.mark.parametrize(
    ("inputs", "at_most", "size"),
    [((192,), 128, 64), ((4096,), 96, 64), ((192, 352), 128, 32), ((160,), 48, 32), ((192,), 8, 8), ((100,), 128, -1), ((64,), 256, 64)],
)
def test_the_advised_group_size_divides_all_inputs(inputs: tuple[int, ...], at_most: int, size: int) -> None:
    assert fitting_group_size(inputs, at_most) == size
    assert all(n % QuantScheme(group_size=size).group_width(n) == 0 for n in inputs)


def test_config_has_the_keys_of_readers() -> None:
    scheme = QuantScheme(bits=3, group_size=64, symmetric=False, order="activation", damping=0.02)
    config = quantization_config(scheme, (), 1, (), {"quantizer": "bigq:1"})
    assert config == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 3,
        "group_size": 64,
        "sym": False,
        "desc_act": False,
        "static_groups": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "damp_percent": 0.02,
        "dynamic": {},
        "meta": {"quantizer": "bigq:1"},
    }
    assert quantization_config(scheme, (), 2, (), {})["checkpoint_format"] == "gptq_v2"


def read_dynamic(dynamic: dict[str, dict[str, object]], name: str) -> dict[str, object] | None:
    """What GPTQModel and vLLM do: the first key whose regex matches; None for ``-:``, else its overrides."""
    for key, overrides in dynamic.items():
        if key.startswith("-:"):
            if re.match(key.removeprefix("-:"), name):
                return None
        elif re.match(key.removeprefix("+:"), name):
            return overrides
    return {}


def test_rules_become_dynamic_overrides_first_match_first() -> None:
    rules = (
        Rule(r".*\.down", {"bits": 8, "group_size": 32, "sym": False, "scales": "search", "damping": 0.1, "order": "activation"}),
        Rule(r".*layers\.0\.", None),
        Rule(r".*", {"group_size": 64}),
    )
    dynamic = quantization_config(QuantScheme(), rules, 1, ("layers.1.router",), {})["dynamic"]
    assert list(dynamic) == [r"-:^layers\.1\.router$", r"+:.*\.down", r"-:.*layers\.0\.", "+:.*"]
    assert dynamic[r"+:.*\.down"] == {"bits": 8, "group_size": 32, "sym": False}, "readers know only bits, group_size and sym"
    assert read_dynamic(dynamic, "layers.0.down") == {"bits": 8, "group_size": 32, "sym": False}
    assert read_dynamic(dynamic, "layers.0.up") is None
    assert read_dynamic(dynamic, "layers.1.router") is None
    assert read_dynamic(dynamic, "layers.1xrouter") == {"group_size": 64}
    assert read_dynamic(dynamic, "layers.1.router2") == {"group_size": 64}


def test_packed_linears_are_listed_if_others_are_skipped() -> None:
    """Without the list, readers that use optimum would treat all Linears as packed."""

    def named(rules: tuple[Rule, ...], left_out: tuple[str, ...]) -> object:
        packed = {name: QuantScheme() for name in ("layers.0.up", "layers.0.down")}
        job = Quantization(scheme=QuantScheme(), rules=rules, packed=packed, left_out=left_out, others=(), head=None, meta={})
        return VERSIONS[1].config(job).get("modules_in_block_to_quantize")

    assert named((), ()) is None and named((Rule("a", {"bits": 8}),), ()) is None
    assert named((Rule("a", None),), ()) == named((), ("layers.0.router",)) == [["layers.0.down", "layers.0.up"]]


def test_of_two_rules_with_one_pattern_the_applied_one_is_written() -> None:
    rules = (Rule("a", {"bits": 8}), Rule("a", {"bits": 2}))
    applied = scheme_for("a", QuantScheme(), rules)
    assert applied is not None and applied.bits == 8
    dynamic = quantization_config(QuantScheme(), rules, 1, (), {})["dynamic"]
    assert read_dynamic(dynamic, "a") == {"bits": 8}


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_gpu_packs_the_bytes_of_the_cpu(format: str, bits: int, symmetric: bool) -> None:
    weight, made = random_weight(bits, symmetric), FORMATS[format]
    moved = dataclasses.replace(weight, codes=weight.codes.cuda(), scales=weight.scales.cuda(), zeros=weight.zeros.cuda())
    on_cpu, on_gpu = (made.pack("linear", each, torch.float16) for each in (weight, moved))
    assert on_cpu.keys() == on_gpu.keys() and all(torch.equal(on_gpu[name].cpu(), stored) for name, stored in on_cpu.items())
    words, scales, zeros = made.read("linear", on_gpu.__getitem__, weight.scheme)
    assert torch.equal(unpack(words, bits).T.cpu(), weight.codes)
    assert torch.equal(scales.cpu().to(weight.scales.dtype), weight.scales) and torch.equal(zeros.cpu(), weight.zeros)
