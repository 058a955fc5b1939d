"""Reading a shard once, from its first byte to its last: its hash, and whether its values can be what they are said to be.

Which Linears are packed, and how, is told by the shapes of their tensors alone, so shards of unfinished jobs can be looked at too.
In memory is a piece of one tensor at a time.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bigq.io.gptq_format import SUFFIXES
from bigq.io.index import TensorInfo, read_header
from bigq.io.reader import as_bytes, fill, opened
from bigq.kernels.finite import finite
from bigq.kernels.pack import unpack
from bigq.scheme import BITS

#: Bytes of a tensor that are looked at together; unpacking 2-bit zero points takes about 20 times as much.
PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLinear:
    """A packed Linear as the shapes of its tensors say: m outputs, n inputs, G groups along the inputs."""

    bits: int
    outputs: int
    inputs: int
    groups: int

    def __str__(self) -> str:
        return f"{self.bits} bits, {self.outputs} × {self.inputs}, {self.groups} groups"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """A shard that was read.

    tensors: what its header says, in its order. linears: the packed ones, by the prefix of their tensors; those whose tensors do not
    belong together are among the problems instead. zeros: the least and the greatest zero point of each. problems: name the tensor.
    """

    sha256: str
    tensors: Mapping[str, TensorInfo]
    linears: Mapping[str, PackedLinear]
    zeros: Mapping[str, tuple[int, int]]
    problems: tuple[str, ...]


def scan_shard(path: Path, version: int) -> Scan:
    """Read a shard. version: of the format, 1 or 2.

    Raises CheckpointError where its header cannot be read, ResourceError where the disk fails.
    """
    tensors, header = read_header(path)
    linears, problems = packed_linears(tensors)
    values = _Values(linears, version)
    digest = hashlib.sha256(struct.pack("<Q", len(header)) + header)
    for info in sorted(tensors.values(), key=lambda t: t.start):
        wrong = None
        for start, piece in _pieces(info, values.together(info)):
            digest.update(as_bytes(piece))
            wrong = wrong or values.look(info, piece, start)
        if wrong is not None:
            problems.append(f"tensor {info.name} {wrong}")
    return Scan(sha256=digest.hexdigest(), tensors=tensors, linears=linears, zeros=values.zeros, problems=tuple(problems))


def packed_linears(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, PackedLinear], list[str]]:
    """(the packed Linears of a shard by prefix, what is wrong with the others)."""
    linears: dict[str, PackedLinear] = {}
    problems: list[str] = []
    for prefix in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        missing = [f"{prefix}.{suffix}" for suffix in SUFFIXES if f"{prefix}.{suffix}" not in tensors]
        if missing:
            problems.append(f"tensor {missing[0]} is missing, although its Linear is packed")
            continue
        linear = _geometry(*(tensors[f"{prefix}.{suffix}"] for suffix in SUFFIXES))
        if linear is None:
            problems.append(f"tensor {prefix}.qweight and its qzeros, scales and g_idx have shapes or dtypes that do not belong together")
        else:
            linears[prefix] = linear
    return linears, problems


def _geometry(qweight: TensorInfo, qzeros: TensorInfo, scales: TensorInfo, g_idx: TensorInfo) -> PackedLinear | None:
    """What the four tensors of a Linear stand for: qweight [n·b/32, m], qzeros [G, m·b/32], scales [G, m], g_idx [n]."""
    if [t.dtype for t in (qweight, qzeros, scales, g_idx)] != [torch.int32, torch.int32, torch.float16, torch.int32]:
        return None
    if [len(t.shape) for t in (qweight, qzeros, scales, g_idx)] != [2, 2, 2, 1]:
        return None
    m, n, groups = qweight.shape[1], g_idx.shape[0], scales.shape[0]
    for bits in BITS:
        if min(m, n, groups) and not n % groups and qweight.shape[0] * 32 == n * bits:
            fits = scales.shape == (groups, m) and qzeros.shape[0] == groups and qzeros.shape[1] * 32 == m * bits
            return PackedLinear(bits=bits, outputs=m, inputs=n, groups=groups) if fits else None
    return None


class _Values:
    """What the values of each tensor of a shard must be. zeros: what was seen of zero points, by prefix."""

    def __init__(self, linears: Mapping[str, PackedLinear], version: int) -> None:
        self._linears = linears
        self._version = version
        self.zeros: dict[str, tuple[int, int]] = {}

    def _place(self, info: TensorInfo) -> tuple[str, PackedLinear | None, str]:
        """(prefix, the packed Linear that a tensor is part of, which part)."""
        prefix, _, suffix = info.name.rpartition(".")
        return prefix, self._linears.get(prefix) if suffix in SUFFIXES else None, suffix

    def together(self, info: TensorInfo) -> int:
        """How many elements can only be looked at together."""
        _, linear, suffix = self._place(info)
        return info.shape[1] if linear is not None and suffix == "qzeros" else 1

    def look(self, info: TensorInfo, piece: Tensor, start: int) -> str | None:
        """What is wrong with elements [start, start + len(piece)) of a tensor, if anything."""
        prefix, linear, suffix = self._place(info)
        if linear is None:
            return "holds NaN or Inf" if piece.is_floating_point() and piece.itemsize > 1 and not finite(piece) else None
        if suffix == "scales":
            if not finite(piece):
                return "holds NaN or Inf"
            # Groups of zeros get scale 1, and what would round to 0 gets the smallest number of fp16.
            return None if bool((piece > 0).all()) else "holds a scale that is not above 0"
        if suffix == "qzeros":
            return self._zeros(prefix, linear, piece)
        if suffix == "g_idx":
            natural = torch.arange(start, start + len(piece)) // (linear.inputs // linear.groups)
            return None if torch.equal(piece.long(), natural) else "does not number the groups in natural order"
        # All that words of qweight can hold are codes, of 3 bits too: 32 of them fill three words.
        return None

    def _zeros(self, prefix: str, linear: PackedLinear, words: Tensor) -> str | None:
        """Zero points are codes; as v1 stores them less one, the greatest number that fits stands for none."""
        stored = unpack(words.view(-1, linear.outputs * linear.bits // 32).T.contiguous(), linear.bits)
        low, high = (int(extreme) + (self._version == 1) for extreme in torch.aminmax(stored))
        before = self.zeros.get(prefix, (low, high))
        self.zeros[prefix] = (min(low, before[0]), max(high, before[1]))
        return None if high < 2**linear.bits else f"holds zero point {high}, which is no code of {linear.bits} bits"


def _pieces(info: TensorInfo, together: int) -> Iterator[tuple[int, Tensor]]:
    """(the number of its first element, elements in a row) of a tensor, piece by piece; each is valid until the next."""
    unit = together * info.dtype.itemsize
    step = max(PIECE_BYTES // unit, 1) * unit
    buffer = torch.empty(min(step, info.nbytes), dtype=torch.uint8)
    with opened(info) as fd:
        for position in range(info.start, info.stop, step):
            piece = buffer[: min(step, info.stop - position)]
            fill(fd, info, piece, position)
            yield (position - info.start) // info.dtype.itemsize, piece.view(info.dtype)
