"""One reading of a shard: its hash, which Linears are packed in it, and values that no reader could use."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bigq.errors import CheckpointError
from bigq.inspect import scan as scan_module
from bigq.inspect.scan import Scan, scan_shard
from bigq.io.formats import FORMATS, PackedLinear, PackedWeight
from bigq.kernels.pack import pack
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import BITS, QuantScheme

M, N, GROUP = 96, 64, 32
GROUPS = N // GROUP

VERSIONS = {1: FORMATS["gptq"], 2: FORMATS["gptq_v2"]}


def packed(bits: int, version: int, prefix: str = "a.q") -> dict[str, Tensor]:
    """A random Linear with every code and every zero point that can be stored."""
    generator = torch.Generator().manual_seed(bits)
    lowest = 1 if version == 1 else 0
    zeros = torch.randint(lowest, 2**bits, (M, GROUPS), generator=generator).to(torch.uint8)
    zeros[0, 0], zeros[-1, -1] = lowest, 2**bits - 1
    weight = QuantizedWeight(
        codes=torch.randint(0, 2**bits, (M, N), generator=generator).to(torch.uint8),
        scales=torch.rand(M, GROUPS, generator=generator).half() + 2.0**-24,
        zeros=zeros,
        scheme=QuantScheme(bits=bits, group_size=GROUP, symmetric=False),
        loss=0.0,
        energy=1.0,
        damping=0.01,
    )
    return VERSIONS[version].store(prefix, PackedWeight.of(weight), weight.scheme, torch.float16)


def scanned(folder: Path, tensors: dict[str, Tensor], version: int = 1) -> Scan:
    path = folder / "x.safetensors"
    save_file(tensors, path)
    scan = scan_shard(path, VERSIONS[version])
    assert scan.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    return scan


@pytest.fixture(params=[64, 4 * 2**20], ids=["small pieces", "one piece"])
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are looked at in many pieces, or in one."""
    monkeypatch.setattr(scan_module, "PIECE_BYTES", request.param)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_sound_is_told_by_shapes_alone(bits: int, version: int, tmp_path: Path) -> None:
    plain = {
        "a.norm": torch.randn(N),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "one": torch.tensor(1.5),
        "ids": torch.arange(5),
    }
    scan = scanned(tmp_path, {**packed(bits, version), **packed(bits, version, "b"), **plain}, version)
    linear = PackedLinear(bits=bits, outputs=M, inputs=N, groups=GROUPS)
    assert scan.problems == ()
    assert scan.linears == {"a.q": linear, "b": linear}
    assert scan.zeros == dict.fromkeys(("a.q", "b"), (1 if version == 1 else 0, 2**bits - 1))
    assert set(scan.tensors) == {*plain, *(f"{p}.{s}" for p in ("a.q", "b") for s in ("qweight", "qzeros", "scales", "g_idx"))}


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("at", [0, 1, GROUPS * M - 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.0])
def test_scales_that_are_none(value: float, at: int, tmp_path: Path) -> None:
    tensors = packed(4, 1)
    tensors["a.q.scales"].view(-1)[at] = value
    (problem,) = scanned(tmp_path, tensors).problems
    assert problem.startswith("tensor a.q.scales holds ")


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("at", [(0, 0), (31, 1), (M - 1, GROUPS - 1)])
@pytest.mark.parametrize("bits", BITS)
def test_zero_points_that_v1_cannot_mean(bits: int, at: tuple[int, int], tmp_path: Path) -> None:
    """All ones stand for 2^bits; v2 means 2^bits − 1 by them."""
    fields = torch.zeros(M, GROUPS, dtype=torch.uint8)
    fields[at] = 2**bits - 1
    tensors = {**packed(bits, 1), "a.q.qzeros": pack(fields, bits).T.contiguous()}
    (problem,) = scanned(tmp_path, tensors, version=1).problems
    assert problem == f"tensor a.q.qzeros holds zero point {2**bits}, which is above the maximum of {bits} bits"
    assert scanned(tmp_path, tensors, version=2).problems == ()


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize(
    "group",
    [
        torch.arange(N).flip(0) // GROUP,
        torch.arange(N) // GROUP + (torch.arange(N) == N - 1),
        torch.arange(N) // GROUP - (torch.arange(N) == 0).long(),
        torch.zeros(N),
    ],
    ids=["reversed", "beyond", "negative", "one group"],
)
def test_groups_out_of_natural_order(group: Tensor, tmp_path: Path) -> None:
    tensors = {**packed(4, 1), "a.q.g_idx": group.to(torch.int32)}
    (problem,) = scanned(tmp_path, tensors).problems
    assert problem == "tensor a.q.g_idx is not in natural order"


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_unpacked_tensors_that_are_not_finite(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    for at in (0, 500, 999):
        x = torch.zeros(1000, dtype=dtype)
        x[at] = value
        assert scanned(tmp_path, {"a.norm": x}).problems == ("tensor a.norm holds NaN or Inf",)


WRONG_SHAPES: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "a group too many": lambda t: t.update({"a.q.scales": torch.ones(GROUPS + 1, M).half()}),
    "outputs missing": lambda t: t.update({"a.q.scales": torch.ones(GROUPS, M - 1).half()}),
    "scales in fp32": lambda t: t.update({"a.q.scales": torch.ones(GROUPS, M)}),
    "no groups": lambda t: t.update({"a.q.scales": torch.ones(0, M).half()}),
    "zero points of other bits": lambda t: t.update({"a.q.qzeros": torch.zeros(GROUPS, M // 16, dtype=torch.int32)}),
    "zero points transposed": lambda t: t.update({"a.q.qzeros": t["a.q.qzeros"].T.contiguous()}),
    "5 bits": lambda t: t.update({"a.q.qweight": torch.zeros(N * 5 // 32, M, dtype=torch.int32)}),
    "no inputs": lambda t: t.update({"a.q.g_idx": torch.zeros(0, dtype=torch.int32)}),
    "groups that do not divide": lambda t: t.update({"a.q.g_idx": torch.zeros(N + 1, dtype=torch.int32)}),
    "group numbers in int64": lambda t: t.update({"a.q.g_idx": t["a.q.g_idx"].long()}),
    "flat codes": lambda t: t.update({"a.q.qweight": t["a.q.qweight"].view(-1)}),
}


@pytest.mark.parametrize("change", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_shapes_that_do_not_belong_together(change: Callable[[dict[str, Tensor]], None], tmp_path: Path) -> None:
    tensors = packed(4, 1)
    change(tensors)
    scan = scanned(tmp_path, tensors)
    assert scan.linears == {}
    assert len(scan.problems) == 1 and "a.q.qweight" in scan.problems[0] and "its shape or dtype does not match" in scan.problems[0]


@pytest.mark.parametrize("suffix", ["qzeros", "scales", "g_idx"])
def test_a_packed_linear_with_a_tensor_missing(suffix: str, tmp_path: Path) -> None:
    tensors = packed(4, 1)
    del tensors[f"a.q.{suffix}"]
    assert scanned(tmp_path, tensors).problems == (f"tensor a.q.{suffix} is missing, but its Linear is packed",)


def test_a_header_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        scan_shard(path, VERSIONS[1])


def test_memory_is_a_piece_and_not_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "PIECE_BYTES", 2**16)
    sizes: list[int] = []
    empty = torch.empty

    def counting(*args: object, **options: object) -> Tensor:
        made: Tensor = empty(*args, **options)  # type: ignore[call-overload]
        sizes.append(made.nbytes)
        return made

    big = torch.randn(2**20)
    save_file({"big": big}, tmp_path / "x.safetensors")
    monkeypatch.setattr(torch, "empty", counting)
    assert scan_shard(tmp_path / "x.safetensors", VERSIONS[1]).problems == ()
    assert max(sizes) == 2**16
